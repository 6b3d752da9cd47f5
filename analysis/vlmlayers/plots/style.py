"""The one style of all figures: legible in one column, safe for colour-blind readers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, shortened
from vlmlayers.positions import is_block
from vlmlayers.progress import switched_on
from vlmlayers.words import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMN_WIDTH = 3.35
NAME = 18  # most letters of a name beside or above axes; longer ones crowd out the plot
_UNSEEN: ContextVar[bool] = ContextVar("unseen", default=False)
TOWER_COLOURS = {"vision": "#0072B2", "text": "#B34700"}
TOWER_MARKERS = {"vision": "o", "text": "s"}
# Okabe and Ito's palette, darkened where needed for lines on white.
CATEGORY_COLOURS = (
    "#0072B2", "#B34700", "#007E5D", "#B5568F", "#8A6D00", "#2F8FC4", "#4D4D4D", "#7A3E9D",
    "#9C2F2F", "#5B7F00",
)  # fmt: skip
CATEGORY_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
SCRIPTS = (  # fonts of other scripts, used where they are installed
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP",
    "WenQuanYi Zen Hei", "Arial Unicode MS", "PingFang SC", "Hiragino Sans", "Microsoft YaHei",
    "Malgun Gothic", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari",
    "Noto Sans Thai", "Noto Sans Bengali", "Noto Sans Tamil", "Nirmala UI", "Segoe UI",
    "Noto Emoji", "Segoe UI Emoji", "Symbola",
)  # fmt: skip
OPEN_ALPHA = 0.3  # of marks of blocks on which resamples disagree
CHANCE_COLOUR = "#6B6B6B"
RANDOM_COLOUR = "#9C2F2F"  # of the words that say so of an untrained backbone
# Even in lightness: it reads the same in grey and for colour-blind readers.
SEQUENTIAL = "cividis"
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.2,
    # What a user's own style may turn on and means nothing here: between blocks there is none.
    "lines.marker": "None",
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "image.origin": "upper",
    "legend.frameon": False,
    "figure.figsize": (COLUMN_WIDTH, 2.4),
    "figure.dpi": 110,
    "savefig.dpi": 220,
    "figure.constrained_layout.use": True,
    # Text stays text, to be searched and edited; without a salt the ids of two files would differ.
    "svg.fonttype": "none",
    "svg.hashsalt": "vlmlayers",
    # TrueType, since many publishers refuse Type 3, the default.
    "pdf.fonttype": 42,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw inside this context in the shared style."""
    import matplotlib as mpl

    options: Any = {**STYLE, "font.sans-serif": list(_fonts())}
    with mpl.rc_context(options):
        try:
            yield
        finally:
            # The first figure of a notebook loads its backend, which turns interactive mode on;
            # leaving the context must not turn it off, or no later figure is shown.
            interactive = mpl.is_interactive()
    mpl.interactive(interactive)


def colours_of(palette: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the colour of each name in a palette as seaborn takes it.

    Raises:
        UserError: It is no palette, or has no colour for one of the names.
    """
    import seaborn as sns

    if isinstance(palette, Mapping):
        for name in names:
            if name not in palette:
                known = shortened(", ".join(map(str, palette)))
                raise UserError(f"palette has no colour for {name!r}; it has {known}")
        palette = [palette[name] for name in names]
    try:
        colours = sns.color_palette(palette, len(names))
    except (TypeError, ValueError):
        raise UserError(
            "palette takes the name of one of seaborn's, colours, or a mapping to colours, not "
            f"{shortened(repr(palette))}"
        ) from None
    if isinstance(palette, list | tuple) and len(palette) < len(names):  # seaborn starts over
        raise UserError(
            f"palette has {counted(len(palette), 'colour')}, and there are {len(names)} to colour: "
            f"{shortened(', '.join(names))}"
        )
    return dict(zip(names, colours))


def axes(ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
    """Return `ax`, or the axes of a new figure in the shared style.

    A new figure is known to pyplot only in a notebook or an interactive session: elsewhere pyplot
    would keep every figure alive.
    """
    return _new_axes(1, size)[0] if ax is None else ax


def new_grid(panels: int, side: float) -> Any:
    """Return axes of a new figure side by side, (panel,), each `side` inches wide."""
    return _new_axes(panels, (side * panels + 0.8, side + 0.3))


def _new_axes(panels: int, size: tuple[float, float] | None) -> Any:
    if _is_interactive():
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=size, layout="constrained")
    else:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        # Without pyplot nothing else gives the figure a canvas that can draw.
        FigureCanvasAgg(figure)
    return figure.subplots(1, panels, squeeze=False)[0]


@lru_cache(maxsize=1)
def _fonts() -> tuple[str, ...]:
    """Return the font families: the default, then those of other scripts that are installed."""
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in SCRIPTS if name in there))


@lru_cache(maxsize=1)
def _drawable() -> frozenset[int]:
    """Return the code points that the fonts have a shape for."""
    from matplotlib import font_manager, ft2font

    paths = [font_manager.findfont(name, fallback_to_default=False) for name in _fonts()]
    return frozenset(code for path in paths for code in ft2font.FT2Font(path).get_charmap())


def label_text(text: str, among: Iterable[str] = ()) -> str:
    """Return text that matplotlib draws as it is: no mathematics, no hidden label, no warning.

    A letter that no font here has is drawn as a box; where several names look the same then, they
    are numbered.

    Args:
        text: Any text, such as a class name in any script.
        among: The texts that stand beside it, this one included.
    """
    known = _drawable()

    def drawn(name: str) -> str:
        # Matplotlib leaves a label out of the legend that begins with an underscore.
        return "".join(c if ord(c) in known or c.isspace() else "□" for c in name).lstrip("_")

    made = drawn(text)
    alike = [name for name in dict.fromkeys(among) if drawn(name) == made]
    if len(alike) > 1 and made != text:
        made += f" ({alike.index(text) + 1})"
    return made.replace("$", r"\$") or "□"


def short_names(names: Sequence[str], most: int = NAME) -> list[str]:
    """Return names of `most` characters at most, of which none is like another for being cut.

    Names are as `label_text` returns them: no cut parts a `$` from what keeps it from mathematics.
    """
    ways: list[Callable[[str, int], str]] = [
        lambda name, row: shortened(name, most),
        lambda name, row: shortened(name, most - most // 2) + name[-(most // 2) :],
        lambda name, row: f"{shortened(name, most - 5)} ({row})",
    ]
    plain = [name.replace(r"\$", "$") for name in names]
    made: list[str] = []
    for way in ways:
        made = [
            way(text, row).replace("$", r"\$") if len(text) > most else name
            for row, (name, text) in enumerate(zip(names, plain), 1)
        ]
        if len(set(made)) == len(set(names)):
            break
    return made


def unseen() -> AbstractContextManager[None]:
    """Draw figures to be saved, not shown, also in a notebook."""
    return switched_on(_UNSEEN)


def _is_interactive() -> bool:
    """Tell a notebook or an interactive session from a script or a command.

    `isinteractive()` alone does not tell a notebook: it is False there until pyplot has made
    its first figure.
    """
    import matplotlib as mpl

    if _UNSEEN.get():
        return False
    ipython = sys.modules.get("IPython")
    return mpl.is_interactive() or (ipython is not None and ipython.get_ipython() is not None)


def position_label(position: str) -> str:
    """Return the tick label of a position."""
    return position if is_block(position) else position.capitalize()


def position_title(position: str) -> str:
    """Return the title of a panel of one position."""
    return f"Block {position}" if is_block(position) else position_label(position)


def sparse_labels(positions: Iterable[str], most: int = 14) -> list[str]:
    """Return tick labels, with every second block or more left blank where there are many."""
    names = list(positions)
    step = max(1, -(-sum(map(is_block, names)) // most))
    return [
        position_label(p) if not is_block(p) or (int(p) % step == 0 or step == 1) else ""
        for p in names
    ]


def category(index: int) -> dict[str, Any]:
    """Return colour and dash of the n-th category; both differ, for prints in grey.

    Fifty have looks of their own.
    """
    again, colour = divmod(index, len(CATEGORY_COLOURS))
    return {
        "color": CATEGORY_COLOURS[colour],
        # One further in each round of colours: a round is a whole number of rounds of dashes.
        "linestyle": CATEGORY_DASHES[(index // 2 + again) % len(CATEGORY_DASHES)],
    }


@checked
def axis_label(metric: str) -> str:
    """Return the axis label that the METRICS table declares, or the name in words."""
    label = str(declared(metric, "axis_label", metric.replace("_", " ")))
    return label[:1].upper() + label[1:]


def declared(metric: str, field: str, default: Any) -> Any:
    """Return a field of a metric's declaration, or `default` where it declares none."""
    from vlmlayers.metrics.table import find_metric

    found = find_metric(metric)
    if found is None:
        return default
    value = getattr(found, field, None)
    return default if value in (None, "") else value


def ink(ax: Axes, dark: str) -> str:
    """Return a dark colour, or that of the text of axes where it is light, as on dark grounds."""
    from matplotlib.colors import to_rgb

    text: Any = ax.xaxis.label.get_color()
    return text if sum(to_rgb(text)) > 1.5 else dark


def mark_random(ax: Axes, random_weights: bool) -> Axes:
    """Write above the axes that the backbone is untrained, where it is.

    Where a legend stands above the axes, it carries the words.
    """
    if not random_weights:
        return ax
    words = "random weights"
    look: dict[str, Any] = {"fontsize": 7, "fontweight": "bold", "color": RANDOM_COLOUR}
    legend = ax.get_legend()
    if legend is not None and legend.get_bbox_to_anchor().width == 0:  # anchored to a point above
        legend.set_title(words)
        legend.get_title().update(look)
    else:
        ax.set_title(words, loc="right", **look)
    return ax
