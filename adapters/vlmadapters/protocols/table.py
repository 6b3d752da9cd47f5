"""The protocols of the papers by name: which classes are trained and which are tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmlayers.errors import UserError, check_one_of


@dataclass(frozen=True)
class Protocol:
    """What a protocol trains on and tests.

    Attributes:
        name: As in the results table.
        train_kind: Classes that are trained: `base` or `all`.
        own_kinds: Halves of the source's own test set that are evaluated.
        transfer: Whether other datasets are tested, all classes of each.
        same_classes: Whether these are to have no class that the source has not.
    """

    name: str
    train_kind: str
    own_kinds: tuple[str, ...]
    transfer: bool = False
    same_classes: bool = False


# The last two differ in their targets alone, and are reported in different tables.
PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("base-to-novel", "base", ("base", "novel")),
        Protocol("few-shot", "all", ("all",)),
        Protocol("cross-dataset", "all", ("all",), transfer=True),
        Protocol("domain-generalization", "all", ("all",), transfer=True, same_classes=True),
    )
}


def protocol_of(name: str, targets: Sequence[Any], where: str = "") -> Protocol:
    """Return a protocol by its name.

    Args:
        name: A name of `PROTOCOLS`.
        targets: Datasets tested by transfer.
        where: Where the name stands, for messages.

    Raises:
        UserError: The name is unknown, the protocol tests other datasets and none is named, or it
            tests none and some are.
    """
    protocol = PROTOCOLS[check_one_of("protocol", name, PROTOCOLS, where=where)]
    if protocol.transfer and not targets:
        raise UserError(f"the protocol {name} needs target datasets; name them")
    if targets and not protocol.transfer:
        known = ", ".join(name for name, one in PROTOCOLS.items() if one.transfer)
        raise UserError(
            f"the protocol {name} tests the datasets that it trains on and no target; leave "
            f"targets out, or take one of {known}"
        )
    return protocol
