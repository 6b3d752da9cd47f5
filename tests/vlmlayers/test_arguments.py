"""Arguments of public functions: what is taken, in which form, and the line for what is not."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

import vlmadapters
import vlmlayers
from vlmlayers import arguments
from vlmlayers.arguments import Count, Position, Takes, checked
from vlmlayers.errors import UserError


@checked
def measure(
    names: Sequence[str],
    *,
    positions: Sequence[Position] | None = None,
    seeds: Sequence[int] = (1, 2, 3),
    k: Count = 10,
    share: Annotated[float, Takes(least=0, most=1)] = 0.5,
    balance: Literal["equal", "weights"] = "equal",
    folder: Path | None = None,
    name: str | Path = "x",
    widths: Mapping[str, int] | None = None,
    items: int | Sequence[Path] | None = None,
    stream: Iterable[int] = (),
    function: Callable[..., Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    return dict(locals())


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"names": "abc"}, ("abc",)),
        ({"names": ["a", np.str_("b")]}, ("a", "b")),
        ({"names": (c for c in "ab")}, ("a", "b")),
        ({"names": np.array(["a", "b"])}, ("a", "b")),
        ({"names": {"b", "a"}}, ("a", "b")),
        ({"positions": "12"}, ("12",)),
        ({"positions": 12}, ("12",)),
        ({"positions": [1, np.int64(2), "embed"]}, ("1", "2", "embed")),
        ({"positions": None}, None),
        ({"seeds": 1}, (1,)),
        ({"seeds": np.int32(4)}, (4,)),
        ({"seeds": range(2)}, (0, 1)),
        ({"seeds": np.arange(2)}, (0, 1)),
        ({"seeds": []}, ()),
        ({"k": np.int64(3)}, 3),
        ({"share": np.float32(0.25)}, 0.25),
        ({"share": 1}, 1),
        ({"balance": "weights"}, "weights"),
        ({"folder": "a/b"}, Path("a/b")),
        ({"name": Path("a")}, Path("a")),
        ({"folder": "~/a"}, Path.home() / "a"),
        ({"name": Path("~/a")}, Path.home() / "a"),
        ({"name": "~/a"}, str(Path.home() / "a")),
        ({"name": "~nobody of that name/a"}, "~nobody of that name/a"),
        ({"widths": {"vision": np.int64(8)}}, {"vision": 8}),
        ({"items": np.uint8(8)}, 8),
        ({"items": "a.jpg"}, (Path("a.jpg"),)),
        ({"items": ["a.jpg", Path("b")]}, (Path("a.jpg"), Path("b"))),
        ({"stream": 3}, (3,)),
        ({"function": len}, len),
        ({"quiet": np.True_}, True),
        ({"quiet": 0}, False),
    ],
)
def test_what_is_taken_and_in_which_form(given: dict[str, Any], taken: Any) -> None:
    (name,) = given
    received = measure(**{"names": "a", **given})[name]
    assert received == taken and type(received) is type(taken)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"names": 3}, "measure: names takes strings, not 3"),
        ({"names": {"a": 1}}, "measure: names takes strings, not a value of type dict"),
        ({"names": ["a", None]}, "measure: names takes strings, not None"),
        ({"seeds": "123"}, "measure: seeds takes whole numbers, not '123'"),
        ({"seeds": 1.0}, "measure: seeds takes whole numbers, not 1.0"),
        ({"seeds": [1, True]}, "measure: seeds takes whole numbers, not True"),
        ({"k": 0}, "measure: k takes a whole number from 1, not 0"),
        ({"k": "5"}, "measure: k takes a whole number from 1, not '5'"),
        ({"k": None}, "measure: k takes a whole number from 1, not None"),
        ({"share": float("nan")}, "measure: share takes a number from 0 to 1, not nan"),
        ({"share": 1.5}, "measure: share takes a number from 0 to 1, not 1.5"),
        (
            {"share": np.zeros(2)},
            "measure: share takes a number from 0 to 1, not a value of type ndarray",
        ),
        ({"balance": "equl"}, "measure: balance takes 'equal' or 'weights', not 'equl'"),
        ({"folder": 5}, "measure: folder takes a path or None, not 5"),
        ({"name": 5}, "measure: name takes a string or a path, not 5"),
        ({"folder": ""}, "measure: folder takes a path or None, not ''"),
        ({"name": ""}, "measure: name takes a string or a path, not ''"),
        ({"widths": [1]}, "measure: widths takes a mapping from strings to whole numbers or None"),
        ({"items": 2.5}, "measure: items takes a whole number or paths or None, not 2.5"),
        ({"positions": 1.5}, "measure: positions takes positions or None, not 1.5"),
        ({"function": "len"}, "measure: function takes a function or None, not 'len'"),
        ({"quiet": "no"}, "measure: quiet takes True or False, not 'no'"),
        ({"seed": 1}, "unknown argument 'seed' in measure; did you mean 'seeds'?"),
        ({"names": "x" * 500}, None),
        ({"names": b"x" * 500}, "measure: names takes strings, not b'xxx"),
    ],
)
def test_what_is_refused_in_one_line(given: dict[str, Any], line: str | None) -> None:
    arguments = {"names": "a", **given}
    if line is None:
        assert measure(**arguments)
        return
    with pytest.raises(UserError) as caught:
        measure(**arguments)
    assert str(caught.value).startswith(line) and len(str(caught.value)) < 200


def test_calls_that_do_not_fit_the_signature() -> None:
    with pytest.raises(UserError, match="measure needs names: strings"):
        measure()  # type: ignore[call-arg]
    with pytest.raises(UserError, match="takes 1 arguments by place, not 2; the others go by name"):
        measure("a", "b")  # type: ignore[call-arg,misc]
    with pytest.raises(UserError, match="multiple values for argument 'names'"):
        measure("a", names="b")  # type: ignore[misc]


def test_an_iterator_that_may_be_long_is_not_taken_in() -> None:
    endless = iter(int, 1)
    assert measure("a", stream=endless)["stream"] is endless


def test_methods_and_dataclasses_are_checked_as_functions_are() -> None:
    @checked
    @dataclass(frozen=True)
    class Settings:
        blocks: tuple[int, ...] = ()
        rate: float = 0.1

        @classmethod
        @checked
        def span(cls, first: int, last: int, **options: Any) -> Settings:
            return cls(tuple(range(first, last + 1)), **options)

    assert Settings(np.arange(2)).blocks == (0, 1)  # type: ignore[arg-type]
    assert Settings.span(np.int64(1), 2, rate=1) == Settings((1, 2), 1)
    with pytest.raises(UserError, match="Settings: blocks takes whole numbers, not '5-12'"):
        Settings("5-12")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown argument 'rte' in Settings; did you mean 'rate'"):
        Settings.span(1, 2, rte=1)
    with pytest.raises(UserError, match=r"Settings.span: first takes a whole number, not 'a'"):
        Settings.span("a", 2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"Settings.span needs last: a whole number"):
        Settings.span(1)  # type: ignore[call-arg]


CALL = (arguments.__file__, "call")  # where a call of a checked function goes first


def _checked_functions() -> list[tuple[str, Callable[..., Any]]]:
    """Every function, method and class of both packages whose arguments are checked."""
    found: dict[str, Callable[..., Any]] = {}
    for package in (vlmadapters, vlmlayers):
        for entry in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if entry.name.endswith("__main__"):
                continue
            module = importlib.import_module(entry.name)
            owners = [o for o in vars(module).values() if inspect.isclass(o)]
            for owner in [module, *(o for o in owners if o.__module__ == entry.name)]:
                for member in vars(owner).values():
                    function = getattr(member, "__func__", member)
                    code = getattr(function, "__code__", None)
                    if (getattr(code, "co_filename", ""), getattr(code, "co_name", "")) == CALL:
                        found[f"{function.__module__}.{function.__qualname__}"] = function
    return sorted(found.items())


def test_the_annotations_of_every_checked_function_can_be_evaluated() -> None:
    functions = _checked_functions()
    assert len(functions) > 100
    for name, function in functions:
        with pytest.raises(UserError, match="by place|takes|unknown argument"):
            function(*[object()] * 60)
            pytest.fail(f"{name} took 60 arguments")


@pytest.mark.parametrize(
    "module",
    ["", "features", "figures", "metrics", "models", "plots", "report", "selection", "study"],
)
def test_every_public_function_is_checked(module: str) -> None:
    home = importlib.import_module(f"vlmlayers.{module}".rstrip("."))
    for name in home.__all__:
        function = getattr(home, name)
        if inspect.isfunction(function) and inspect.signature(function).parameters:
            with pytest.raises(UserError, match="unknown argument 'nonsense'|by place"):
                function(*[object()] * 60, nonsense=1)
