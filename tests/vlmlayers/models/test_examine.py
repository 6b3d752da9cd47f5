"""What blocks do in their model: constructed truths, and a second route for each."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import transformers_models
from PIL import Image
from scipy import stats
from tiny import DrawnManifest

import vlmlayers as vl
from vlmlayers.errors import UserError
from vlmlayers.metrics import METRICS
from vlmlayers.metrics.declare import MODEL
from vlmlayers.metrics.intervals import jackknife_interval
from vlmlayers.metrics.model_level import chance_margin, zero_shot_margins
from vlmlayers.models import VLM, contributions, examine, gradients, load_model, wrap_model
from vlmlayers.models.examined import Inputs, Rows
from vlmlayers.models.recording import block_outputs
from vlmlayers.models.tower import Tower
from vlmlayers.models.transformers_towers import pack
from vlmlayers.scores import SCORE_COLUMNS

NAMES = ("cat", "frog", "hut", "owl", "pine", "rose")


class Drawn(DrawnManifest):
    """Six classes, as halves of classes need two each."""

    def items(self, split: str, root=None) -> list:
        found = super().items(split, root)
        return [type(one)(one.path, i % 6, NAMES[i % 6], ()) for i, one in enumerate(found)]


def drawn() -> Drawn:
    return Drawn(names=NAMES, count=24, captioned=False)


def silence(model: VLM, tower: str, block: int) -> None:
    """Make a block the identity: what attention and perceptron add becomes zero."""
    module = model.towers[tower].blocks[block - 1]
    with torch.no_grad():
        for layer in (module.attn.out_proj, module.mlp.c_proj):
            layer.weight.zero_()
            layer.bias.zero_()


def value(table: pd.DataFrame, metric: str, tower: str, position: str) -> float:
    rows = table[(table.metric == metric) & (table.tower == tower) & (table.position == position)]
    return float(rows["value"].item())


@pytest.fixture(scope="module")
def silenced() -> tuple[VLM, pd.DataFrame]:
    """A model whose second block does nothing in either tower, and its table."""
    model = tiny.model("clip")
    silence(model, "vision", 2)
    silence(model, "text", 2)
    return model, examine(model, drawn(), items=24, progress=False, bootstrap=200, batch_size=7)


def test_a_block_that_is_the_identity_has_no_importance(silenced) -> None:
    _, table = silenced
    for tower in ("vision", "text"):
        for metric in ("skip_joint_change", "mean_joint_change", "contribution"):
            assert value(table, metric, tower, "2") == pytest.approx(0.0, abs=1e-6)
            assert abs(value(table, metric, tower, "1")) > 1e-4
        assert value(table, "skip_accuracy_drop", tower, "2") == 0.0
        [drop] = table[(table.metric == "skip_accuracy_drop") & (table.tower == tower)
                       & (table.position == "2")].itertuples()  # fmt: skip
        assert (drop.low, drop.high) == pytest.approx((-0.1380, 0.1380), abs=1e-4)  # 0 of 24
    assert list(table.columns[: len(SCORE_COLUMNS)]) == list(SCORE_COLUMNS)
    bounded = table[["low", "value", "high"]].to_numpy()
    assert np.isfinite(bounded).all() and (np.diff(bounded, axis=1) >= -1e-9).all()
    assert set(table["n"]) == {24, 6}  # images, and prompts where a value is of prompts alone


def test_a_skipped_block_is_a_model_without_it() -> None:
    """The same model with one block taken out of its list gives the changed embedding."""
    whole = tiny.model("clip")
    table = examine(whole, drawn(), metrics="skip_joint_change", items=24, progress=False)
    short = tiny.build("clip")
    del short.visual.transformer.resblocks[2]
    batch = torch.stack([whole.preprocess(drawn().open_image(i)) for i in drawn().items("train")])
    with torch.inference_mode():
        pair = [clip.encode_image(batch, normalize=True) for clip in (whole.clip, short)]
    expected = 1.0 - (pair[0] * pair[1]).sum(1).mean().item()
    assert value(table, "skip_joint_change", "vision", "3") == pytest.approx(expected, abs=1e-5)


def letters(texts: list[str]) -> torch.Tensor:
    """Return ids for the tiny models of transformers, ended and padded by 59."""
    ids = torch.full((len(texts), 12), 59)
    for row, text in enumerate(texts):
        ids[row, :10] = torch.tensor([0, *(3 + ord(letter) % 55 for letter in text[-9:])])
    return ids


def resized(image: Image.Image) -> torch.Tensor:
    return tiny.preprocess(image.resize((160, 160)))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "timm vit token"])
def test_models_of_transformers_and_timm_are_examined_as_any_other(kind: str) -> None:
    """By the same route as above: a model whose second block is not in its list."""
    timm = kind.startswith("timm")
    build = tiny.build if timm else transformers_models.build
    clip, short = build(kind), build(kind)
    seen = (resized, tiny.tokenizer) if timm else (tiny.preprocess, letters)
    model, other = (wrap_model(one, *seen, name=kind, weights="seed 0") for one in (clip, short))
    table = examine(model, drawn(), items=12, progress=False, bootstrap=20)
    refused = {one["metric"] for one in table.attrs["refused"]}
    assert refused == ({"contribution"} if kind == "Siglip" else set())  # it ends in attention
    assert set(table["metric"]) | refused == {n for n, m in METRICS.items() if m.needs == MODEL}
    vision = short.visual.trunk.blocks if timm else short.vision_model.encoder.layers
    del vision[1]
    batch = torch.stack([model.preprocess(drawn().open_image(i)) for i in drawn().items("train")])
    with torch.inference_mode():
        pair = [one.towers["vision"].run(batch[:12]) for one in (model, other)]
    expected = 1.0 - torch.cosine_similarity(*pair).mean().item()
    assert value(table, "skip_joint_change", "vision", "2") == pytest.approx(expected, abs=1e-5)


def test_what_is_the_same_for_all_items_is_its_own_mean() -> None:
    """A block that adds one constant changes by skipping, and not by taking its mean."""
    model = tiny.model("clip")
    for tower in ("vision", "text"):
        silence(model, tower, 2)
        out = model.towers[tower].blocks[1].mlp.c_proj
        with torch.no_grad():
            out.bias.copy_(torch.linspace(-2, 3, len(out.bias)))
    table = examine(
        model, drawn(), metrics=["skip_joint_change", "mean_joint_change"], items=24, progress=False
    )
    for tower in ("vision", "text"):
        assert value(table, "mean_joint_change", tower, "2") == pytest.approx(0.0, abs=1e-6)
        assert value(table, "skip_joint_change", tower, "2") > 1e-4


def test_what_pads_images_enters_no_mean() -> None:
    """Images of SigLIP 2 have patches of their own number; what stands behind them is arbitrary."""
    model = wrap_model(
        transformers_models.build("Siglip2"), tokenizer=tiny.tokenizer, random_weights=True
    )
    batch = pack(transformers_models.patches())
    there = batch[..., -3] > 0
    other = batch.clone()
    other[..., :-3][~there] = 9.0
    means = [
        Inputs(model, "", np.arange(3), {"vision": [one]}).mean_added("vision")
        for one in (batch, other)
    ]
    seen: dict[str, torch.Tensor] = {}
    tower = model.towers["vision"]
    with torch.inference_mode(), block_outputs(tower, seen.__setitem__):
        tower.run(batch)
    added = seen["2"] - seen["1"]
    expected = (added * there[..., None]).sum(0) / there.sum(0).clamp(min=1)[:, None]
    for block in (1, 2):
        first, second = (mean[block][0] for mean in means)
        torch.testing.assert_close(first, second)
        assert first[there].abs().max() > 0.1
    torch.testing.assert_close(means[0][2][0][there], expected.expand(3, -1, -1)[there])


def test_what_a_block_adds_is_averaged_over_all_batches() -> None:
    model = tiny.model("clip")
    for name, items in (("vision", tiny.images(model.clip)), ("text", tiny.token_ids())):
        tower = model.towers[name]
        whole, parts, first = (
            Inputs(model, "", np.arange(len(items)), {name: batches}).mean_added(name)
            for batches in ([items], [items[:1], items[1:]], [items[:1]])
        )
        for block in range(1, tower.depth + 1):
            (expected,) = map(tower.tokens, whole[block])
            torch.testing.assert_close(torch.cat([*map(tower.tokens, parts[block])]), expected)
            assert (tower.tokens(first[block][0]) - expected[:1]).abs().max() > 1e-3


def test_class_tokens_of_texts_are_averaged_with_each_other() -> None:
    """CoCa's stands behind what pads a text, and is what the tower gives out."""
    model, ids = tiny.model("coca"), tiny.token_ids()
    tower, seen = model.towers["text"], dict[str, torch.Tensor]()
    with torch.inference_mode(), block_outputs(tower, seen.__setitem__):
        tower.run(ids)
    added = (seen["2"] - seen["1"])[:, -1]
    mean = Inputs(model, "", np.arange(len(ids)), {"text": [ids]}).mean_added("text")[2][0]
    torch.testing.assert_close(mean[:, -1], added.mean(0).expand(len(ids), -1))


def test_what_pads_texts_enters_no_mean() -> None:
    """Texts are cut behind the longest; uncut ones have more padding, and the same meaning."""
    changes = []
    for cut in (True, False):
        model = tiny.model("clip")
        if not cut:
            model.towers["text"].cut = lambda ids: ids
        table = examine(
            model, drawn(), metrics="mean_joint_change", items=24, template="{}", progress=False
        )
        changes.append([value(table, "mean_joint_change", "text", str(b)) for b in (1, 2)])
    assert changes[0] == pytest.approx(changes[1], abs=1e-6) and max(changes[0]) > 1e-4


@pytest.mark.parametrize(
    "family",
    [
        *("clip", "clipa", "norm after pool", "eos", "first", "custom blocks", "quickgelu"),
        *("timm vit token", "timm vit mean", "timm vit registers", "coca"),
    ],
)
def test_contributions_sum_to_the_embedding(family: str) -> None:
    model = tiny.model(family)
    batches = {"vision": tiny.images(model.clip), "text": tiny.token_ids()}
    if family == "coca":  # whose images are pooled by attention
        del batches["vision"]
    for name, batch in batches.items():
        tower = model.towers[name]
        parts = contributions(tower, batch)
        assert list(parts) == ["embed", *map(str, range(1, tower.depth + 1)), "bias"]
        with torch.inference_mode():
            whole = tower.run(batch)
        torch.testing.assert_close(sum(parts.values()), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_contributions_of_half_precision_are_those_of_the_same_stream(precision: str) -> None:
    half = load_model("mini-clip", precision=precision)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    texts = half.tokenizer(["a photo of a cat", "an owl"])
    for tower, batch in (("vision", images.to(half.input_dtype)), ("text", texts)):
        side = half.towers[tower]
        parts = contributions(side, batch)
        with torch.inference_mode():
            whole = side.run(batch).float()
        limit = 8 * torch.finfo(half.input_dtype).eps * whole.abs().max()
        assert (sum(parts.values()) - whole).abs().max() < limit
        # The stream is rounded, the parts of it are not: they are near those of full precision.
        full = contributions(load_model("mini-clip").towers[tower], batch.float()
                             if tower == "vision" else batch)  # fmt: skip
        for position, part in parts.items():
            assert (part - full[position]).abs().max() < 0.1 * full[position].abs().max()


def test_a_default_type_of_the_callers_changes_no_result() -> None:
    """As in a script that works in double precision."""
    model, batch = tiny.model("clip"), tiny.images(tiny.build("clip"))
    expected, weights = contributions(model.towers["vision"], batch), load_model("mini-clip")
    torch.set_default_dtype(torch.float64)
    try:
        again = tiny.model("clip")
        parts = contributions(model.towers["vision"], batch)
        loaded = load_model("mini-clip")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.input_dtype == torch.float32 and loaded.weights_hash == weights.weights_hash
    for position, part in parts.items():
        assert torch.equal(part, expected[position])


@contextmanager
def _in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def _in_tf32():
    torch.set_float32_matmul_precision("high")
    yield
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "around",
    [
        _in_float64,
        _in_tf32,
        lambda: torch.device("meta"),  # as `torch.set_default_device` of a GPU
        partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    ],
)
def test_what_the_caller_has_switched_on_changes_no_table(around, monkeypatch) -> None:
    model, asked = tiny.model("clip"), (drawn(), "val", ("mean_joint_change", "gradient_alignment"))
    weights = load_model("mini-clip").weights_hash
    plain = examine(model, *asked, progress=False)
    seen, run = set(), Tower.tokens
    monkeypatch.setattr(
        Tower,
        "tokens",
        lambda *given: seen.add(torch.get_float32_matmul_precision()) or run(*given),
    )
    with around():
        within = examine(model, *asked, progress=False)
        assert load_model("mini-clip").weights_hash == weights
    pd.testing.assert_frame_equal(within, plain)
    assert seen == {"highest"}


def test_a_batch_that_a_tower_cannot_take_apart_is_said_in_a_line() -> None:
    model = tiny.model("clip")
    images, ids = tiny.images(model.clip), tiny.token_ids()
    for tower, batch, message in (
        ("vision", images[0], r"takes one item or more as \(item, 3, .*, not \(3, "),
        ("vision", images[:0], r", not \(0, 3, "),
        ("vision", images.double(), "of float32 on cpu, not .* of float64"),
        (
            "text",
            ids[0],
            r"text tower takes one item or more as \(item, 12\) of int64 .*, not \(12\)",
        ),
        ("text", ids[:0], r"not \(0, 12\)"),
        ("text", ids + 1000, "text tower knows tokens 0 to .*, and these run from 1000 to 1063"),
    ):
        with pytest.raises(UserError, match=message):
            contributions(model.towers[tower], batch)


def test_a_block_contributes_what_is_planted(silenced) -> None:
    """Shares of one tower and its bias sum to one, by the definition of a projection."""
    model, table = silenced
    shares = table[(table.metric == "contribution") & (table.tower == "vision")]["value"]
    batch = torch.stack([model.preprocess(drawn().open_image(i)) for i in drawn().items("train")])
    with torch.inference_mode():
        whole = model.towers["vision"].run(batch)
    bias = contributions(model.towers["vision"], batch)["bias"]
    rest = ((bias * whole).sum(1) / (whole * whole).sum(1)).mean().item()
    assert shares.sum() + rest == pytest.approx(1.0, abs=1e-4)


def test_gradients_are_those_of_finite_differences() -> None:
    """A cosine of two gradients by moving the output of one block, one number at a time."""
    model, manifest = tiny.model("clip"), drawn()
    table = examine(model, manifest, metrics="gradient_alignment", items=24, progress=False, seed=3)
    halves = np.array_split(np.random.default_rng([3, 2]).permutation(np.arange(6)), 2)
    labels = np.array([item.label for item in manifest.items("train")])
    batch = torch.stack([model.preprocess(manifest.open_image(i)) for i in manifest.items("train")])
    prompts = model.tokenize([manifest.prompt(name) for name in NAMES])
    block = model.towers["vision"].blocks[1]

    def loss(half: np.ndarray, shift: torch.Tensor) -> float:
        classes = np.sort(half)
        rows = np.flatnonzero(np.isin(labels, classes))
        handle = block.register_forward_hook(lambda _m, _a, out: out + shift)
        with torch.inference_mode():
            x = model.clip.encode_image(batch[rows], normalize=True).double()
        handle.remove()
        with torch.inference_mode():
            w = model.clip.encode_text(prompts[classes], normalize=True).double()
        logits = x @ w.T * model.clip.logit_scale.exp().double()
        truth = torch.from_numpy(np.searchsorted(classes, labels[rows]))
        return torch.nn.functional.cross_entropy(logits, truth, reduction="sum").item()

    step, found = 1e-2, []
    for half in halves:
        moved = step * torch.eye(model.towers["vision"].width)
        found.append(np.array([loss(half, one) - loss(half, -one) for one in moved]))
    expected = found[0] @ found[1] / np.linalg.norm(found[0]) / np.linalg.norm(found[1])
    assert value(table, "gradient_alignment", "vision", "2") == pytest.approx(expected, abs=0.02)
    row = table[(table.tower == "vision") & (table.position == "2")].iloc[0]
    assert row["low"] <= row["value"] <= row["high"] and abs(row["null"]) <= 1


def test_the_margin_is_that_of_a_loop_over_images(silenced) -> None:
    model, table = silenced
    features = vl.extract(model, drawn(), items=24, progress=False)
    x, w = (features[tower]["proj", "joint"] for tower in ("vision", "text"))
    margins = []
    for row, label in zip(x, features["vision"].labels):
        cosines = [row @ one / np.linalg.norm(row) / np.linalg.norm(one) for one in w]
        margins.append(cosines.pop(label) - max(cosines))
    (row,) = table[table.metric == "zero_shot_margin"].to_dict("records")
    assert row["value"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert row["low"] < row["value"] < row["high"] and row["position"] == "proj"


def test_the_chance_of_the_margin_is_its_mean_over_all_ways_to_deal_the_labels() -> None:
    rng = np.random.default_rng(0)
    x, prompts, labels = rng.normal(size=(6, 4)), rng.normal(size=(3, 4)), [0, 0, 0, 1, 1, 2]
    dealt = [zero_shot_margins(x, prompts, list(one)).mean() for one in permutations(labels)]
    assert chance_margin(x, prompts, labels) == pytest.approx(np.mean(dealt), abs=1e-12)


def test_prompts_are_no_images_where_there_are_as_many(silenced) -> None:
    """Resampled inside the classes of images, prompts would not vary where their values do."""
    model, _ = silenced
    values = np.repeat([0.0, 1.0], 5)
    inputs = SimpleNamespace(labels=np.repeat([0, 1], 5), dataset="few", model=model)
    rows = Rows.__new__(Rows)
    rows.inputs, rows.split, rows.seed, rows.draws, rows.rows = inputs, "val", 0, 200, []
    rows.add_mean("joint_change", "text", "1", values)
    rows.add_mean("joint_change", "vision", "1", values)
    for tower in ("text", "vision"):  # of images, whichever tower has changed
        rows.add_mean("skip_accuracy_drop", tower, "1", values, difference=True)
    prompts, images, *drops = rows.rows
    assert drops[0]["low"] == drops[1]["low"] < drops[1]["high"] == drops[0]["high"] == 0.5
    assert prompts["low"] < 0.3 and prompts["high"] > 0.7
    assert images["low"] == pytest.approx(0.5) == images["high"]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.model("clip")
    model.clip.train()
    for parameter in model.clip.parameters():
        parameter.requires_grad_(True)
    before = model.weights_hash
    examine(model, drawn(), items=24, progress=False, bootstrap=20)
    assert model.clip.training and model.weights_hash == before
    assert all(p.requires_grad and p.grad is None for p in model.clip.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.clip.modules())


def test_rules_read_them_as_any_metric(silenced) -> None:
    model, table = silenced
    features = vl.extract(model, drawn(), items=24, progress=False)
    scores = pd.concat([vl.score(features, ["fisher_ratio"], bootstrap=20, jackknife=3), table])
    choice = vl.select(scores, "budget", n=2, span=False, score="metric:skip_joint_change",
                       resamples=20)  # fmt: skip
    assert 2 not in choice.vision and 2 not in choice.text
    again = examine(model, drawn(), items=24, progress=False, bootstrap=200, batch_size=7)
    pd.testing.assert_frame_equal(again, table)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("clip", {"metrics": "skip_accuracy"}, "unknown metric 'skip_accuracy'; did you mean"),
        ("clip", {"metrics": []}, "examine needs a metric"),
        ("resnet", {}, "has stages, not residual blocks"),
        ("coca", {"metrics": "contribution"}, "attention pool"),
    ],
)
def test_what_cannot_be_examined_is_refused(family: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        examine(tiny.model(family), drawn(), items=24, progress=False, **options)


def test_towers_show_themselves_in_a_line_each() -> None:
    assert repr(tiny.model("clip").towers).splitlines() == [
        "Tower(vision, open_clip ViT: 3 blocks of width 48, pooling cls)",
        "Tower(text, open_clip text: 3 blocks of width 32, pooling argmax token)",
    ]


def test_a_model_shows_itself_as_html_without_markup_of_its_name() -> None:
    model = tiny.model("clip")
    model.name = "<b>mine</b>"
    model.towers["text"].family = "<i>open_clip text"
    shown = model._repr_html_()
    assert model.towers._repr_html_() in shown and "<i>" not in shown
    assert "&lt;b&gt;mine" in shown and "<b>" not in shown
    assert "3 blocks" in shown and "open_clip text" in shown


def test_a_manifest_shows_itself_in_a_line() -> None:
    shown = repr(vl.Manifest.load("caltech101"))
    assert shown.startswith("Manifest(caltech101: ") and "100 classes" in shown
    assert "\n" not in shown and len(shown) < 200


def test_the_null_of_gradients_is_the_mean_of_what_each_shuffle_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shuffles that share a forward pass give what each gives by itself."""
    of = gradients.Alignment.of
    alone: list[dict] = []

    def one_by_one(inputs, labellings, halves, dealt) -> list:
        alone[:] = [of(inputs, one[None], halves, dealt)[0].whole() for one in labellings]
        return of(inputs, labellings, halves, dealt)

    monkeypatch.setattr(gradients.Alignment, "of", one_by_one)
    table = examine(tiny.model("clip"), drawn(), metrics="gradient_alignment", items=24,
                    progress=False)  # fmt: skip
    assert len(alone) == 6
    for row in table.itertuples():
        measured, *nulls = [one[row.tower, int(row.position)] for one in alone]
        assert row.value == pytest.approx(measured, abs=1e-5)
        assert row.null == pytest.approx(np.mean(nulls), abs=1e-5)


def test_gradients_of_groups_are_those_of_all_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """However images are dealt, by one or by two, and of the rest where a group is left out."""
    of = gradients.Alignment.of
    given: list[tuple] = []

    def kept(*arguments) -> list:
        given[:] = arguments
        return of(*arguments)

    monkeypatch.setattr(gradients.Alignment, "of", kept)
    table = examine(tiny.model("clip"), drawn(), metrics="gradient_alignment", items=24,
                    progress=False)  # fmt: skip
    inputs, labellings, halves, dealt = given
    assert {len(rows) for parts in dealt for rows in parts} == {1, 2}

    def alignment(without: int | None = None) -> dict:
        rest = [[p for g, p in enumerate(parts) if g != without] for parts in dealt]
        together = [[np.sort(np.concatenate(parts))] for parts in rest]
        return of(inputs, labellings[:1], halves, together)[0].whole()

    value, left_out = alignment(), [alignment(group) for group in range(len(dealt[0]))]
    for row in table.itertuples():
        place = row.tower, int(row.position)
        low, high = jackknife_interval(value[place], np.array([one[place] for one in left_out]))
        expected = value[place], max(float(low), -1), min(float(high), 1)
        assert (row.value, row.low, row.high) == pytest.approx(expected, abs=1e-4)
    assert ((table["high"] == 1) | (table["low"] == -1)).any()


class Alike(Drawn):
    """Every image of a class is the same one, or every image of all classes."""

    one = False

    def open_image(self, item, **where) -> Image.Image:
        return super().open_image(self.items("train")[0 if self.one else item.label])


@pytest.mark.parametrize("kind", ["CLIP", "clip"])
def test_gradient_norms_are_those_of_one_backward_pass(monkeypatch, kind: str) -> None:
    """Where each batch holds each class alike and images of a class are one, as of the whole."""
    monkeypatch.setattr(gradients, "_GROUPS", 2)
    build = transformers_models.build if kind == "CLIP" else tiny.build
    clip, plain = build(kind), build(kind)
    words = letters if kind == "CLIP" else tiny.tokenizer
    model = wrap_model(clip, tiny.preprocess, words, name=kind, weights="seed 0")
    data = Alike(names=NAMES, count=24, captioned=False)
    table = examine(model, data, metrics="relative_gradient_norm", items=24, progress=False)

    other = wrap_model(plain, tiny.preprocess, words, name=kind, weights="seed 0")
    pixels = torch.stack([model.preprocess(data.open_image(i)) for i in data.items("train")[:6]])
    prompts = model.tokenize([data.prompt(name) for name in NAMES])
    plain.requires_grad_(True)
    with torch.enable_grad():
        x, w = (other.towers[t].run(b) for t, b in (("vision", pixels), ("text", prompts)))
        logits = torch.cosine_similarity(x[:, None], w[None], dim=2) * plain.logit_scale.exp()
        torch.nn.functional.cross_entropy(logits, torch.arange(6)).backward()
    for row in table.itertuples():
        block = other.towers[row.tower].blocks[int(row.position) - 1]
        squares = [(p.grad.square().sum().item(), p.square().sum().item())
                   for p in block.parameters()]  # fmt: skip
        expected = np.sqrt(sum(g for g, _ in squares) / sum(p for _, p in squares))
        assert row.value == pytest.approx(expected, rel=1e-3)
        assert (row.low, row.high) == pytest.approx((row.value, row.value), rel=1e-3)
    assert abs(table["null"] / table["value"] - 1).max() > 0.02
    assert len(table) == sum(tower.depth for tower in model.towers.values())


def test_labels_that_say_nothing_leave_gradient_norms_at_their_null() -> None:
    """All images are one: shuffled labels are as good. Ten batches of two or three differ."""
    data = Alike(names=NAMES, count=24, captioned=False)
    data.one = True
    table = examine(
        tiny.model("clip"), data, metrics="relative_gradient_norm", items=24, progress=False
    )
    assert table["null"].to_numpy() == pytest.approx(table["value"].to_numpy(), rel=1e-5)
    assert (table["low"] < table["value"]).all() and (table["low"] >= 0).all()


def test_the_interval_of_gradient_norms_is_that_of_a_mean_over_batches(monkeypatch) -> None:
    of, batches = gradients._norms_of_batch, []
    monkeypatch.setattr(
        gradients, "_norms_of_batch", lambda *given: batches.append(of(*given)) or batches[-1]
    )
    table = examine(
        tiny.model("clip"), drawn(), metrics="relative_gradient_norm", items=24, progress=False
    )
    own, shuffled = np.moveaxis(np.array(batches), 1, 0)
    low, high = stats.t.interval(0.95, len(own) - 1, own.mean(0), stats.sem(own))
    expected = np.stack([own.mean(0), low.clip(0), high, shuffled.mean(0)], axis=1)
    assert table[["value", "low", "high", "null"]].to_numpy() == pytest.approx(expected)


def test_the_gradient_norm_is_a_ratio_of_two_lengths() -> None:
    ratio = METRICS["relative_gradient_norm"].function
    assert ratio(np.array([3.0, 4.0]), np.array([0.0, 10.0])) == pytest.approx(0.5)
    with pytest.raises(UserError, match="all zero"):
        ratio(np.ones(3), np.zeros(3))
    with pytest.raises(UserError, match="differ"):
        ratio(np.ones(3), np.ones(2))


def test_gradient_norms_refuse_what_has_none_to_tell() -> None:
    half = tiny.model("clip")
    half.clip.half()
    for model, data, message in (
        (half, drawn(), "does not fit float16"),
        (tiny.model("clip"), Drawn(names=NAMES, count=3, captioned=False), "4 images"),
    ):
        with pytest.raises(UserError, match=message):
            examine(model, data, metrics="relative_gradient_norm", items=24, progress=False)


@pytest.mark.parametrize("held", [torch.inference_mode, torch.no_grad])
def test_gradients_do_not_depend_on_what_the_caller_holds(held: type) -> None:
    model = load_model("mini-clip")
    given = {
        "metrics": ["gradient_alignment", "relative_gradient_norm"],
        "items": 24,
        "progress": False,
    }
    expected = examine(model, "textures", "val", **given)
    with held():
        found = examine(model, "textures", "val", **given)
    assert np.array_equal(found["value"], expected["value"])


def test_halves_of_classes_need_two_each() -> None:
    with pytest.raises(UserError, match="needs 4 classes"):
        examine(tiny.model("clip"), DrawnManifest(), metrics="gradient_alignment", items=12,
                progress=False)  # fmt: skip
