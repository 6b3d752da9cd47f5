"""Images that cannot be read: counted and listed, then refused or left out with a warning."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from vlmlayers.errors import DataFault
from vlmlayers.runs import is_first_process

LOG = logging.getLogger(__name__)
SHOWN = 5  # images that a refusal names
WAY_OUT = "repair it, or leave such images out with skip_unreadable=True (--skip-unreadable)"
GIVE_UP = 100  # that fail, and more than half of all


@dataclass
class Unreadable:
    """Images that could not be decoded.

    Attributes:
        reasons: Row of the item → its path and why.
    """

    reasons: dict[int, str] = field(default_factory=dict)

    def settle(self, dataset: str, total: int, *, skip: bool) -> None:
        """Refuse the images, or leave them out and say how many and which first.

        Args:
            dataset: Name of the dataset.
            total: Number of images that were tried.
            skip: Whether they may be left out.

        Raises:
            DataFault: They may not be left out, or none of the images can be read.
        """
        if not self.reasons:
            return
        listed = [self.reasons[row] for row in sorted(self.reasons)]
        count = f"{len(listed):,} of {total:,} images of {dataset} cannot be read"
        if not skip or len(listed) == total:
            more = "; …" if len(listed) > SHOWN else ""
            advice = "repair them" if len(listed) == total else WAY_OUT.replace(" it,", " them,")
            raise DataFault(f"{count}: {'; '.join(listed[:SHOWN])}{more}; {advice}")
        if is_first_process():
            LOG.warning("%s and are left out, first %s", count, listed[0])

    def mostly_fails(self, seen: int) -> bool:
        """Return whether so many images fail that going on only delays the message."""
        return len(self.reasons) >= GIVE_UP and 2 * len(self.reasons) > seen


def reason(path: str, error: Exception) -> str:
    """Return an item's path and why it cannot be read, in one line."""
    return f"{path} ({' '.join(str(error).split())})"
