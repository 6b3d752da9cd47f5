"""What the command line does by default is what Python does by default."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest

from vlmadapters.cli.search import search as search_verb
from vlmadapters.cli.validate import validate as validate_verb
from vlmadapters.validation.search import search
from vlmadapters.validation.validate import validate

OTHERWISE = {"model", "datasets", "manifests", "choice", "placement", "out", "method", "scores"}


@pytest.mark.parametrize(("verb", "function"), [(search_verb, search), (validate_verb, validate)])
def test_defaults_are_those_of_the_function(
    verb: Callable[..., Any], function: Callable[..., Any]
) -> None:
    typed, called = signature(verb).parameters, signature(function).parameters
    common = set(typed) & set(called) - OTHERWISE
    assert {"seeds", "recipe", "together", "workers"} <= common
    for name in common:
        given = typed[name].default
        if given is None and called[name].default is not None:
            continue  # left to the function
        assert given == called[name].default, name
