"""Options: one definition, from which checks, signatures and documentation come."""

from __future__ import annotations

import inspect
import re
from itertools import product
from typing import Literal

import numpy as np
import pytest
from pydantic import Field

import vlmlayers as vl
from vlmadapters.cli.search_stage import SearchPart
from vlmadapters.cli.train_stage import TrainPart
from vlmadapters.cli.validate_stage import ValidatePart
from vlmlayers.errors import UserError
from vlmlayers.manifests.schema import Spec
from vlmlayers.options import Options, Several, Word, takes, validated
from vlmlayers.scores import ScoreOptions
from vlmlayers.study.schema import (
    DatasetPart,
    ExtractPart,
    ModelPart,
    ReportPart,
    ScorePart,
    SelectPart,
    Study,
)


class Inner(Options):
    width: int = Field(default=4, ge=1, description="How wide.")


class Outer(Options):
    names: Several[Word] = Field(default=(), description="What to take.")
    kind: Literal["plain", "round"] = Field(default="plain", description="Which.")
    inner: Inner = Field(default=Inner(), description="More.")
    towers: dict[Literal["vision", "text"], int] = Field(default={}, description="By tower.")
    share: float = Field(default=0.5, description="How much.")
    mean: float | tuple[float, ...] | None = Field(default=None, description="Of the channels.")
    size: int | tuple[int, int] = Field(default=1, description="One side, or both.")
    many: tuple[Inner, ...] = Field(default=(), min_length=1, description="Some.")


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
        ({"names": ["a", 3, [], "b"]}, r"names\[2\] is \[\]; a string is needed$"),
        ({"mean": "a"}, "mean is 'a'; a number or a list is needed$"),
        ({"mean": [0.5, "a", 0.5]}, r"file: mean\[1\] is 'a'; a number is needed$"),
        ({"mean": float("nan")}, "mean is nan; a finite number is needed$"),
        ({"mean": [True, 0, 0]}, r"mean\[0\] is True; a number is needed$"),
        ({"size": 1.5}, "size is 1.5; a whole number or a list is needed$"),
        ({"size": True}, "size is True; a whole number or a list is needed$"),
        ({"size": [1, 2, 3]}, r"size is \[1, 2, 3\]; a list of at most 2 is needed$"),
        ({"size": [1, None]}, r"size\[1\] is None; a whole number is needed$"),
        ({"size": [1, 2.0]}, r"size\[1\] is 2.0; a whole number is needed$"),
        ({"size": ["1", 2]}, r"size\[0\] is '1'; a whole number is needed$"),
        ({"size": np.array([1.0, 2.0])}, r"size\[0\] is 1.0; a whole number is needed"),
        ({"size": [1]}, r"the key 'size\[1\]' is missing$"),
        ({"many": []}, r"many is \[\]; a list of at least 1 is needed$"),
        ({"many": [{}, {"width": "x"}]}, r"many\[1\].width is 'x'; a whole number is needed$"),
        ({"many": ["x"]}, r"many\[0\] is 'x'; a table \{ key = value \} is needed$"),
        (
            {"many": [{}, {"wide": 1}], "size": "x"},
            r"unknown key 'many\[1\].wide'.* \(and 1 more\)$",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        validated(Outer, given, "file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"size": np.int64(3)}, 3),
        ({"size": list(np.arange(2))}, (0, 1)),
        ({"size": np.arange(2)}, (0, 1)),
        ({"mean": np.float32(0.5)}, 0.5),
        ({"mean": [np.float32(0.5), 1]}, (0.5, 1.0)),
        ({"towers": {"vision": np.int16(3)}}, {"vision": 3}),
    ],
)
def test_numbers_of_arrays_are_numbers(given: dict[str, object], taken: object) -> None:
    (key,) = given
    found = getattr(validated(Outer, given), key)
    assert found == taken and "numpy" not in repr(found)


def test_a_command_line_gives_text() -> None:
    words = {"size": "3", "share": "0.25", "towers": {"vision": "2"}}
    found = validated(Outer, words, words=True)
    assert (found.size, found.share, found.towers) == (3, 0.25, {"vision": 2})
    with pytest.raises(UserError, match="a whole number"):
        validated(Outer, words)


THEIRS = re.compile(
    r"Input|should|valid (str|num|int)|pydantic|function-|tuple|\.(float|int|str)\b|lax-or|after v"
)
WRONG = (
    "nosuch", "", True, -1, 1.5, float("nan"), float("inf"), 10**30, [], [[]], [3], [True], [None],
    ["nosuch", 3], {}, {"a": 1}, {"train": "x"}, {"vision": "x"}, None, [{}], b"x",
)  # fmt: skip
READ = [
    (Study, {"models": [{"name": "a"}], "datasets": ["b"]}),
    (ModelPart, {"name": "a"}),
    (DatasetPart, {"name": "a"}),
    (Spec, {"title": "a", "layout": "folder"}),
    *((part, {}) for part in (ExtractPart, ScorePart, SelectPart, ReportPart, ScoreOptions)),
    *((part, {}) for part in (TrainPart, ValidatePart, SearchPart)),
]


@pytest.mark.parametrize(("model", "least"), READ, ids=lambda one: getattr(one, "__name__", ""))
def test_what_any_document_says_wrong_is_said_in_our_words_and_at_its_key(
    model: type[Options], least: dict[str, object]
) -> None:
    refused = 0
    for field, wrong in product(model.model_fields, WRONG):
        key = model.model_fields[field].alias or field
        try:
            validated(model, {**least, key: wrong}, "file")
        except UserError as error:
            message, refused = str(error), refused + 1
            said = f"{key} " in message or f"{key}[" in message or f"{key}." in message
            assert said or f"unknown {key.removesuffix('s')} " in message or f"'{key}'" in message
            assert not THEIRS.search(message) and "\n" not in message, message
    assert refused > 5 * len(model.model_fields)


def test_a_function_shows_the_options_that_it_takes() -> None:
    @takes(Outer)
    def work(first: int, *, last: int = 3, **options: object) -> None:
        """Do something.

        Args:
            first: Where to start.
            **options: Those of `Outer`.
        """

    assert list(inspect.signature(work).parameters) == [
        "first", "last", "names", "kind", "inner", "towers", "share", "mean", "size", "many",
    ]  # fmt: skip
    assert "share: How much." in (work.__doc__ or "") and "**options" not in (work.__doc__ or "")
    shown = inspect.signature(vl.score).parameters
    assert shown["bootstrap"].default == 200 and "held_out: Folds" in (vl.score.__doc__ or "")
    # As Jupyter shows it: what is taken, without what checks it.
    text = str(inspect.signature(vl.score))
    assert "seeds: tuple[int, ...] = (1, 2, 3)" in text and "spaces: tuple[str, ...] | None" in text
    assert "Validator" not in text and "FieldInfo" not in text
