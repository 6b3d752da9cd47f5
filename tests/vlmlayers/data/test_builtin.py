"""Built-in datasets: deterministic, balanced, the same drawing at any resolution, told apart."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from vlmlayers.data import builtin
from vlmlayers.data.builtin import shapes
from vlmlayers.data.builtin.base import checkerboard, generator, with_article
from vlmlayers.data.builtin.canvas import COLOURS, Canvas, blemish, jitter, mix
from vlmlayers.errors import UserError

NAMES = builtin.names()
DRAWN = [name for name in NAMES if name != "digits"]
DIGEST = """
import hashlib
from vlmlayers.data import builtin
seen = hashlib.sha256()
for name in builtin.names():
    data = builtin.get(name)
    seen.update(data.image("test", 7, 32).tobytes() + data.caption("test", 7).encode())
print(seen.hexdigest())
"""


def pixels(name: str, split: str, index: int, size: int = 64) -> NDArray[np.float64]:
    return np.asarray(builtin.get(name).image(split, index, size), dtype=np.float64)


def test_eight_kinds_at_least_and_one_of_them_in_styles() -> None:
    domains = {builtin.get(name).domain for name in DRAWN}
    assert len(domains) >= 8
    styles = [builtin.get(name) for name in DRAWN if builtin.get(name).domain == "shapes"]
    assert len(styles) == 4
    assert len({style.class_names for style in styles}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_ten_classes_of_real_words(name: str) -> None:
    names = builtin.get(name).class_names
    assert len(set(names)) == len(names) >= 10
    assert all(word.isalpha() for class_name in names for word in class_name.split())


@pytest.mark.parametrize("name", DRAWN)
def test_novel_classes_recombine_words_of_base_classes(name: str) -> None:
    names = builtin.get(name).class_names
    half = -(-len(names) // 2)
    base = {word for class_name in names[:half] for word in class_name.split()}
    novel = {word for class_name in names[half:] for word in class_name.split()}
    assert novel <= base
    assert not set(names[half:]) & set(names[:half])


@pytest.mark.parametrize("name", NAMES)
def test_prefixes_are_balanced(name: str) -> None:
    data = builtin.get(name)
    count = len(data.class_names)
    for split in ("train", "val", "test"):
        labels = [data.label(split, index) for index in range(data.sizes[split])]
        assert set(np.bincount(labels)) == {data.sizes[split] // count}
        assert sorted(labels[:count]) == list(range(count))


@pytest.mark.parametrize("name", NAMES)
def test_item_depends_on_dataset_split_and_index_alone(name: str) -> None:
    data = builtin.get(name)
    first, said = pixels(name, "train", 3), data.caption("train", 3)
    np.random.default_rng(0).random(5)
    random.random()
    data.image("train", 4)
    assert np.array_equal(first, pixels(name, "train", 3))
    assert said == data.caption("train", 3)
    count = len(data.class_names)
    others = [pixels(name, "train", 3 + count), pixels(name, "test", 3), pixels(name, "val", 3)]
    assert all(not np.array_equal(first, other) for other in others)


def test_another_process_draws_the_same() -> None:
    runs = {
        subprocess.run(
            [sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(runs) == 1


def test_global_random_state_is_left_alone() -> None:
    state, before = random.getstate(), np.random.get_state()[1].copy()
    for name in NAMES:
        builtin.get(name).image("val", 1)
        builtin.get(name).caption("val", 1)
    assert random.getstate() == state
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("name", NAMES)
def test_same_drawing_at_any_resolution(name: str) -> None:
    close, far = [], []
    for index in range(6):
        large = np.asarray(
            builtin.get(name).image("test", index, 192).resize((48, 48), 4), dtype=np.float64
        )
        close.append(np.corrcoef(large.ravel(), pixels(name, "test", index, 48).ravel())[0, 1])
        other = pixels(name, "test", index + len(builtin.get(name).class_names), 48)
        far.append(np.corrcoef(large.ravel(), other.ravel())[0, 1])
    assert np.mean(close) > 0.9
    assert np.mean(close) > np.mean(far) + 0.15


@pytest.mark.parametrize(("size", "mode"), [(8, "RGB"), (33, "RGB"), (64, "RGB"), (224, "RGB")])
def test_any_size_gives_a_square_of_it(size: int, mode: str) -> None:
    for name in NAMES:
        image = builtin.get(name).image("val", 5, size)
        assert (image.size, image.mode) == ((size, size), mode)


@pytest.mark.parametrize("name", DRAWN)
def test_items_of_one_class_vary(name: str) -> None:
    count = len(builtin.get(name).class_names)
    stack = np.stack([pixels(name, "train", 1 + count * k, 16).ravel() for k in range(8)])
    correlations = np.corrcoef(stack)[np.triu_indices(8, 1)]
    assert correlations.mean() < 0.9


@pytest.mark.parametrize("name", NAMES)
def test_captions_name_the_class_and_fill_every_blank(name: str) -> None:
    data = builtin.get(name)
    spoken = {data.caption("train", index) for index in range(100)}
    assert len(spoken) > len(data.class_names)
    for index in range(40):
        text = data.caption("test", index)
        assert data.class_names[data.label("test", index)] in text
        assert "{" not in text and text == text.strip()


def test_captions_say_what_is_drawn() -> None:
    """The colour that a caption names is the nearest named colour at the shape's centre."""
    data, hits, seen = builtin.get("shapes_filled"), 0, 0
    for index in range(400):
        drawn = data.plan(data.label("test", index), generator(data.name, "test", index))
        if drawn["hole"] or f" {drawn['colour']} " not in data.caption("test", index):
            continue
        x, y = (int(64 * drawn[axis]) for axis in "xy")
        middle = pixels("shapes_filled", "test", index)[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
        choices = {name: np.abs(middle - COLOURS[name]).sum() for name in
                   ("black", "blue", "red", "purple", "brown", "green")}  # fmt: skip
        hits += min(choices, key=choices.__getitem__) == drawn["colour"]
        seen += 1
    assert seen > 40
    assert hits / seen > 0.8


def test_holes_show_the_paper() -> None:
    whole = shapes.PAIRS.index(("circle", "")), shapes.PAIRS.index(("circle", " with a hole"))
    plain, holed = (shapes.plan(label, np.random.default_rng(5), "filled") for label in whole)
    assert {**plain, "hole": True} == holed
    centre = int(64 * plain["y"]), int(64 * plain["x"])
    first = np.asarray(shapes.draw(plain, np.random.default_rng(2), 64, "filled"), float)[centre]
    second = np.asarray(shapes.draw(holed, np.random.default_rng(2), 64, "filled"), float)[centre]
    assert np.abs(first - second).sum() > 60


def test_digits_are_the_real_scans() -> None:
    data, real = builtin.get("digits"), load_digits()
    known = {scan.astype(int).tobytes() for scan in np.minimum(real.images * 16, 255)}
    for index in range(25):
        small = np.asarray(data.image("test", index, 8).convert("L"))
        assert small.astype(int).tobytes() in known


def test_digit_splits_do_not_overlap() -> None:
    data = builtin.get("digits")
    seen = {split: {data.image(split, index, 8).tobytes() for index in range(data.sizes[split])}
            for split in ("train", "val", "test")}  # fmt: skip
    assert not (seen["train"] & seen["test"] or seen["val"] & seen["test"])


def test_domains_are_told_apart_by_a_linear_reader() -> None:
    """Even 8 × 8 pixels tell the kinds apart much better than chance, styles of shapes less so."""
    kinds = [name for name in NAMES if not name.startswith("shapes_") or name.endswith("filled")]
    parts = {
        split: (
            np.stack([pixels(name, split, i, 8).ravel() for name in kinds for i in range(60)]),
            np.repeat(np.arange(len(kinds)), 60),
        )
        for split in ("train", "test")
    }
    reader = LogisticRegression(max_iter=300).fit(parts["train"][0] / 255, parts["train"][1])
    assert reader.score(parts["test"][0] / 255, parts["test"][1]) > 4 / len(kinds)


def test_hands_that_draw_doodles_are_told_apart_as_often_as_their_traits_allow() -> None:
    """Four traits, each shifted by 1.2 deviations: at best Φ(1.2) = 0.88, less for `filled`."""
    traits = {"train": range(1000), "test": range(1000)}
    x = {
        split: np.array(
            [
                [plan[name] for name in ("width", "wobble", "tone", "filled")]
                for hand in ("doodles_pen", "doodles_brush")
                for plan in (
                    builtin.get(hand).plan(index % 16, generator(hand, split, index))
                    for index in indices
                )
            ]
        )
        for split, indices in traits.items()
    }
    y = np.repeat([0, 1], 1000)
    mean, spread = x["train"].mean(0), x["train"].std(0)
    reader = LogisticRegression().fit((x["train"] - mean) / spread, y)
    assert 0.83 < reader.score((x["test"] - mean) / spread, y) < 0.89


def test_half_of_the_classes_of_doodles_are_drawn_by_both_hands() -> None:
    pen, brush = (set(builtin.get(f"doodles_{hand}").class_names) for hand in ("pen", "brush"))
    assert len(pen & brush) == 8 and len(pen) == len(brush) == 16


def test_checkerboard_uses_every_part_in_both_halves() -> None:
    pairs = checkerboard("abcd", "xyz")
    assert len(set(pairs)) == 12
    for half in (pairs[:6], pairs[6:]):
        assert {pair[0] for pair in half} == set("abcd")
        assert {pair[1] for pair in half} == set("xyz")


def test_grain_changes_no_mean_and_grows_with_its_amount() -> None:
    flat = Canvas(64, (120, 120, 120)).done(np.random.default_rng(3), 0.0)
    noisy = Canvas(64, (120, 120, 120)).done(np.random.default_rng(3), 0.3)
    a, b = np.asarray(flat, float), np.asarray(noisy, float)
    assert abs(a.mean() - b.mean()) < 3
    assert b.std() > a.std()
    assert blemish(np.random.default_rng(3), flat).size == (64, 64)


def test_colours_stay_in_range() -> None:
    rng = np.random.default_rng(0)
    assert mix((0, 0, 0), (200, 100, 50), 0.5) == (100, 50, 25)
    near = np.array([jitter(rng, (250, 3, 128), 30) for _ in range(200)])
    assert near.min() >= 0 and near.max() <= 255
    assert np.abs(near[:, 2] - 128).max() <= 30


def test_articles() -> None:
    assert with_article("a angry face with a hat") == "an angry face with a hat"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: builtin.get("shapes_fill"), "did you mean 'shapes_filled'"),
        (lambda: builtin.get("flags").label("trian", 0), "did you mean 'train'"),
        (lambda: builtin.get("flags").image("train", -1), "items 0 to"),
        (lambda: builtin.get("digits").image("test", 540), "has items 0 to 539, not 540"),
        (lambda: builtin.get("flags").image("train", 0, 4), "at least 8 pixels"),
    ],
)
def test_wrong_requests_say_what_is_right(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()  # type: ignore[operator]


def test_drawn_sets_go_on_beyond_their_sizes() -> None:
    data = builtin.get("signs")
    assert data.image("train", 10**7).size == (64, 64)
    assert data.label("train", 10**7) == 10**7 % len(data.class_names)
