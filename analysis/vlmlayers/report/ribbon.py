"""The ribbon of a report's answer: a row of blocks per tower, in three tints."""

from __future__ import annotations

from vlmlayers.placement import describe_blocks
from vlmlayers.report.numbers import Answer
from vlmlayers.words import percent

PAPER = "Line below: the paper’s placement at this depth."
KEY = f"Full colour: firm. Pale: open, framed where the rule chose it. White: frozen. {PAPER}"
FIXED_KEY = f"Filled: chosen by the rule. {PAPER}"


def ribbon(answer: Answer) -> str:
    """Return HTML: blocks by tower, tinted by how they stand, the paper's underlined.

    It holds numbers and names of towers only, nothing that came from a user.
    """
    alt = "; ".join(
        f"{tower}: blocks {describe_blocks(answer.choice.blocks(tower))} of {depth} chosen"
        for tower, depth in answer.depths.items()
    )
    lanes = "".join(_lane(answer, tower) for tower in answer.depths)
    fixed = any("fixed" in answer.standing(tower) for tower in answer.depths)
    key = FIXED_KEY if fixed else KEY
    return f'<div class="ribbon" role="img" aria-label="{alt}">{lanes}<small>{key}</small></div>'


def _lane(answer: Answer, tower: str) -> str:
    depth, chosen = answer.depths[tower], answer.choice.blocks(tower)
    found = answer.choice.evidence.get("towers", {}).get(tower, {}).get("frequency")
    cells = []
    for block, how in enumerate(answer.standing(tower), 1):
        words = f"{tower} block {block}: {'chosen' if block in chosen else 'not chosen'}, {how}"
        words += f", chosen in {percent(found[block - 1])} of resamples" if found else ""
        kind = how + (" chosen" if block in chosen else "")
        kind += " paper" if block in answer.paper.blocks(tower) else ""
        cells.append(f'<i class="{kind}" title="{words}">{block}</i>')
    # Beyond 16 blocks their numbers do not fit at full size.
    size = " dense" if depth > 16 else ""
    return (
        f'<div class="lane {tower}{size}"><b>{tower.capitalize()}</b>'
        f'<div style="grid-template-columns: repeat({depth}, 1fr)">{"".join(cells)}</div></div>'
    )
