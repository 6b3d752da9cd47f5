"""Progress of long work: rate and time left, on a terminal and in Jupyter, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from logging import Logger
from typing import Any, TypeVar

T = TypeVar("T")
_HIDDEN = ContextVar("hidden", default=False)


@contextmanager
def switched_on(switch: ContextVar[bool]) -> Iterator[None]:
    """Have a switch on meanwhile."""
    token = switch.set(True)
    try:
        yield
    finally:
        switch.reset(token)


def hidden() -> AbstractContextManager[None]:
    """Hide all progress meanwhile, whatever the functions that are called would show."""
    return switched_on(_HIDDEN)


def is_hidden() -> bool:
    """Return whether progress is hidden at the moment."""
    return _HIDDEN.get()


def say(line: str) -> None:
    """Say on standard error what is waited for without a bar, unless progress is hidden."""
    from tqdm import tqdm

    if not is_hidden():
        tqdm.write(line, file=sys.stderr)


@contextmanager
def timed(log: Logger, what: str) -> Iterator[None]:
    """Log at level DEBUG how many seconds something took, also where it failed."""
    began = time.perf_counter()
    try:
        yield
    finally:
        log.debug("%s took %.2f s", what, time.perf_counter() - began)


def track(
    items: Iterable[T],
    description: str,
    *,
    total: int | None = None,
    unit: str = "it",
    show: bool = True,
    **options: Any,
) -> Iterator[T]:
    """Iterate over `items` under a progress bar.

    Args:
        items: What to iterate over.
        description: Short words before the bar.
        total: Number of items where `len(items)` is not known.
        unit: Name of one item in the rate, such as "image".
        show: False hides the bar.
        **options: Passed to `tqdm`.
    """
    return iter(bar(items, description, total=total, unit=unit, show=show, **options))


def bar(
    items: Iterable[Any] | None = None,
    description: str = "",
    *,
    total: int | None = None,
    unit: str = "it",
    show: bool = True,
    **options: Any,
) -> Any:
    """Return a tqdm bar that suits where it is shown: a terminal, or a widget in Jupyter.

    It is hidden where output goes into a file or a pipe.
    """
    from tqdm.auto import tqdm

    # Imported where tqdm shows widgets, and nowhere else: IPython takes a fifth of a second.
    notebook: Any = sys.modules.get("tqdm.notebook")
    widget = notebook is not None and issubclass(tqdm, notebook.tqdm_notebook)
    # In a log file a bar would be thousands of lines.
    seen = show and (widget or sys.stderr.isatty()) and not is_hidden()
    if widget:
        options["display"] = False
    made = tqdm(
        items,
        desc=description,
        total=total,
        unit=unit,
        disable=not seen,
        dynamic_ncols=True,
        leave=False,
        smoothing=0.1,
        **options,
    )
    if widget and seen:
        _show_until_done(made, notebook.display)
    return made


def _show_until_done(made: Any, display: Callable[..., Any]) -> None:
    """Show a bar in a notebook, and leave nothing of it once it is done.

    A saved notebook keeps the text beside each widget, which is that of the first moment: 0 %.
    """
    shown, close = display(made.container, display_id=True), made.close

    def close_and_clear() -> None:
        closed = made.disable
        close()
        if not closed and not (made.total and made.n < made.total):  # else it says where it stopped
            shown.update({"text/plain": ""}, raw=True)

    made.close = close_and_clear
