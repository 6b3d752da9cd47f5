"""Tables as plain text for the terminal, within 80 columns, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

WIDTH = 80
UNTRAINED = "RANDOM WEIGHTS, nothing here says anything about a trained model"
_END = re.compile(r"[(\[]|[)\]]|; |\. (?=[A-Z])")  # of a clause, where no bracket is open
_MANY, _SHORT = 4, 40  # clauses of a text that are read one by one; letters of one that is none


def text_table(rows: Sequence[Mapping[Any, Any]], widths: Mapping[str, int] | None = None) -> str:
    """Return rows of the same columns as aligned text; those in `widths` are cut with an ellipsis.

    Numbers stand to the right, words to the left; missing values are blank.
    """
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    cells = {name: [_cell(value) for value in values] for name, values in columns.items()}
    for name, width in (widths or {}).items():
        if name in cells:
            cells[name] = [v if len(v) <= width else v[: width - 1] + "…" for v in cells[name]]
    lines = []
    numeric = {
        name: all(value is None or isinstance(value, Real) for value in values)
        for name, values in columns.items()
    }
    size = {
        name: max([len(str(name)), *(len(v) for v in values)]) for name, values in cells.items()
    }
    for row in range(-1, len(rows)):
        words = [str(name) if row < 0 else cells[name][row] for name in cells]
        parts = [w.rjust(size[n]) if numeric[n] else w.ljust(size[n]) for w, n in zip(words, cells)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """Return a number of things in words: `1 step`, `2 steps`, `1,000 classes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table with every cell escaped."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(escape_markdown(_cell(cell)) for cell in cells) + " |"

    rule = "|" + "|".join("---" for _ in headings) + "|"
    return "\n".join([line(headings), rule, *(line(row) for row in rows)])


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, HTML included."""
    plain = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
    # The backslash first, or those that escape the other marks would be escaped in turn.
    for mark in "\\|*_`[]":
        plain = plain.replace(mark, "\\" + mark)
    return plain


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def inside(sentence: str) -> str:
    """Return a sentence as it stands inside another: a small first letter, but of abbreviations."""
    return sentence if sentence[1:2].isupper() else sentence[:1].lower() + sentence[1:]


def percent(*shares: float) -> str:
    """Return shares of one in words: `40 %`, or `25–60 %` from the smallest to the largest.

    Only none of all is 0 %, and only all of them 100 %.
    """
    return "–".join(dict.fromkeys(map(_whole, (min(shares), max(shares))))) + " %"


def interval(low: float, high: float) -> str:
    """Return an interval to three decimals, `[-0.005, 0.031]`.

    A bound beside 0 has as many more, up to six, as say on which side it lies: `[0.0001, 0.043]`.
    """
    return f"[{_bound(low)}, {_bound(high)}]"


def _bound(value: float) -> str:
    if not 0.5e-6 < abs(value) < 0.5e-3:
        return f"{value:z.3f}"
    return next(said for n in (4, 5, 6) if float(said := f"{value:.{n}f}"))


def _whole(share: float) -> str:
    if 0 < share <= 0.005:  # half a percent itself is rounded to none
        return "< 1"
    return "> 99" if 0.995 <= share < 1 else f"{100 * share:.0f}"


def clauses(text: str) -> list[str]:
    """Return the clauses of a long text, one each; a short one as it is."""
    found, begin, depth = [""], 0, 0
    for match in [*_END.finditer(text), None]:
        mark, end = (match.group(), match.end()) if match else ("", len(text))
        depth = max(0, depth + (mark in ("(", "[")) - (mark in (")", "]")))
        if match and (mark.strip() not in (";", ".") or depth):
            continue
        clause, begin = text[begin:end], end
        if found[-1] and len(clause) < _SHORT:
            found[-1] += clause
        else:
            found.append(clause)
    parts = [one.strip().rstrip(";.") for one in found[1:]]
    return parts if len(parts) >= _MANY else [text]
