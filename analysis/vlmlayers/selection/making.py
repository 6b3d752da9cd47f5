"""A rule by its name: one that ships, that a package offers, or a function of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from typing import Any

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.placement import Placement, parse_blocks
from vlmlayers.selection.choice import LayerChoice
from vlmlayers.selection.curves import BlockTable
from vlmlayers.selection.rules import RULES, Pick, Picks
from vlmlayers.user_code import is_user_code, load_user_code, name_of

GROUP = "vlmlayers.rules"


@checked
def make_rule(rule: str | Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Return the rule object of a name or a function, with its options set.

    Raises:
        UserError: The rule or an option of it is unknown, or a value has the wrong type.
    """
    plugins = {found.name: found for found in entry_points(group=GROUP)}
    if not isinstance(rule, str):
        return OwnRule(name_of(rule, "rule", RULES), rule, dict(options))
    if is_user_code(rule):
        return OwnRule(rule, load_user_code(rule, "rule"), dict(options))
    if rule in plugins and rule not in RULES:
        return OwnRule(rule, plugins[rule].load(), dict(options))
    check_one_of("rule", rule, [*RULES, *plugins])
    kind = RULES[rule]
    known = {field.name: field for field in fields(kind)}
    for name in options:
        check_one_of("option", name, known, where=f"rule {rule!r}")
    typed = {
        name: _typed(rule, name, value, known[name].default) for name, value in options.items()
    }
    return kind(**typed)


def _typed(rule: str, name: str, value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        answers = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).casefold() in answers:
            return answers[str(value).casefold()]
        raise UserError(f"option {name} of rule {rule!r} must be true or false, not {value!r}")
    if isinstance(default, int | float):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        kind = "whole number" if isinstance(default, int) else "number"
        if isinstance(value, bool) or not math.isfinite(number) or type(default)(number) != number:
            raise UserError(f"option {name} of rule {rule!r} must be a {kind}, not {value!r}")
        return type(default)(number)
    return value


@dataclass(frozen=True)
class OwnRule:
    """A user's function as a rule."""

    name: str
    function: Callable[..., Any]
    options: dict[str, Any]

    def __call__(self, table: BlockTable) -> Picks:
        """Return the pick of each tower."""
        try:
            made = self.function(table.frame(), **self.options)
        except TypeError as error:
            raise UserError(
                f"rule {self.name!r} cannot be called with these options: {error}"
            ) from None
        return {tower: Pick(picked) for tower, picked in self._read(made, table.blocks).items()}

    def _read(self, made: Any, blocks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        if isinstance(made, LayerChoice):
            made = (made.vision, made.text)
        if isinstance(made, Mapping):
            made = (made.get("vision", ()), made.get("text", ()))
        if not isinstance(made, Iterable) or isinstance(made, str) or len(pair := tuple(made)) != 2:
            raise UserError(
                f"rule {self.name!r} must return a LayerChoice or a (vision, text) "
                f"pair of blocks, not {made!r}"
            )
        chosen = Placement(parse_blocks(pair[0]), parse_blocks(pair[1]))
        chosen.check(blocks, f"rule {self.name!r}")
        return {tower: chosen.blocks(tower) for tower in blocks}
