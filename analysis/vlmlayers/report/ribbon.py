"""The answer as a picture: one row of blocks per tower, chosen ones filled."""

from __future__ import annotations

from vlmlayers.plots.style import TOWER_COLOURS
from vlmlayers.report.numbers import Answer
from vlmlayers.selection import describe_blocks

WIDTH, LEFT, ROW, HEIGHT = 900, 64, 58, 30


def ribbon(answer: Answer) -> str:
    """Return an SVG: blocks by tower, chosen ones filled, the paper's underlined.

    It holds numbers and names of towers only, nothing that came from a user.
    """
    towers = list(answer.depths)
    alt = "; ".join(
        f"{tower}: blocks {describe_blocks(answer.choice.blocks(tower))} of "
        f"{answer.depths[tower]} chosen"
        for tower in towers
    )
    rows = "".join(_row(answer, tower, 4 + ROW * i) for i, tower in enumerate(towers))
    height = ROW * len(towers) + 22
    key = (
        f'<text x="{LEFT}" y="{height - 6}" font-size="13" fill="#55555e">Filled: chosen. '
        "Line below: the paper’s placement at this depth.</text>"
    )
    return (
        f'<svg class="ribbon" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{alt}" '
        'font-family="system-ui, Segoe UI, Roboto, Arial, sans-serif" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{alt}</title>{rows}{key}</svg>'
    )


def _row(answer: Answer, tower: str, top: int) -> str:
    depth, chosen = answer.depths[tower], answer.choice.blocks(tower)
    colour, paper = TOWER_COLOURS[tower], answer.paper.blocks(tower)
    found = answer.choice.evidence.get("towers", {}).get(tower, {}).get("frequency")
    step = (WIDTH - LEFT - 4) / depth
    parts = [
        f'<text x="0" y="{top + 21}" font-size="16" font-weight="600" fill="{colour}">'
        f"{tower.capitalize()}</text>"
    ]
    for block in range(1, depth + 1):
        x, kept = LEFT + (block - 1) * step, block in chosen
        share = f", chosen in {found[block - 1]:.0%} of resamples" if found else ""
        parts.append(
            f"<g><title>{tower} block {block}: {'chosen' if kept else 'frozen'}{share}</title>"
            f'<rect x="{x + 1.5:.1f}" y="{top}" width="{step - 3:.1f}" height="{HEIGHT}" rx="3" '
            f'fill="{colour if kept else "#ffffff"}" stroke="{colour}" stroke-width="1.2"/>'
            + (
                f'<text x="{x + step / 2:.1f}" y="{top + 20}" font-size="{14 if step > 22 else 11}" '
                f'text-anchor="middle" fill="{"#ffffff" if kept else "#55555e"}">{block}</text>'
                if step > 15
                else ""
            )
            + "</g>"
        )
    if paper:
        first, last = LEFT + (paper[0] - 1) * step + 1.5, LEFT + paper[-1] * step - 1.5
        parts.append(
            f'<rect x="{first:.1f}" y="{top + HEIGHT + 6}" width="{last - first:.1f}" '
            'height="3" fill="#6b6b6b"/>'
        )
    return "".join(parts)
