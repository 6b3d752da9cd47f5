"""On how many resampled tables a rule is run again; known by its name, before a table is read."""

from __future__ import annotations

from vlmlayers.errors import UserError

RESAMPLES = 200  # where nobody names a number
UNSAMPLED = ("paper", "all", "explicit", "search")  # rules that read no score


def resampled(rule: str, resamples: int) -> int:
    """Return on how many resampled tables `select` runs a rule of this name again."""
    # One that reads no score would choose the same every time.
    return 0 if rule in UNSAMPLED else resamples


def check_resampling(rule: str, resamples: int, seed: int = 0) -> None:
    """Raise a UserError where resamples are too few, or change nothing for a rule of this name.

    So may their seed. Resamples of 0 ask for what happens, and are taken for any rule.
    """
    why = f"rule {rule!r} reads no score" if rule in UNSAMPLED else "resamples is 0"
    if resamples not in (0, RESAMPLES) and rule in UNSAMPLED:
        raise UserError(f"resamples draw scores anew, and {why}; leave resamples out")
    if resamples == 1:
        raise UserError(
            "resamples is 1; at least 2 are needed to say how often a block is chosen, or 0 to "
            "skip that"
        )
    if seed and not resampled(rule, resamples):
        raise UserError(f"seed is of the resampling, and {why}; leave seed out")
