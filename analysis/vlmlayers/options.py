"""Options: each named, described and checked once; command line, study file and Python read it.

`vlmlayers.arguments` checks calls: one wrong argument, of any Python type, converted where that is
safe. This module reads documents: nested tables, keys under other names, conditions between keys,
and the place of what is wrong. pydantic does that part; its words are replaced by ours.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce, wraps
from operator import or_
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, cast, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core.core_schema import CoreSchema, no_info_before_validator_function

from vlmlayers.arguments import LARGEST_SEED, plain_number
from vlmlayers.arguments import Seed as WholeSeed
from vlmlayers.errors import UserError, check_one_of, nearest, shortened

Value = TypeVar("Value")

# What pydantic's errors say in our words; `{…}` comes from the error.
NEEDED = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "finite_number": "a finite number",
    "string_type": "a string",
    "string_too_short": "a string of at least {min_length}",
    "string_pattern_mismatch": "a string like {pattern}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "tuple_type": "a list",
    "model_": "a table {{ key = value }}",
    "dict_": "a table {{ key = value }}",
}
Seed = Annotated[WholeSeed, Field(ge=0, le=LARGEST_SEED)]
KEY = "[key]"  # stands in a place of pydantic's where the key is wrong, not its value
TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def _strict(schema: Any) -> Any:
    """Return a schema of pydantic's that takes numbers and truths for what they are alone."""
    # Scalars alone: a strict model would refuse lists for tuples and tables for models as well.
    if isinstance(schema, list | tuple):
        return type(schema)(map(_strict, schema))
    if not isinstance(schema, dict) or schema.get("strict"):
        return schema
    if schema.get("type") in ("bool", "int", "float"):
        return no_info_before_validator_function(_unboxed, {**schema, "strict": True})
    return {key: part if key == "default" else _strict(part) for key, part in schema.items()}


def _unboxed(value: Any) -> Any:
    """Return Python's own number or truth of an array's, and a list of an array."""
    return value.tolist() if hasattr(value, "tolist") else value


class Options(BaseModel):
    """A set of options. A name that it does not know is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Refuse True, 3.0 and "3" where 3 is meant, and 1 and "yes" for True.

        pydantic would convert them, and a call would be checked less than `vlmlayers.arguments`
        checks the others. A command line has nothing but text (`validated(…, words=True)`).
        """
        return cast(CoreSchema, _strict(handler(source)))

    def idle(self) -> Iterator[tuple[str, str]]:
        """Yield each option that does nothing beside the others, and why."""
        return iter(())

    @model_validator(mode="after")
    def _refuse_idle(self) -> Self:
        for name, why in self.idle():
            # By value: the command line hands on what nobody typed as well.
            if getattr(self, name) != type(self).model_fields[name].get_default():
                raise ValueError(f"{name} {why}")
        return self


Parsed = TypeVar("Parsed", bound=BaseModel)
Function = TypeVar("Function", bound=Callable[..., Any])


def _several(value: Any) -> Any:
    """Take a bare value where several are meant, and any sequence, such as an array."""
    value = _unboxed(value)
    return (value,) if isinstance(value, str | bytes | int | float) else value


Several = Annotated[tuple[Value, ...], BeforeValidator(_several)]
Word = Annotated[str, BeforeValidator(plain_number)]


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    twice = [seed for seed in seeds if seeds.count(seed) > 1]
    if twice:
        raise ValueError(f"names {twice[0]} twice; a seed again is no new draw")
    return seeds


Seeds = Annotated[Several[Seed], AfterValidator(_each_once)]


def at_key(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a check for a validator of pydantic, which then says the key that its error is of."""

    def run(value: Any) -> Any:
        # A UserError is no ValueError, which alone pydantic catches and puts a place to.
        try:
            return check(value)
        except UserError as error:
            raise ValueError(str(error)) from None

    return run


def one_of(kind: str, valid: Iterable[str]) -> AfterValidator:
    """Return the validator of a name that has to be among some, as `check_one_of` says."""
    return AfterValidator(at_key(lambda name: check_one_of(kind, name, valid)))


@dataclass(frozen=True)
class Cli:
    """How the command line takes a field, where its name and type do not say; in `Annotated`.

    Attributes:
        repeated: What one value stands for, where several are repeated: each may have commas.
    """

    repeated: str = ""


class ImageOptions(Options):
    """Which images of a dataset are left out."""

    present_only: bool = Field(default=False, description="Leave out items that are not on disk.")
    skip_unreadable: bool = Field(
        default=False, description="Leave unreadable images out instead of stopping, and say so."
    )


def validated(
    model: type[Parsed], values: Mapping[str, Any], where: str = "", *, words: bool = False
) -> Parsed:
    """Return values as a model.

    Args:
        model: The model.
        values: By name.
        where: What messages begin with.
        words: Take text for numbers, as a command line gives them.

    Raises:
        UserError: A name is unknown (with the nearest one) or missing, or a value is wrong.
    """
    try:
        return model.model_validate(values, strict=False if words else None)
    except ValidationError as error:
        problem = _explain(error, model, values)
    except RecursionError:
        problem = "nested too deeply"
    raise UserError(f"{where}: {problem}" if where else problem)


def _explain(error: ValidationError, model: type[BaseModel], values: Any) -> str:
    """Return one problem of a validation error in one line: an unknown name before all others.

    A misspelt name is also missing under its right spelling; the first message is the helpful one.
    """
    found = [(_place(one, values), one) for one in error.errors(include_url=False)]
    # Where several kinds of value are taken pydantic names what is wrong as each of them: what is
    # wrong further inside was meant. A list of nothing but wrong values is also said to be empty.
    deepest = [
        (place, one)
        for place, one in found
        if not any(_inside(other, place) or _inside(two["loc"], one["loc"]) for other, two in found)
    ]
    # `min` keeps the first of equals: other problems stay in the order of the document.
    where, first = min(deepest, key=lambda pair: pair[1]["type"] != "extra_forbidden")
    more = len({place for place, _ in deepest}) - 1
    tail = f" (and {more} more)" if more else ""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in where)
    place = "".join(steps).removeprefix(".")[:120]
    if first["type"] == "extra_forbidden":
        keys = _keys(model, first["loc"][:-1])
        close = nearest(str(first["loc"][-1]), keys)
        hint = f"did you mean {close!r}?" if close else f"valid: {', '.join(keys)}"
        return f"unknown key {place!r}; {hint}{tail}"
    if first["type"] == "missing":
        return f"the key {place!r} is missing{tail}"
    if first["type"] == "literal_error":
        expected = first["ctx"]["expected"]
        close = nearest(str(first["input"]), re.findall("'(.*?)'", expected))
        hint = f"did you mean {close!r}?" if close else f"valid: {expected}"
        if first["loc"][-1] == KEY:
            return f"unknown key {place!r}; {hint}{tail}"
        return f"unknown {place} {shortened(repr(first['input']))}; {hint}{tail}"
    if needed := _needed([one for other, one in deepest if other == where]):
        return f"{place} is {shortened(repr(first['input']))}; {needed} is needed{tail}"
    message = " ".join(first["msg"].removeprefix("Value error, ").split())[:300]
    return (f"{place!r}: {message}" if place else message) + tail


def _inside(place: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(place) > len(other) and place[: len(other)] == other


def _place(problem: Mapping[str, Any], values: Any) -> tuple[str | int, ...]:
    """Return where a problem is in the document; pydantic also names the kinds that it tried."""
    place: list[str | int] = []
    for step in problem["loc"]:
        if isinstance(values, str | bytes):
            break
        with suppress(LookupError, TypeError):
            values = values[step]
            place.append(step)
    if problem["type"] == "missing":
        place.append(problem["loc"][-1])
    return tuple(place)


def _needed(problems: Sequence[Mapping[str, Any]]) -> str:
    """Return in our words what is needed at a place; empty where there are none for a problem."""
    # A value of one of the kinds that are taken is told from those of none.
    of_kind = [one for one in problems if not one["type"].endswith(("_type", "_parsing", "_float"))]
    words = [
        next((words.format(**one.get("ctx", {})) for kind, words in NEEDED.items()
              if one["type"].startswith(kind)), "")
        for one in of_kind or problems
    ]  # fmt: skip
    return " or ".join(dict.fromkeys(words)) if all(words) else ""


def _keys(model: type[BaseModel], place: Sequence[Any]) -> list[str]:
    """Return the keys at a place inside a model."""
    for key in place:
        named = {field.alias or name: field for name, field in model.model_fields.items()}
        if key in named:
            model = _inner(named[key].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _inner(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _inner(part))), None)


def plain(kind: Any) -> Any:
    """Return a type without what checks its values, as people read it: `tuple[int, ...]`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return plain(parts[0])
    if origin is Literal or not parts:
        return kind
    made = tuple(map(plain, parts))
    return reduce(or_, made) if origin in (Union, UnionType) else origin[made]


def takes(
    options: type[Options], elsewhere: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Function], Function]:
    """Give a function that takes `**options` the signature and the documentation of a model.

    The line `**options:` of its docstring is replaced by a line for each field. A name that is
    neither an argument nor a field is refused with the nearest of both, or with what `elsewhere`
    says of it: where it is given instead.
    """

    def described(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in shape.parameters and name in elsewhere:
                    raise UserError(f"{function.__name__} takes no {name}; {elsewhere[name]}")
                check_one_of("argument", name, shape.parameters, where=function.__name__)
            return function(*args, **given)

        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=plain(field.annotation),
            )
            for name, field in options.model_fields.items()
        ]
        shape = signature.replace(parameters=[*own, *named])
        lines = [
            textwrap.fill(f"{name}: {field.description}", 100, initial_indent=" " * 8,
                          subsequent_indent=" " * 12)
            for name, field in options.model_fields.items()
        ]  # fmt: skip
        kept = (function.__doc__ or "").split("\n")
        at = next(i for i, line in enumerate(kept) if line.lstrip().startswith("**options:"))
        call.__signature__ = shape  # type: ignore[attr-defined]
        call.__doc__ = "\n".join([*kept[:at], *lines, *kept[at + 1 :]])
        return cast(Function, call)

    return described


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """Return `KEY=VALUE` words as options.

    A value that reads as JSON is taken as such, so is a list without its brackets: `1,2,3`; and
    `yes`, `no`, `True` and `False` are true and false.

    Raises:
        UserError: A word has no `=`, or two set the same key.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"--set {word!r} is not KEY=VALUE")
        if key in found:
            raise UserError(f"--set {word!r}: {key} is set already; set it once")
        found[key] = TRUTH.get(value.casefold(), value)
        for text in (value, f"[{value}]") if "," in value else (value,):
            with suppress(ValueError):
                found[key] = json.loads(text)
                break
    return found
