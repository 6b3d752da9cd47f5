"""An option is the same from Python, the command line and a study file: type, default and words."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, get_args

import pytest

import vlmadapters as va
import vlmlayers as vl
from vlmadapters.cli.search import search
from vlmadapters.cli.search_stage import SearchPart
from vlmadapters.cli.train import train
from vlmadapters.cli.train_stage import TrainPart
from vlmadapters.cli.validate import validate
from vlmadapters.cli.validate_stage import ValidatePart
from vlmlayers.cli.measure import extract
from vlmlayers.extraction import WeightsOptions
from vlmlayers.options import Options
from vlmlayers.study.schema import ExtractPart

# A study extracts the same items and prompts of every dataset, Python one split of one.
OWN = {"items", "template", "split"}


@pytest.mark.parametrize(
    ("verb", "function", "table", "some"),
    [
        (extract, vl.extract, ExtractPart, {"spaces", "pooling", "decoding", "workers"}),
        (search, va.search, SearchPart, {"amounts", "criterion", "novel", "seeds"}),
        (train, va.train, TrainPart, {"protocol", "seeds", "together", "items"}),
        (validate, va.validate, ValidatePart, {"kinds", "amount", "folds", "items"}),
    ],
)
def test_an_option_is_the_same_everywhere(
    verb: Callable[..., Any], function: Callable[..., Any], table: type[Options], some: set[str]
) -> None:
    typed, called = signature(verb).parameters, signature(function).parameters
    described = {name for name, field in table.model_fields.items() if field.description}
    common = set(typed) & set(called) & described - (OWN if table is ExtractPart else set())
    assert {*some, "present_only", "skip_unreadable"} <= common
    documented = " ".join((function.__doc__ or "").split())
    for name in common:
        field = table.model_fields[name]
        _, option = get_args(typed[name].annotation)
        assert option.help.startswith(field.description)
        assert f"{name}: {field.description}" in documented
        assert called[name].default == field.default
        # Where several are taken at the command line, help says what stands for those not given.
        assert typed[name].default in (field.default, None)


def test_weights_are_the_same_from_python_and_in_documents() -> None:
    called = signature(vl.load_model).parameters
    defaults = {name: field.default for name, field in WeightsOptions.model_fields.items()}
    assert defaults == {name: called[name].default for name in defaults}
