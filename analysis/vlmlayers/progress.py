"""Progress of long work: rate and time left, on a terminal and in Jupyter, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


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
    from tqdm.notebook import tqdm_notebook

    # In a log file a bar would be thousands of lines.
    seen = issubclass(tqdm, tqdm_notebook) or sys.stderr.isatty()
    return tqdm(
        items,
        desc=description,
        total=total,
        unit=unit,
        disable=not (show and seen),
        dynamic_ncols=True,
        leave=False,
        smoothing=0.1,
        **options,
    )
