"""Metrics that do not ship: functions of the user's, `vl.score(features, metrics=[mine])`, and
those that installed packages offer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import update_wrapper
from importlib.metadata import EntryPoint
from inspect import Parameter, signature
from typing import Any

from vlmlayers.errors import UserError, check_one_of, one_line
from vlmlayers.metrics.declare import INF, MODEL, NEEDS, NULLS, Metric
from vlmlayers.user_code import name_of

OWN = "own"  # the level of such a metric
# What some protocols read of an entry beside its function.
READ = {
    "prompts": ("per_item",),
    "queries": ("per_item",),
    "novel classes": ("parts",),
    "other datasets": ("parts",),
}


def own_metric(function: Callable[..., Any], taken: Collection[str]) -> tuple[str, Metric]:
    """Return name and entry of a function that is to serve as a metric.

    Args:
        function: Takes the features of one dataset at one position, (item, width) in float64,
            and where it has a second argument without a default the class ids, (item,); returns a
            number.
        taken: Names that it may not have.

    Raises:
        UserError: It has no name, one that is taken, or needs other arguments.
    """
    name = name_of(function, "metric", taken)
    return name, _entry(name, function)


def packaged_metric(offer: EntryPoint) -> Metric:
    """Return the entry of a metric that an installed package offers: a `Metric`, or a function.

    Raises:
        UserError: It cannot be imported, or cannot serve as a metric.
    """
    try:
        found = offer.load()
    except Exception as error:
        raise UserError(
            f"the metric {offer.name!r} of an installed package cannot be read: {offer.value} "
            f"fails with {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, Metric):
        if not callable(found):
            raise UserError(f"{offer.value} is no metric; it has to be a function or a Metric")
        return _entry(offer.name, found)
    if found.needs == MODEL or found.base:
        raise UserError(f"{offer.value} needs more than features, as metrics of packages cannot")
    return declared(found, offer.value)


def declared(found: Any, where: str) -> Metric:
    """Return what stands for a metric if it declares what its protocol reads.

    Raises:
        UserError: It is no `Metric`, or says nothing, or something wrong, that is needed.
    """
    if not isinstance(found, Metric):
        raise UserError(
            f"{where} is a value of type {type(found).__name__}, no vlmlayers.metrics.Metric; a "
            "function goes into metrics= as it is"
        )
    check_one_of("needs", found.needs, NEEDS, where=where)
    if isinstance(found.null, str):
        check_one_of("null", found.null, NULLS, where=where)
    try:
        low, high = map(float, found.bounds)
    except (TypeError, ValueError):
        low, high = INF, -INF
    if not low < high:
        raise UserError(
            f"{where} has bounds {found.bounds!r}; they are two numbers, the smallest value that "
            "it can take and the largest"
        )
    lacking = [name for name in READ.get(found.needs, ()) if not getattr(found, name)]
    if lacking or (found.needs == "queries" and not callable(found.null)):
        raise UserError(
            f"{where} needs {found.needs!r}, whose protocol reads "
            f"{' and '.join(lacking) or 'a null that is a function'}; declare it"
        )
    return found


def _entry(name: str, function: Callable[..., Any]) -> Metric:
    try:
        shape = signature(function)
    except ValueError:  # some builtin functions tell nothing of their arguments
        raise UserError(f"metric {name!r} hides its arguments; write it as a `def`") from None
    places = [
        parameter
        for parameter in shape.parameters.values()
        if parameter.default is Parameter.empty
        and parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(places) not in (1, 2):
        raise UserError(
            f"metric {name!r} must take features, or features and labels, "
            f"not {len(places)} arguments"
        )

    def value(*arrays: Any) -> float:
        try:
            return float(function(*arrays))
        except Exception as error:
            raise UserError(f"{name} fails: {type(error).__name__}: {one_line(error)}") from error

    update_wrapper(value, function)  # whose code it is, and what it says of itself
    labelled = len(places) == 2
    return Metric(
        value,
        OWN,
        "labels" if labelled else "features",
        name.replace("_", " "),
        "",
        bounds=(-INF, INF),
        direction="larger",
        null="shuffle" if labelled else "columns",
    )
