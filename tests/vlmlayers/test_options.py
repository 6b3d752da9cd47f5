"""Options: one definition, from which checks, signatures and documentation come."""

from __future__ import annotations

import inspect
from typing import Literal

import numpy as np
import pytest
from pydantic import Field

import vlmlayers as vl
from vlmlayers.errors import UserError
from vlmlayers.options import Options, Several, Word, takes, validated


class Inner(Options):
    width: int = Field(default=4, ge=1, description="How wide.")


class Outer(Options):
    names: Several[Word] = Field(default=(), description="What to take.")
    kind: Literal["plain", "round"] = Field(default="plain", description="Which.")
    inner: Inner = Field(default=Inner(), description="More.")
    towers: dict[Literal["vision", "text"], int] = Field(default={}, description="By tower.")
    share: float = Field(default=0.5, description="How much.")


@pytest.mark.parametrize("given", ["2", 2, ["2"], ("2",), np.array([2]), np.int64(2)])
def test_a_bare_value_is_taken_where_several_are_meant(given: object) -> None:
    assert validated(Outer, {"names": given}).names == ("2",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nams": 1}, "file: unknown key 'nams'; did you mean 'names'"),
        ({"inner": {"widht": 1}}, "unknown key 'inner.widht'; did you mean 'width'"),
        ({"inner": {"width": 0}}, "inner.width is 0; at least 1 is needed"),
        ({"inner": {"width": 1.5}}, "inner.width is 1.5; a whole number is needed"),
        ({"kind": "rond"}, "unknown kind 'rond'; did you mean 'round'"),
        ({"kind": 3, "share": "x"}, r"unknown kind 3; valid: 'plain' or 'round' \(and 1 more\)"),
        ({"share": "much"}, "share is 'much'; a number is needed"),
        ({"inner": 3}, r"inner is 3; a table \{ key = value \} is needed"),
        ({"towers": 3}, r"towers is 3; a table \{ key = value \} is needed"),
        ({"towers": {"vison": 3}}, "unknown key 'towers.vison'; did you mean 'vision'"),
        ({"towers": {"vision": "x"}}, "towers.vision is 'x'; a whole number is needed"),
        ({"names": object()}, "names is .*; a list is needed"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        validated(Outer, given, "file")
    assert "\n" not in str(caught.value)


def test_a_function_shows_the_options_that_it_takes() -> None:
    @takes(Outer)
    def work(first: int, *, last: int = 3, **options: object) -> None:
        """Do something.

        Args:
            first: Where to start.
            **options: Those of `Outer`.
        """

    assert list(inspect.signature(work).parameters) == [
        "first", "last", "names", "kind", "inner", "towers", "share",
    ]  # fmt: skip
    assert "share: How much." in (work.__doc__ or "") and "**options" not in (work.__doc__ or "")
    shown = inspect.signature(vl.score).parameters
    assert shown["bootstrap"].default == 200 and "held_out: Folds" in (vl.score.__doc__ or "")
