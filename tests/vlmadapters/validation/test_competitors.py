from __future__ import annotations

import pytest

from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.validation.competitors import KINDS, competitors, scaled_block, scaled_start
from vlmlayers.errors import UserError
from vlmlayers.placement import Placement
from vlmlayers.selection import paper_blocks

TWELVE = {"vision": 12, "text": 12}
CHOSEN = Placement.span(6, 12)


def test_start_sweep_covers_every_start_block_and_names_what_coincides() -> None:
    found = {
        str(c.placement): c.kind for c in competitors(CHOSEN, TWELVE, ["start", "paper", "all"])
    }
    assert set(found) == {f"v{s}-12,t{s}-12" for s in range(1, 12)} | {"v12,t12"}
    assert found["v6-12,t6-12"] == "chosen+start"
    assert found["v5-12,t5-12"] == "start+paper"
    assert found["v1-12,t1-12"] == "start+all"


@pytest.mark.parametrize(("vision", "text"), [(12, 12), (24, 12), (12, 24), (7, 3)])
def test_every_placement_lies_in_its_towers_and_is_listed_once(vision: int, text: int) -> None:
    depths = {"vision": vision, "text": text}
    chosen = Placement((vision,), (text - 1, text))
    found = competitors(chosen, depths, KINDS)
    assert len({c.placement for c in found}) == len(found)
    for c in found:
        assert c.placement.check(depths)


def test_paper_scales_to_24_blocks_and_unequal_towers() -> None:
    paper = [
        c for c in competitors(CHOSEN, {"vision": 24, "text": 12}, ["paper"]) if "paper" in c.kind
    ]
    assert str(paper[0].placement) == "v9-24,t5-12"


def test_random_placements_repeat_and_pair_where_the_choice_does() -> None:
    draw = [c for c in competitors(CHOSEN, TWELVE, ["random"], random_count=5, seed=3)]
    again = [c for c in competitors(CHOSEN, TWELVE, ["random"], random_count=5, seed=3)]
    assert draw == again
    assert len(draw) == 6
    assert all(len(c.placement.vision) == 7 for c in draw)
    assert all(c.placement.vision == c.placement.text for c in draw)


@pytest.mark.parametrize(
    ("depths", "vision", "text"),
    [
        ((12, 12), range(5, 13), range(8, 13)),
        ((12, 12), range(1, 7), range(7, 13)),
        ((24, 12), range(5, 25), range(1, 5)),
        ((12, 24), (3, 9), range(3, 25)),
        ((24, 12), range(1, 25), range(1, 13)),
    ],
)
def test_random_placements_cost_what_the_choice_costs(
    depths: tuple[int, int], vision: range, text: range
) -> None:
    """By the count of parameters, in which a block of both towers has one middle layer."""
    chosen = Placement(tuple(vision), tuple(text))
    widths = {"vision": 128, "text": 96}
    both = dict(zip(("vision", "text"), depths))
    found = competitors(chosen, both, ["random"], random_count=20, seed=1)
    costs = {MMAConfig(*c.placement).parameters(widths) for c in found}
    assert costs == {MMAConfig(vision, text).parameters(widths)}
    assert all(c.placement.check(both) for c in found)


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 8, 12, 24, 32])
def test_the_papers_placement_is_the_rule_of_that_name(depth: int) -> None:
    found = competitors(Placement((1,)), {"vision": depth, "text": depth}, ["paper"])
    paper = next(c for c in found if "paper" in c.kind)
    assert paper.placement == Placement(paper_blocks(depth), paper_blocks(depth))


def test_scaling_of_single_blocks_and_starts() -> None:
    assert [scaled_block(b, 24, 12) for b in (1, 2, 23, 24)] == [1, 1, 12, 12]
    assert scaled_start(1, 24, 12) == 1
    assert scaled_start(24, 24, 12) == 12


def test_unknown_kind_and_foreign_block_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'upper'"):
        competitors(CHOSEN, TWELVE, ["uper"])
    with pytest.raises(UserError, match="text block 7, but the text tower has 6 blocks"):
        competitors(CHOSEN, {"vision": 12, "text": 6})
