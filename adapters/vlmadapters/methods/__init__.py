"""Methods that adapt a frozen CLIP, by name. Listing them imports no torch; looking one up does."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vlmadapters.methods.code import code_mark
from vlmadapters.methods.config import MethodConfig
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.user_code import is_user_code, load_user_code, packaged

if TYPE_CHECKING:
    from vlmadapters.methods.base import Method

GROUP = "vlmadapters.methods"
M = TypeVar("M", bound="type[Method]")
_MARKS: dict[type, str] = {}  # those of the code of methods that do not ship
# Name to where the method and its settings live; settings import no torch.
BUILT_IN = {
    "zero-shot": ("base:Method", "config:MethodConfig"),
    "mma": ("mma.module:Adapter", "mma.config:MMAConfig"),
    "ivlp": ("ivlp:IVLP", "deep_configs:IVLPConfig"),
    "maple": ("maple:MaPLe", "deep_configs:MaPLeConfig"),
    "rpo": ("rpo:RPO", "deep_configs:RPOConfig"),
    "coop": ("coop:CoOp", "configs:CoOpConfig"),
    "cocoop": ("cocoop:CoCoOp", "configs:CoCoOpConfig"),
    "kgcoop": ("kgcoop:KgCoOp", "configs:KgCoOpConfig"),
    "lasp": ("lasp:LASP", "configs:LASPConfig"),
    "tip": ("tip:Tip", "head_configs:TipConfig"),
    "tip-f": ("tip:TipF", "head_configs:TipFConfig"),
    "linear-probe": ("linear_probe:LinearProbe", "head_configs:LinearProbeConfig"),
    "proda": ("proda:ProDA", "configs:ProDAConfig"),
    "promptsrc": ("promptsrc:PromptSRC", "deep_configs:PromptSRCConfig"),
    "cliplora": ("cliplora:CLIPLoRA", "deep_configs:CLIPLoRAConfig"),
    "lweib": ("lweib:LwEIB", "deep_configs:LwEIBConfig"),
    "clipadapter": ("clipadapter:CLIPAdapter", "head_configs:CLIPAdapterConfig"),
}


class Methods(Mapping[str, "type[Method]"]):
    """The known methods: those that ship, those of installed packages, those registered here.

    A package offers one by an entry point of the group `vlmadapters.methods`. Iteration gives
    names; `METHODS["coop"]` the class; `METHODS.config("coop")` its settings, without torch.
    `METHODS["my_method.py:Mine"]` takes one from a file.
    """

    def __init__(self) -> None:
        self._registered: dict[str, type[Method]] = {}
        self._packaged: dict[str, type[Method]] = {}  # those of packages that were asked for

    def register(self, method: M) -> M:
        """Make a method known under its config's name; usable as a decorator.

        A class that is defined again, as by a cell of a notebook or a file that was edited, takes
        the place of what it was.

        Raises:
            UserError: It is no method, or its name or title is taken by another one.
        """
        _check(method, "what is registered")
        name = method.Config.name
        earlier = self._registered.get(name, method)
        if name in BUILT_IN or _place(earlier) != _place(method):
            raise UserError(f"a method named {name!r} is known already; choose another name")
        self._check_title(method)
        self._registered[name] = method
        return method

    def file(self, name: str) -> Path:
        """Return the file that the class of a method is in; its name where it has none."""
        found = self[name]
        return Path(getattr(sys.modules.get(found.__module__), "__file__", None) or name)

    def code(self, name: str) -> str:
        """Return the mark of the code of a method that does not ship; empty for those that do.

        Of the files of its class, of its settings and of what these inherit from, as they were
        when the method was read; what these import is not looked at.
        """
        if name in BUILT_IN:  # the version of this toolkit stands for it
            return ""
        return _MARKS[self[name]]

    def _offered(self) -> dict[str, str]:
        return {name: point.value for name, point in packaged(GROUP).items()}

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*BUILT_IN, *self._registered, *self._offered()]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return f"Methods({', '.join(self)})"

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def __contains__(self, name: object) -> bool:
        return name in BUILT_IN or name in list(iter(self))

    def __getitem__(self, name: str) -> type[Method]:
        if is_user_code(name):
            return self._from_file(name)
        if (read := self._registered.get(name) or self._packaged.get(name)) is not None:
            return read
        if name in BUILT_IN:  # without a look at all that is installed, ten milliseconds each time
            return _load(f"vlmadapters.methods.{BUILT_IN[name][0]}")
        check_one_of("method", name, list(self))
        return self._from_package(name)

    def _from_package(self, name: str) -> type[Method]:
        """Return a method that an installed package offers, which is known by the name of both."""
        where = self._offered()[name]
        try:
            found: type[Method] = _load(where)
        except Exception as error:
            raise UserError(
                f"the method {name!r} of an installed package cannot be read: {where} fails with "
                f"{type(error).__name__}: {error}"
            ) from error
        _check(found, where)
        if found.Config.name != name:
            raise UserError(
                f"a package offers {where} as the method {name!r}, whose Config is named "
                f"{found.Config.name!r}; give both one name"
            )
        self._check_title(found)
        self._packaged[name] = found
        return found

    def _check_title(self, method: type[Method]) -> None:
        """Refuse a title that is another method's: tables name methods by it alone."""
        own = method.Config
        for name in (*BUILT_IN, *self._registered, *self._packaged):
            if name != own.name and self.config(name).title == own.title:
                raise UserError(
                    f"the method {own.name!r} has the title {own.title!r} of {name!r}, and tables "
                    "could not tell them apart; choose another title"
                )

    def _from_file(self, where: str) -> type[Method]:
        """Return a method of a user's file, registered under its own name from then on."""
        found = load_user_code(where, "method")
        _check(found, where)
        try:
            return self.register(found)
        except UserError as error:
            raise UserError(f"{where}: {error} in its Config") from None

    def config(self, name: str) -> type[MethodConfig]:
        """Return the settings class of a method; for those that ship, without importing torch."""
        if name in BUILT_IN and name not in self._registered:
            return _load(f"vlmadapters.methods.{BUILT_IN[name][1]}")
        return self[name].Config


def _check(found: Any, where: str) -> None:
    from vlmadapters.methods.base import Method  # brings torch

    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"{where} is not a method; it has to be a subclass of vlmadapters.Method")
    # Now, as the file may be edited while what was read of it trains.
    if found not in _MARKS:
        _MARKS[found] = code_mark(found, found.Config)


def _place(method: type[Method]) -> tuple[str, str]:
    """Return what a class that is defined again shares with what it was."""
    return method.__module__, method.__qualname__


def _load(where: str):  # type: ignore[no-untyped-def]
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


METHODS = Methods()


def own_code(configs: Iterable[MethodConfig]) -> dict[str, str]:
    """Return the key `code` of an identity, of methods that do not ship; nothing for others."""
    marks = filter(None, dict.fromkeys(METHODS.code(one.name) for one in configs))
    found = "-".join(marks)
    return {"code": found} if found else {}
