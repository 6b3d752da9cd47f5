"""One value and one grammar for the blocks of both towers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlmlayers as vl
from vlmlayers.errors import UserError
from vlmlayers.placement import Amount, Placement, describe_blocks, parse_blocks

BLOCKS = st.sets(st.integers(1, 48)).map(sorted).map(tuple)


@pytest.mark.parametrize(
    ("text", "vision", "words"),
    [
        ("5-7", (5, 6, 7), (5, 6, 7)),
        ("1,3,5-7", (1, 3, 5, 6, 7), (1, 3, 5, 6, 7)),
        ("v5-7,t7-9", (5, 6, 7), (7, 8, 9)),
        ("t7-9,v5-7", (5, 6, 7), (7, 8, 9)),
        ("v1,3,5-7", (1, 3, 5, 6, 7), ()),
        ("v1,3,t2,4", (1, 3), (2, 4)),
        ("v1+3+5-7,t-", (1, 3, 5, 6, 7), ()),
        ("t5-7", (), (5, 6, 7)),
        ("v12", (12,), ()),
        (" V5 – 7, T1 ", (5, 6, 7), (1,)),
        ("zero-shot", (), ()),
        ("v-,t-", (), ()),
        ("none", (), ()),
    ],
)
def test_what_the_grammar_reads(text: str, vision: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert Placement.parse(text) == Placement(vision, words)


@pytest.mark.parametrize(
    "text", ["v5-12,t5-12", "v1+3-5,t-", "v-,t2", "v1+3-9+11-12,t1+3-9+11-12", "zero-shot"]
)
def test_placements_are_written_as_they_are_read(text: str) -> None:
    assert str(Placement.parse(text)) == text


@pytest.mark.parametrize("text", ["v5-6,t2", "v5-6,t2@scale=0.3"])
def test_python_shows_a_placement_with_the_amount_that_it_has(text: str) -> None:
    placed = Placement.parse(text)
    assert ("Amount" in repr(placed)) is ("@" in text)
    assert eval(repr(placed), {"Placement": Placement, "Amount": Amount}) == placed


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # beside other work
@given(BLOCKS, BLOCKS)
def test_every_placement_survives_its_text(vision: tuple[int, ...], text: tuple[int, ...]) -> None:
    placed = Placement(vision, text)
    assert Placement.parse(str(placed)) == placed
    assert Placement.parse(placed.label) == placed
    assert bool(placed) == bool(vision or text)
    assert parse_blocks(describe_blocks(vision)) == vision


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12-5", "12-5 is reversed; write 5-12"),
        ("v1,t12-5", "12-5 is reversed"),
        ("5 to 12", "cannot read the placement '5 to 12'; write 5-12"),
        ("all", "cannot read the placement"),
        ("", "cannot read the placement"),
        ("v", "cannot read the placement"),
        ("٣", "cannot read the placement"),
        ("5-12,t7", "names both towers, then one"),
        ("v0", "vision block 0 is not a whole number from 1"),
        ("v1,1-3", "vision block 1 is named twice"),
        ("1-99999", "no tower has a block beyond"),
        (5, "a placement is text"),
    ],
)
def test_what_the_grammar_refuses(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Placement.parse(text)


def test_it_is_a_value() -> None:
    placed = Placement((np.int64(3), 1), [2])  # type: ignore[arg-type]
    assert placed == Placement((1, 3), (2,)) and len({placed, Placement((1, 3), (2,))}) == 1
    assert pickle.loads(pickle.dumps(placed)) == placed
    assert placed.blocks("text") == (2,) and tuple(placed) == ((1, 3), (2,))
    assert Placement.span(5, 7) == Placement.parse("5-7") and Placement.span(5, 7).label == "5–7"
    assert vl.Placement is Placement
    for wrong in ((0,), (True,), ("1",), (1, 1), "12", 5):
        with pytest.raises(UserError):
            Placement(wrong, ())  # type: ignore[arg-type]


def test_a_block_beyond_its_tower_is_named() -> None:
    placed = Placement.parse("v5-7,t2")
    assert placed.check({"vision": 7, "text": 2}) is placed
    with pytest.raises(UserError, match="placement v5-7,t2 names vision block 7, but .* 6 blocks"):
        placed.check({"vision": 6, "text": 2})
    with pytest.raises(UserError, match="the choice names text block 2, but there is no text"):
        placed.check({"vision": 12}, "the choice")


def test_the_blocks_of_one_tower() -> None:
    assert (
        parse_blocks("3, 5–7") == (3, 5, 6, 7) and parse_blocks(" none ") == parse_blocks("") == ()
    )
    assert parse_blocks(4) == (4,) and parse_blocks([4, np.int64(2)]) == (2, 4)
    assert describe_blocks((3, 5, 6, 7)) == "3, 5–7" and describe_blocks(()) == "none"
    for wrong in ("5 to 12", "v5", "12-5", "0"):
        with pytest.raises(UserError):
            parse_blocks(wrong)


@pytest.mark.parametrize(
    "text",
    ["v5-12,t5-12@scale=0.3,epochs=15", "v3,t-@scale=5,lr=0.01", "@lr=1e-05,steps_per_shot=20"],
)
def test_a_placement_names_its_amount(text: str) -> None:
    placed = Placement.parse(text)
    assert str(placed) == text and placed.amount
    assert Placement.parse(placed.label) == placed
    assert placed != Placement(*placed) and list(placed) == [placed.vision, placed.text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5-12@", "cannot read the amount ''"),
        ("5-12@rate=3", "unknown key 'rate'"),
        ("5-12@scale", "cannot read the amount"),
        ("5-12@scale=1,scale=2", "cannot read the amount"),
        ("5-12@scale=much", "must be a number above 0"),
        ("5-12@scale=-1", "must be a number above 0"),
        ("5-12@scale=nan", "must be a number above 0"),
        (f"5-12@scale=1{'0' * 400}", "must be a number above 0"),
        ("5-12@epochs=1.5", "must be a whole number from 1"),
        ("5-12@epochs=0", "must be a whole number from 1"),
    ],
)
def test_what_an_amount_refuses(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Placement.parse(text)
