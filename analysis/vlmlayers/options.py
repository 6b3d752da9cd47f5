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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import Annotated, Any, TypeVar, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticKnownError

from vlmlayers.arguments import plain_number
from vlmlayers.errors import UserError, check_one_of, nearest, shortened

Value = TypeVar("Value")

# What pydantic's errors say in our words; `{…}` comes from the error.
NEEDED = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_type": "a string",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "at least {min_length}",
    "tuple_type": "a list",
    "model_": "a table {{ key = value }}",
    "dict_": "a table {{ key = value }}",
}
KEY = "[key]"  # stands in a place of pydantic's where the key is wrong, not its value
TRUTH = {"true": True, "yes": True, "false": False, "no": False}


class Options(BaseModel):
    """A set of options. A name that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse True where a number is meant: pydantic and Python take it for 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation in (int, float):
            raise PydanticKnownError("int_type" if annotation is int else "float_type")
        return value


Parsed = TypeVar("Parsed", bound=BaseModel)
Function = TypeVar("Function", bound=Callable[..., Any])


def _several(value: Any) -> Any:
    """Take a bare value where several are meant, and any sequence, such as an array."""
    # An array, whose numbers are then Python's, which pydantic takes and JSON can write.
    value = value.tolist() if hasattr(value, "tolist") else value
    return (value,) if isinstance(value, str | bytes | int | float) else value


Several = Annotated[tuple[Value, ...], BeforeValidator(_several)]
Word = Annotated[str, BeforeValidator(plain_number)]


def validated(model: type[Parsed], values: Mapping[str, Any], where: str = "") -> Parsed:
    """Return values as a model.

    Raises:
        UserError: A name is unknown (with the nearest one) or missing, or a value is wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = _explain(error, model)
    except RecursionError:
        problem = "nested too deeply"
    raise UserError(f"{where}: {problem}" if where else problem)


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one problem of a validation error in one line: an unknown name before all others.

    A misspelt name is also missing under its right spelling; the first message is the helpful one.
    """
    problems = error.errors(include_url=False)
    # `min` keeps the first of equals: other problems stay in the order of the document.
    first = min(problems, key=lambda one: one["type"] != "extra_forbidden")
    tail = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    place = ".".join(str(part) for part in first["loc"] if part != KEY)[:120]
    if first["type"] == "extra_forbidden":
        fields = _names(model, first["loc"][:-1])
        close = nearest(str(first["loc"][-1]), fields)
        hint = f"did you mean {close!r}?" if close else f"valid: {', '.join(fields)}"
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
    for kind, needed in NEEDED.items():
        if first["type"].startswith(kind):
            needed = needed.format(**first.get("ctx", {}))
            return f"{place} is {shortened(repr(first['input']))}; {needed} is needed{tail}"
    message = " ".join(first["msg"].removeprefix("Value error, ").split())[:300]
    return (f"{place!r}: {message}" if place else message) + tail


def _names(model: type[BaseModel], place: Sequence[Any]) -> list[str]:
    """Return the names that are valid at a place inside a model."""
    for key in place:
        named = {field.alias or name: field for name, field in model.model_fields.items()}
        if key in named:
            model = _inner(named[key].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _inner(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _inner(part))), None)


def takes(options: type[Options]) -> Callable[[Function], Function]:
    """Give a function that takes `**options` the signature and the documentation of a model.

    The line `**options:` of its docstring is replaced by a line for each field. A name that is
    neither an argument nor a field is refused with the nearest of both.
    """

    def described(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            for name in given:
                check_one_of("argument", name, shape.parameters, where=function.__name__)
            return function(*args, **given)

        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.annotation,
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
        UserError: A word has no `=`.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"--set {word!r} is not KEY=VALUE")
        found[key] = TRUTH.get(value.casefold(), value)
        for text in (value, f"[{value}]") if "," in value else (value,):
            with suppress(ValueError):
                found[key] = json.loads(text)
                break
    return found
