from __future__ import annotations

from types import SimpleNamespace

import pytest
from backbones import shared_backbone

from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.task import Task
from vlmadapters.methods import METHODS
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.training.recipes import load_recipe
from vlmadapters.validation.competitors import (
    KINDS,
    chosen_placement,
    competitors,
    scaled_start,
)
from vlmlayers.errors import UserError
from vlmlayers.placement import Placement
from vlmlayers.selection import LayerChoice, paper_blocks

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
        assert len(set(c.kind.split("+"))) == len(c.kind.split("+")), "each kind is named once"
        if {"start", "single", "last"} & {*c.kind.split("+")}:
            assert c.placement.vision and c.placement.text, "scaled beyond a tower, it is empty"


def test_the_halves_of_both_towers_share_no_block_and_leave_none_out() -> None:
    asked = ["lower", "upper", "last", "vision", "text"]
    chosen = Placement((20, 21), (5, 6))
    found = competitors(chosen, {"vision": 24, "text": 7}, asked)
    assert {c.kind: str(c.placement) for c in found if c.kind != "chosen"} == {
        "lower": "v1-12,t1-3", "upper": "v13-24,t4-7", "last": "v24,t7",
        "vision": "v20-21,t-", "text": "v-,t5-6",
    }  # fmt: skip


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
    more = competitors(CHOSEN, TWELVE, ["random"], random_count=8, seed=3)
    assert more[:6] == draw, "more of them leave the first ones as they were"
    others = [competitors(CHOSEN, TWELVE, ["random"], seed=seed)[1:] for seed in range(5)]
    assert len({tuple(one) for one in others}) == 5, "each seed draws its own"


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


def test_scaling_of_starts() -> None:
    assert scaled_start(1, 24, 12) == 1
    assert scaled_start(24, 24, 12) == 12
    assert [scaled_start(start, 12, 12) for start in range(1, 13)] == list(range(1, 13))


@pytest.mark.parametrize("kind", ["start", "single"])
def test_every_block_of_the_lower_tower_meets_as_many_of_the_deeper(kind: str) -> None:
    """Of 24 and 12 blocks two each; rounded to the even number, some met three and others one."""
    found = competitors(Placement((2, 5)), {"vision": 24, "text": 12}, [kind])
    placed = [one.placement for one in found if kind in one.kind]
    assert [one.vision[0] for one in placed] == list(range(1, 25))
    assert [one.text[0] for one in placed] == [(block + 1) // 2 for block in range(1, 25)]


def test_unknown_kind_and_foreign_block_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'upper'"):
        competitors(CHOSEN, TWELVE, ["uper"])
    with pytest.raises(UserError, match="text block 7, but the text tower has 6 blocks"):
        competitors(CHOSEN, {"vision": 12, "text": 6})


PLACED = [name for name in METHODS if METHODS.config(name).towers]
FREE = [name for name in METHODS if not METHODS.config(name).towers]


@pytest.mark.parametrize("name", PLACED)
def test_competitors_of_a_method_are_placements_it_takes(name: str) -> None:
    method = load_recipe("published", name).method
    chosen = chosen_placement(method, LayerChoice((2, 5, 9), (2, 3), "explicit"))
    assert all(bool(chosen.blocks(tower)) == (tower in method.towers) for tower in TWELVE)
    found = competitors(chosen, TWELVE, KINDS, method=method)
    for one in found:
        assert method.with_placement(*one.placement).check_depths(TWELVE) is None
    paper = next(one for one in found if "paper" in one.kind)
    assert str(paper.placement) == method.published(TWELVE).placement


@pytest.mark.parametrize("name", PLACED)
def test_random_competitors_have_as_many_parameters_as_the_choice(name: str) -> None:
    """Counted on the built method."""
    model = shared_backbone("clip")
    backbone = Backbone(model.clip, tokenizer=model.tokenizer)
    depths = {tower: walk.tower.depth for tower, walk in backbone.walks.items()}
    method = load_recipe("published", name).method.with_placement(
        *chosen_placement(load_recipe("published", name).method, LayerChoice((1, 2), (2,), "rule"))
    )
    chosen = Placement(method.vision, method.text)
    found = competitors(chosen, depths, ["random"], method=method, random_count=9)
    placed = [method.with_placement(*one.placement) for one in found if one.kind != "paper"]
    task = Task(("red", "green"))
    counts = {METHODS[name].build(one, backbone, task, seed=0).parameter_count() for one in placed}
    assert len(placed) > 1 and len(counts) == 1


@pytest.mark.parametrize("name", FREE)
def test_a_method_without_a_placement_has_nothing_to_validate(name: str) -> None:
    method = load_recipe("published", name).method
    for choice in ("5-12", LayerChoice((5,), (5,), "rule")):
        with pytest.raises(UserError, match=f"{name} has no placement: it acts at no block"):
            chosen_placement(method, choice)


def test_an_explicit_placement_has_to_fit_and_a_choice_gives_what_fits() -> None:
    coop, maple = (load_recipe("published", name).method for name in ("coop", "maple"))
    with pytest.raises(UserError, match="coop acts at no vision block"):
        chosen_placement(coop, "v5-12,t5-12")
    assert str(chosen_placement(coop, LayerChoice((5,), (1, 3), "rule"))) == "v-,t1+3"
    found = competitors(Placement((1, 2), (1, 2)), TWELVE, ["text", "vision"], method=maple)
    assert [one.kind for one in found] == ["chosen", "vision"]
    found = competitors(Placement((), (1,)), TWELVE, ["all", "upper", "vision"], method=coop)
    assert [str(one.placement) for one in found] == ["v-,t1", "v-,t1-12", "v-,t7-12"]


def test_only_a_search_may_choose_no_block() -> None:
    mma = load_recipe("published").method
    assert str(chosen_placement(mma, "v5-6,t-")) == "v5-6,t-"
    assert str(chosen_placement(mma, LayerChoice((), (3,), "rule"))) == "v-,t3"
    assert chosen_placement(mma, LayerChoice((), (), "search")) == Placement()
    with pytest.raises(UserError, match="the choice adapts no block in either tower"):
        chosen_placement(mma, LayerChoice((), (), "explicit"))
    for wrong in (12, SimpleNamespace(vision=(5,))):
        with pytest.raises(UserError, match=f"'5-12', not {type(wrong).__name__}"):
            chosen_placement(mma, wrong)
