"""Check the arguments of public functions in one place; one line says what each takes.

The annotations of a function say what it takes; `checked` holds calls to them:

    @checked
    def score(
        features: Sequence[LayerFeatures],
        positions: Sequence[Position] | None = None,
        *,
        k: Annotated[int, Takes(least=1)] = 10,
        balance: Literal["equal", "weights"] = "equal",
    ) -> pd.DataFrame: ...

    score(features, "12", k=np.int64(5))   # features → (features,), positions → ("12",), k → 5
    score(features, seed=1)                # UserError: unknown argument 'seed' in score; …
    score(features, k=0)                   # UserError: score: k takes a whole number from 1, not 0

What an annotation takes, and what the function is given:

- `Sequence[X]`, `list[X]`, `tuple[X, ...]`: a collection, array, generator or one bare X; a tuple.
  Text is one value, never taken apart. `Iterable[X]` takes the same and leaves iterators as they
  are.
- `int`: whole numbers, NumPy's too; an `int`. `float`: any number but NaN. `bool`: also 0 and 1.
- `str`: text. `Path` or `os.PathLike`: text or a path, `~` in front included; a `Path`.
- `tuple[X, X]`, `Literal`, `Mapping[X, Y]`, `Callable`, unions and None: as they say. Other
  classes: an instance.
- `Annotated[X, Takes(…)]`: X in other words, within a range, or converted first.

Annotations are evaluated at the first call, in the function's module: what they name has to be
imported there, not only for the type checker. Defaults are not checked. Decorate methods inside
`@classmethod`, and a dataclass outside `@dataclass`.
"""

from __future__ import annotations

import collections.abc
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache, wraps
from inspect import Parameter, Signature, signature
from operator import index
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_origin, overload

from vlmlayers.errors import UserError, check_one_of, shortened

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)
_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
_BY_PLACE = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Takes:
    """What an argument takes beyond its type; for use inside `Annotated`.

    Attributes:
        words: What it takes, for the message: "a score table, as `vl.score` makes it".
        many: The same of several: "score tables".
        least: Smallest number that is right.
        most: Largest number that is right.
        above: Number that every right one is above.
        convert: Run on what is given before its type is looked at; with a TypeError or ValueError
            it refuses that.
    """

    words: str = ""
    many: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    convert: Callable[[Any], Any] | None = None


@overload
def checked(function: C) -> C: ...
@overload
def checked(function: Callable[P, R]) -> Callable[P, R]: ...
def checked(function: Any) -> Any:
    """Return a function, or a class, that checks and converts its arguments before it runs.

    The module says how. Raised by the result:
        UserError: An argument is unknown, missing, given twice, or of the wrong type.
    """
    if isinstance(function, type):
        made: Any = function
        made.__init__ = checked(made.__init__)
        return made

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _taken(function, args, kwargs)
        return function(*args, **kwargs)

    return call


def plain_number(value: Any) -> Any:
    """Return the text of a whole number, and anything else as it is: block 6 is position "6"."""
    try:
        return value if isinstance(value, bool) else str(index(value))
    except TypeError:
        return value


def in_order(given: Any) -> Any:
    """Return a collection that says what comes first; a set and a mapping are refused."""
    if isinstance(given, Set | Mapping) or not isinstance(given, Iterable):
        raise TypeError
    return given


InOrder = Annotated[Collection[Any], Takes("a sequence in order", convert=in_order)]
Position = Annotated[
    str, Takes("a position such as 'embed', 6 or 'proj'", "positions", convert=plain_number)
]
Count = Annotated[int, Takes(least=1)]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
Natural = Annotated[int, Takes(least=0)]
LARGEST_SEED = 2**63 - 1  # that torch takes
ENOUGH_DRAWS = 20  # of fewer none lies outside 95 %: what they span is no interval
Seed = Annotated[int, Takes(least=0, most=LARGEST_SEED)]
Positive = Annotated[float, Takes(above=0)]
NotNegative = Annotated[float, Takes(least=0)]
Share = Annotated[float, Takes(least=0, most=1)]


def _taken(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call as the function is given them."""
    label = function.__qualname__.removesuffix(".__init__").rpartition("<locals>.")[2]
    shape, kinds = _parameters(function)
    try:
        bound = shape.bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(_misfit(label, shape, kinds, args, kwargs) or str(error)) from None
    # Only what was given is looked at: a default is the author's own, and checking it at every call
    # would cost more than many of these functions do.
    for name, value in bound.arguments.items():
        parameter, kind = shape.parameters[name], kinds[name]
        if parameter.kind is Parameter.VAR_POSITIONAL:
            given: Any = tuple(_take(label, name, kind, one) for one in value)
        elif parameter.kind is Parameter.VAR_KEYWORD:
            given = {key: _take(label, key, kind, one) for key, one in value.items()}
        else:
            given = value if value is parameter.default else _take(label, name, kind, value)
        bound.arguments[name] = given
    return bound.args, bound.kwargs


def _take(label: str, name: str, kind: _Kind, value: Any) -> Any:
    try:
        return kind.take(value)
    except _Wrong as wrong:
        raise UserError(f"{label}: {name} takes {kind.one}, not {_shown(wrong.value)}") from None


def taken(label: str, name: str, annotation: Any, value: Any) -> Any:
    """Return a value as an argument of this annotation would take it.

    Args:
        label: Where it was given, for the message: "--set".
        name: Name of the value.
        annotation: As that of an argument.
        value: What was given.

    Raises:
        UserError: It is of another type or out of range; says what it takes.
    """
    return _take(label, name, _kind_of(annotation), value)


def _misfit(
    label: str,
    shape: Signature,
    kinds: Mapping[str, _Kind],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str:
    """Return why a call does not fit a signature; empty where Python says it as well."""
    parameters = shape.parameters.values()
    names = [p.name for p in parameters if p.kind in _NAMED and p.name not in ("self", "cls")]
    if all(p.kind is not Parameter.VAR_KEYWORD for p in parameters):
        for name in kwargs:
            check_one_of("argument", name, names, where=label)
    places = [p.name for p in parameters if p.kind in _BY_PLACE]
    own = places[:1] in (["self"], ["cls"])
    if len(args) > len(places):
        more = [name for name in names if name not in places]
        rest = f"; the others go by name: {', '.join(more)}" if more else ""
        return f"{label} takes {len(places) - own} arguments by place, not {len(args) - own}{rest}"
    for p in parameters:
        given = p.name in kwargs or p.name in places[: len(args)]
        if p.default is Parameter.empty and p.kind in (*_BY_PLACE, *_NAMED) and not given:
            return f"{label} needs {p.name}: {kinds[p.name].one}"
    return ""


class _Wrong(Exception):
    """A value is not what is taken."""

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.value = value


@dataclass(frozen=True)
class _Kind:
    """What an annotation takes: in words, of one and of several, and how a value is taken."""

    one: str
    many: str
    take: Callable[[Any], Any]


@cache
def _parameters(function: Callable[..., Any]) -> tuple[Signature, dict[str, _Kind]]:
    """Return the signature of a function and what each of its parameters takes."""
    shape = signature(function)
    stated = {
        name: parameter.annotation
        for name, parameter in shape.parameters.items()
        if parameter.annotation is not Parameter.empty
    }
    # Of the stated annotations alone, through a stand-in: `get_type_hints` of the function itself
    # would evaluate its return type too, which may be imported for the type checker only.
    hints = typing.get_type_hints(
        types.SimpleNamespace(__annotations__=stated),
        globalns=getattr(function, "__globals__", None),
        include_extras=True,
    )
    return shape, {name: _kind_of(hints.get(name, Any)) for name in shape.parameters}


def _kind_of(annotation: Any) -> _Kind:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind = _kind_of(parts[0])
        for mark in parts[1:]:
            kind = _marked(kind, mark) if isinstance(mark, Takes) else kind
        return kind
    if origin in (typing.Union, types.UnionType):
        return _one_of([_kind_of(part) for part in parts])
    if origin is Literal:
        words = " or ".join(filter(None, (", ".join(map(repr, parts[:-1])), repr(parts[-1]))))
        return _Kind(words, words, lambda value: _among(value, parts))
    # `tuple[X, ...]` is a collection of any length, `tuple[X, Y]` one of two.
    if origin is tuple and parts[1:] != (...,):
        return _as_many(list(map(_kind_of, parts)))
    if origin in _COLLECTIONS:
        return _several(_kind_of(parts[0]), lazy=origin is Iterable)
    if origin in (dict, collections.abc.Mapping):
        return _mapping(*map(_kind_of, parts))
    kind = origin or annotation
    if kind in _PLAIN:
        return _PLAIN[kind]
    return _instance(kind) if isinstance(kind, type) else _PLAIN[Any]


def _marked(kind: _Kind, mark: Takes) -> _Kind:
    """Return a kind in the words of a mark, within its range, after its conversion."""
    words, many = mark.words or kind.one, mark.many or kind.many
    span = "" if mark.least is None else f" from {mark.least:g}"
    span += "" if mark.most is None else f" to {mark.most:g}"
    span += "" if mark.above is None else f" above {mark.above:g}"

    def take(value: Any) -> Any:
        try:
            taken = kind.take(value if mark.convert is None else mark.convert(value))
        except (TypeError, ValueError):
            raise _Wrong(value) from None
        low = mark.least is not None and taken < mark.least
        high = mark.most is not None and taken > mark.most
        if low or high or (mark.above is not None and taken <= mark.above):
            raise _Wrong(value)
        return taken

    return _Kind(words + span, many + span, take)


def _one_of(kinds: list[_Kind]) -> _Kind:
    """Return what takes any of several kinds, the first that fits."""

    def take(value: Any) -> Any:
        # The last complaint but that of None: of `X | None` it says what X would be.
        wrong = _Wrong(value)
        if isinstance(value, str) and not value and _PATH in kinds:
            raise wrong  # that text may stand for a path does not make the empty one a path
        if isinstance(value, str) and _PATH in kinds:
            value = _at_home(value)
        for kind in kinds:
            try:
                return kind.take(value)
            except _Wrong as error:
                wrong = error if kind is not _NONE else wrong
        raise wrong

    one = " or ".join(dict.fromkeys(kind.one for kind in kinds))
    return _Kind(one, " or ".join(dict.fromkeys(kind.many for kind in kinds)), take)


def _several(item: _Kind, lazy: bool) -> _Kind:
    """Return what takes any number of items, or one."""

    def take(value: Any) -> Any:
        # Its keys would be taken for the values, such as rows for labels.
        if isinstance(value, Mapping) and item is _ANY:
            raise _Wrong(value)
        # One bare value first: text would otherwise be taken apart into characters. Where items may
        # be anything, only text is sure to be one of them.
        if item is not _ANY or isinstance(value, str | bytes):
            try:
                return (item.take(value),)
            except _Wrong:
                if isinstance(value, str | bytes | Mapping):
                    raise
        if lazy and isinstance(value, Iterator):
            return value
        try:
            # A set has no order of its own, and results must not depend on hashes of text.
            several = iter(sorted(value, key=str) if isinstance(value, set | frozenset) else value)
        except TypeError:
            raise _Wrong(value) from None
        return tuple(item.take(one) for one in several)

    return _Kind(item.many, f"sequences of {item.many}", take)


def _as_many(items: list[_Kind]) -> _Kind:
    """Return what takes a collection of as many items."""

    def take(value: Any) -> tuple[Any, ...]:
        taken = () if isinstance(value, str | Mapping) else _several(_ANY, lazy=False).take(value)
        if len(taken) != len(items):
            raise _Wrong(value)
        return tuple(item.take(one) for item, one in zip(items, taken))

    words = f"{len(items)} {items[0].many}"
    return _Kind(words, f"sequences of {words}", take)


def _mapping(key: _Kind, content: _Kind) -> _Kind:
    def take(value: Any) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise _Wrong(value)
        return {key.take(name): content.take(one) for name, one in value.items()}

    words = f"{key.many} to {content.many}"
    return _Kind(f"a mapping from {words}", f"mappings from {words}", take)


def _where(fits: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """Return what takes a value as it is where it fits."""

    def take(value: Any) -> Any:
        if not fits(value):
            raise _Wrong(value)
        return value

    return take


def _instance(kind: type) -> _Kind:
    return _Kind(kind.__name__, kind.__name__, _where(lambda value: isinstance(value, kind)))


def _among(value: Any, valid: tuple[Any, ...]) -> Any:
    # By type as well: 1 == True, and "1" may be a name.
    for one in valid:
        if isinstance(value, type(one)) and value == one:
            return one
    raise _Wrong(value)


def _bool(value: Any) -> bool:
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool":
        return bool(value)
    if _int(value) not in (0, 1):
        raise _Wrong(value)
    return bool(value)


def _int(value: Any) -> int:
    if isinstance(value, bool):  # which is an int, but never meant as one
        raise _Wrong(value)
    try:
        return index(value)
    except TypeError:
        raise _Wrong(value) from None


def _float(value: Any) -> float:
    # float() would read text, and an array of one number.
    if isinstance(value, bool | str | bytes) or len(getattr(value, "shape", ())):
        raise _Wrong(value)
    try:
        number: float = value if type(value) in (int, float) else float(value)
    except (TypeError, ValueError):
        raise _Wrong(value) from None
    if number != number:
        raise _Wrong(value)
    return number


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong(value)
    return str.__str__(value)  # of a subclass, such as numpy's, the plain text


def _path(value: Any) -> Path:
    # The empty path would be the current folder, and is mostly a variable that was never set.
    if not isinstance(value, str | os.PathLike) or value == "":
        raise _Wrong(value)
    return Path(_at_home(os.fspath(value)))


def _at_home(path: str) -> str:
    """Return a path with a leading `~` expanded, as shells do; else a folder `~` would be made."""
    return os.path.expanduser(path)  # noqa: PTH111  (one of an unknown user stays)


_ANY = _Kind("anything", "anything", lambda value: value)
_NONE = _Kind("None", "None", _where(lambda value: value is None))
_PATH = _Kind("a path", "paths", _path)
_PLAIN: dict[Any, _Kind] = {
    Any: _ANY,
    bool: _Kind("True or False", "True or False", _bool),
    int: _Kind("a whole number", "whole numbers", _int),
    float: _Kind("a number", "numbers", _float),
    str: _Kind("a string", "strings", _str),
    Path: _PATH,
    os.PathLike: _PATH,
    type(None): _NONE,
    collections.abc.Callable: _Kind("a function", "functions", _where(callable)),
}
_COLLECTIONS = (list, tuple, collections.abc.Sequence, collections.abc.Collection, Iterable)


def _shown(value: Any) -> str:
    """Return a wrong value as a message shows it: itself where it is short, else what it is."""
    if value is None or isinstance(value, str | bytes | bool | int | float | os.PathLike):
        return shortened(repr(value))
    return f"a value of type {type(value).__name__}"
