"""A rule by its name: one that ships, that a package offers, or a function of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint
from numbers import Integral
from typing import Any

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.placement import Placement, parse_blocks
from vlmlayers.positions import TOWERS
from vlmlayers.selection.choice import LayerChoice
from vlmlayers.selection.curves import BlockTable
from vlmlayers.selection.rules import RULES, Pick, Picks, Rule
from vlmlayers.user_code import is_user_code, load_user_code, name_of, packaged

GROUP = "vlmlayers.rules"


@checked
def make_rule(rule: str | Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Return the rule object of a name or a function, with its options set.

    Raises:
        UserError: The rule or an option of it is unknown, or a value has the wrong type.
    """
    plugins = packaged(GROUP)
    if not isinstance(rule, str):
        return OwnRule(name_of(rule, "rule", RULES), rule, dict(options))
    if is_user_code(rule):
        return OwnRule(rule, load_user_code(rule, "rule"), dict(options))
    # A package cannot replace a shipped rule: its name would then stand for other blocks.
    if rule in plugins and rule not in RULES:
        return OwnRule(rule, _loaded(plugins[rule]), dict(options))
    check_one_of("rule", rule, [*RULES, *plugins])
    valid = [f.name for f in fields(RULES[rule])]
    if options and not valid:
        raise UserError(f"the rule {rule!r} takes no options, and {next(iter(options))!r} is set")
    for name in options:
        check_one_of("option", name, valid, f"rule {rule!r}")
    return RULES[rule](**options)


def _loaded(offer: EntryPoint) -> Any:
    try:
        return offer.load()
    except Exception as error:
        raise UserError(
            f"the rule {offer.name!r} of an installed package cannot be read: {offer.value} "
            f"fails with {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True)
class OwnRule(Rule):
    """A user's function as a rule."""

    name: str
    function: Callable[..., Any]
    options: dict[str, Any]

    def __call__(self, table: BlockTable) -> Picks:
        """Return the pick of each tower."""
        scores = table.frame()
        try:  # before the call, whose own errors are those of the rule's code
            inspect.signature(self.function).bind(scores, **self.options)
        except TypeError as error:
            raise UserError(
                f"rule {self.name!r} cannot be called with these options: {error}"
            ) from None
        made = self.function(scores, **self.options)
        return {tower: Pick(picked) for tower, picked in self._read(made, table.blocks).items()}

    def _read(self, made: Any, blocks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        if isinstance(made, LayerChoice):
            made = (made.vision, made.text)
        if isinstance(made, Mapping):
            for tower in made:
                check_one_of("tower", tower, TOWERS, f"what rule {self.name!r} returns")
            made = (made.get("vision", ()), made.get("text", ()))
        pair = tuple(made) if isinstance(made, Iterable) and not isinstance(made, str) else ()
        # Two numbers are rather two blocks of one list than one block of each tower.
        if len(pair) != 2 or all(isinstance(one, Integral) for one in pair):
            raise UserError(
                f"rule {self.name!r} must return a LayerChoice or a (vision, text) "
                f"pair of blocks, not {made!r}"
            )
        try:
            chosen = Placement(parse_blocks(pair[0]), parse_blocks(pair[1]))
        except UserError as error:
            raise UserError(f"what rule {self.name!r} returns: {error}") from None
        chosen.check(blocks, f"rule {self.name!r}")
        return {tower: chosen.blocks(tower) for tower in blocks}
