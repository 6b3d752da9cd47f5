"""What a search tries: amounts at one placement, placements at one amount and at a larger one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vlmadapters.methods.config import MethodConfig
from vlmadapters.training.recipes import Recipe
from vlmadapters.validation.competitors import competitors
from vlmlayers.errors import UserError
from vlmlayers.placement import Amount, Placement

# Factors of rate (the method's scale, else lr) and of steps, the likelier to help first.
GRID = ((3.0, 1), (3.0, 3), (1.0, 3), (10.0, 1), (1 / 3, 1))
MORE = 3.0  # a placement is also tried at so many times the rate: few blocks need more of it
KINDS = ("paper", "all", "upper", "last", "vision", "text")
LOG = logging.getLogger(__name__)


def check_searchable(method: MethodConfig) -> None:
    """Raise a UserError where every setting that a search tries would be the same training."""
    if not method.in_steps and not method.towers:
        raise UserError(
            f"{method.name} has nothing to search: no step trains it, so that it reads neither "
            "rate nor epochs, and it acts at no block; train it as it is"
        )


def tried_amounts(
    default: Recipe, amounts: Iterable[Amount] | None = None, also: Amount | None = None
) -> list[Recipe]:
    """Return the default's placement by other amounts: those given, else multiples of its own.

    A method that no step trains reads none.

    Args:
        default: The setting.
        amounts: The amounts given.
        also: One more, where it is not empty.
    """
    if amounts is None:
        grid = GRID if default.method.in_steps else ()
        amounts = [amount_times(default, rate, steps) for rate, steps in grid]
    found = [_by(default, amount) for amount in (*amounts, *([also] if also else []))]
    # One that says what the default says already would race against itself.
    others = [one for one in found if replace(one, amount=default.amount) != default]
    return list(dict.fromkeys(others))


def tell_own_amounts(default: Recipe, datasets: Iterable[str], steps: bool = True) -> None:
    """Warn of datasets whose own rate or epochs in the recipe multiples replace.

    Args:
        default: The setting.
        datasets: Names of the datasets.
        steps: Whether steps are multiplied as well as the rate.
    """
    if not default.method.in_steps:
        return
    replaced = [_rate(default)[0], *(("epochs", "steps_per_shot") if steps else ())]
    told = []
    for name in dict.fromkeys(datasets):
        values = default.datasets.get(name, {})
        own = {**values, **values.get("settings", {})}
        if amount := ", ".join(f"{key}={own[key]}" for key in replaced if key in own):
            told.append(f"{name} ({amount})")
    if told:
        LOG.warning(
            "%s: the recipe has values of its own for %s, which multiples of its common values "
            "replace; name amounts that fit",
            default.method.title, ", ".join(told),
        )  # fmt: skip


def tried_placements(
    default: Recipe, depths: Mapping[str, int], asked: Iterable[Placement] | None = None
) -> list[Recipe]:
    """Return the placements to try at the recipe's amount, other than the default.

    Args:
        default: The setting that they compete with.
        depths: Blocks of each tower.
        asked: Placements; the usual competitors that the method can take where None. A method that
            has no placement has none.

    Raises:
        UserError: The method cannot act at a placement that is asked for.
    """
    found = []
    for place in dict.fromkeys(asked if asked is not None else _usual(default, depths)):
        if not (place or place.amount):
            continue
        setting = default.at(place)
        setting.method.check_depths(depths)
        # What is the default under another name would race against itself.
        if replace(setting, amount=default.amount) != default:
            found.append(setting)
    return found


def _usual(default: Recipe, depths: Mapping[str, int]) -> list[Placement]:
    """Return the usual competitors of a setting's placement in its method's towers."""
    chosen = Placement(default.method.vision, default.method.text)
    if not chosen:
        return []
    return [one.placement for one in competitors(chosen, depths, KINDS, method=default.method)]


def crossed(tuned: Recipe, placements: Sequence[Recipe]) -> list[Recipe]:
    """Return placements by the amount of a setting and by a larger one, or by their own."""
    found = []
    for one in placements:
        amounts = [one.amount or tuned.amount]
        if not one.amount and tuned.method.in_steps:
            amounts.append(amount_times(tuned, MORE, 1))
        found += [_by(one, amount) for amount in amounts]
    return found


def amount_times(setting: Recipe, rate: float, steps: int) -> Amount:
    """Return a setting's amount with its rate and its steps multiplied.

    The rate is the method's scale where it has one, else the learning rate.
    """
    train, values = setting.train, setting.amount.given()
    if rate != 1:
        key, value = _rate(setting)
        # Three digits: 3 × 0.001 should read 0.003 in tables and in file names.
        values[key] = float(f"{rate * value:.3g}")
    if steps != 1:
        key = "steps_per_shot" if train.steps_per_shot else "epochs"
        values[key] = steps * getattr(train, key)
    return Amount(**values)


def _rate(setting: Recipe) -> tuple[str, float]:
    scale = getattr(setting.method, "scale", None)
    return ("scale", scale) if scale else ("lr", setting.train.lr)


def _by(setting: Recipe, amount: Amount) -> Recipe:
    """Return a setting at its own blocks by another amount."""
    return setting.at(Placement(setting.method.vision, setting.method.text, amount))
