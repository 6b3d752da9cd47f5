"""Export: what other code reads gives what the method gives."""

from __future__ import annotations

import json
import shlex
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from backbones import saved_backbone, shared_backbone, some_images
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from stepping import TASK
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from vlmadapters import MMAConfig
from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.task import Task, TaskData
from vlmadapters.device import own_modes
from vlmadapters.export import class_embeddings, export, merged_weights
from vlmadapters.files import save_method
from vlmadapters.methods import BUILT_IN, METHODS
from vlmlayers import cli
from vlmlayers.errors import UserError
from vlmlayers.models import load_model
from vlmlayers.words import WIDTH

MERGED = {"cliplora"}
TEXT_ALONE = {"zero-shot", "coop", "kgcoop", "proda"}  # LASP trains norms of the vision tower
NAMED = ("golden_retriever", "grey_owl", "red_bus", "sea_lion")
NAMES = [name for name in BUILT_IN if name not in ("tip", "tip-f", "linear-probe")]


def _built(name: str, **settings: Any) -> Any:
    """Return a method whose every parameter was moved, in evaluation mode."""
    model = shared_backbone()
    backbone = Backbone(model.clip, tokenizer=model.tokenizer)
    depths = {tower: walk.tower.depth for tower, walk in backbone.walks.items()}
    config = METHODS.config(name).published(depths, **settings)
    method = METHODS[name].build(config, backbone, TASK, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in method.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    method.touch()
    return method.eval()


@torch.no_grad()
def _logits(method: Any, images: Tensor) -> Tensor:
    model = shared_backbone()
    backbone = Backbone(model.clip, tokenizer=model.tokenizer)
    start = method.first(backbone, "vision")
    found: Tensor = method.logits(
        backbone,
        method.image_features(backbone, backbone.images(images, [start])[start]),
        method.class_features(backbone, method.prepare(backbone, TASK)),
    )
    return found


@pytest.mark.parametrize("name", ["coop", "cliplora"])
def test_a_callers_precision_enters_no_export(name: str, tmp_path: Path) -> None:
    """In bfloat16 the embeddings of classes gave no logits, and another form was written."""
    model = shared_backbone()
    file = save_method(tmp_path / "adapter", _built(name), model, TASK)
    plain, within = (tmp_path / f"{one}.safetensors" for one in ("plain", "within"))
    form = export(file, model, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert export(file, model, within) == form
    assert plain.read_bytes() == within.read_bytes()


def test_what_the_caller_has_set_for_products_of_a_gpu_is_set_aside() -> None:
    torch.set_float32_matmul_precision("high")
    with own_modes():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


@torch.no_grad()
def test_merged_weights_give_the_logits_of_the_adapted_model(tmp_path: Path) -> None:
    model, method = shared_backbone(), _built("cliplora", matrices=("q", "v", "o"))
    file = save_method(tmp_path / "lora", method, model, TASK)
    assert export(file, model, tmp_path / "merged.safetensors") == "merged"
    clip, images = deepcopy(model.clip), some_images(model, 4)
    clip.load_state_dict(load_file(tmp_path / "merged.safetensors"), strict=True)
    texts = model.tokenizer(TASK.prompts())
    v, t = (F.normalize(x, dim=-1) for x in (clip.encode_image(images), clip.encode_text(texts)))
    expected = _logits(method, images)
    torch.testing.assert_close(clip.logit_scale.exp() * v @ t.T, expected, atol=1e-3, rtol=1e-4)
    plain = F.normalize(model.clip.encode_image(images), dim=-1)
    assert (v - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_method_exports_its_classes_or_says_in_one_line_why_not(name: str) -> None:
    model, method = shared_backbone(), _built(name)
    assert method.config.mergeable == (name in MERGED)
    if name not in MERGED:
        with pytest.raises(UserError, match="beside the backbone's weights"):
            merged_weights(method, model)
    if name not in TEXT_ALONE:
        with pytest.raises(UserError, match="changes more than the classes' embeddings"):
            class_embeddings(method, model, TASK)
        return
    images = some_images(model, 4)
    found = class_embeddings(method, model, TASK)
    unit = F.normalize(model.clip.encode_image(images), dim=-1)
    made = found["scale"] * unit @ found["class_embeddings"].T
    torch.testing.assert_close(made, _logits(method, images), atol=1e-2, rtol=1e-3)


@torch.no_grad()
def test_a_placement_of_the_text_tower_alone_exports_classes() -> None:
    method = _built("mma")
    config = method.config.with_placement((), (2, 3))
    model = shared_backbone()
    backbone = Backbone(model.clip, tokenizer=model.tokenizer)
    text = METHODS["mma"].build(config, backbone, TASK).eval()
    images = some_images(model, 3)
    found = class_embeddings(text, model, TASK)
    unit = F.normalize(model.clip.encode_image(images), dim=-1)
    made = found["scale"] * unit @ found["class_embeddings"].T
    torch.testing.assert_close(made, _logits(text, images), atol=1e-2, rtol=1e-3)


@torch.no_grad()
def test_classes_for_a_backbone_with_a_bias_of_logits_hold_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As SigLIP's: it is one number for all classes, and no change of image features."""
    model, method = shared_backbone(), _built("coop")
    monkeypatch.setattr(model.clip, "logit_bias", torch.nn.Parameter(torch.tensor(-10.0)))
    images = some_images(model, 4)
    found = class_embeddings(method, model, TASK)
    unit = F.normalize(model.clip.encode_image(images), dim=-1)
    made = found["scale"] * unit @ found["class_embeddings"].T + found["bias"]
    torch.testing.assert_close(made, _logits(method, images), atol=1e-2, rtol=1e-3)


def test_the_first_form_that_a_method_allows_is_written_with_names(tmp_path: Path) -> None:
    model = shared_backbone()
    coop = save_method(tmp_path / "coop", _built("coop"), model, TASK)
    assert export(coop, model, tmp_path / "c.safetensors") == "classes"
    assert export(coop, model, tmp_path / "d.safetensors", classes=["dog", "owl"]) == "classes"
    for file, names in (("c", list(TASK.class_names)), ("d", ["dog", "owl"])):
        with safe_open(tmp_path / f"{file}.safetensors", framework="pt") as opened:
            assert json.loads(opened.metadata()["description"])["class_names"] == names
            assert opened.get_tensor("class_embeddings").shape == (len(names), 32)
    mma = save_method(tmp_path / "mma", _built("mma"), model, TASK)
    assert export(mma, model, tmp_path / "m.pth.tar") == "official"
    keys = torch.load(tmp_path / "m.pth.tar", weights_only=True)["state_dict"]
    assert any(key.startswith("shared_adapter") for key in keys)
    with pytest.raises(UserError, match="MMA computes beside .* export it as official .form="):
        export(mma, model, tmp_path / "x", form="merged")
    with pytest.raises(UserError, match="unknown form 'merge'; did you mean 'merged'"):
        export(mma, model, tmp_path / "x", form="merge")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "settings", "needed"),
    [
        ("mma", {"scale": 0.3, "pairs": [(2, 3)]}, ["scale=0.3"]),
        ("coop", {"text": (2,), "class_at": "front"}, ["words=a photo of a", "class_at=front"]),
        ("coop", {"words": "", "length": 2, "class_specific": True}, []),
        ("cocoop", {"text": (2,)}, ["words=a photo of a"]),
        ("kgcoop", {"words": "", "class_at": "middle"}, ["class_at=middle"]),
        ("proda", {"prompts": 8, "length": 2, "as_published": True}, ["as_published=true"]),
        ("lasp", {"words": "", "length": 3, "correction": False}, []),
        (
            "lasp",
            {"words": "itap of", "other_names": "virtual", "as_published": True},
            ["words=itap of", "other_names=virtual", "as_published=true"],
        ),
        ("ivlp", {"words": "an origami of one", "text_length": 3}, ["words=an origami of one"]),
        ("promptsrc", {"words": "", "text_length": 2}, ["words="]),
        ("maple", {"vision": (1, 2), "text": (1,), "words": ""}, ["text=[1]", "words="]),
        ("maple", {"vision": (1, 2), "text": (), "length": 3}, ["text=[]"]),
        ("cliplora", {"rank": 3, "alpha": 2.0, "matrices": ("v",)}, []),
        ("lweib", {"alpha": 0.5, "descriptions": "FILE"}, ["alpha=0.5", "descriptions=FILE"]),
        ("rpo", {"pairs": 3}, ["vision=[1,2,3]", "text=[1,2,3]"]),
        (
            "rpo",
            {"vision": (1, 2), "text": (2,), "as_published": True},
            ["vision=[1,2]", "text=[2]", "as_published=true"],
        ),
        ("clipadapter", {"ratio": 0.7}, ["ratio=0.7"]),
        ("clipadapter", {"ratio": 0.2, "text_ratio": 0.5}, ["text_ratio=0.5"]),
    ],
)
def test_the_authors_layout_says_what_it_leaves_out_and_evaluate_takes_it(
    name: str,
    settings: dict[str, Any],
    needed: list[str],
    tmp_path: Path,
) -> None:
    """The same file answers as ours does where all that is said of it is given beside it."""
    ours, theirs = tmp_path / "a.safetensors", tmp_path / "a.pth.tar"
    folder = saved_backbone(tmp_path / "model")
    model = load_model(str(folder))
    backbone = Backbone(model.clip, tokenizer=model.tokenizer)
    depths = {tower: walk.tower.depth for tower, walk in backbone.walks.items()}
    if "descriptions" in settings:
        (tmp_path / "said.json").write_text(json.dumps({one: [f"{one} one."] for one in NAMED}))
        settings = settings | {"descriptions": str(tmp_path / "said.json")}
    config = replace(METHODS.config(name).published(depths), **settings)
    needed = [one.replace("FILE", str(getattr(config, "descriptions", ""))) for one in needed]
    data = _dataset(tmp_path / "data")
    task = TaskData(str(data), model).task("base", "an image of {}.")
    method = METHODS[name].build(config, backbone, task, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in method.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    save_method(ours, method, model, task)
    said = _called("export", folder, ours, "--form", "official", "--out", theirs)
    for line in said.splitlines():  # what is copied stays whole: the path, and the options
        assert len(line) <= WIDTH or str(theirs) in line or line.startswith("--method")
    beside = shlex.split(said.partition(" takes it with")[2].partition(";")[0])
    template = ["--template", task.template]
    assert beside == ["--method", name, *template, *(w for one in needed for w in ("--set", one))]
    test = ["evaluate", folder, data, "--kind", "base", "--adapter"]
    _called(*test, ours, "--out", tmp_path / "ours.csv")
    _called(*test, theirs, *beside, "--out", tmp_path / "theirs.csv")
    tables = [pd.read_csv(tmp_path / f"{one}.csv") for one in ("ours", "theirs")]
    left, right = (one["log_likelihood"].tolist() for one in tables)
    assert left == pytest.approx(right, abs=1e-5)


def test_adapters_are_tested_with_the_template_of_their_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(str(saved_backbone(tmp_path / "model")))
    backbone, data = Backbone(model.clip, tokenizer=model.tokenizer), _dataset(tmp_path / "data")
    test, both = ["evaluate", tmp_path / "model", data, "--kind", "base"], list[Any]()
    for number, template in enumerate(["a drawing of {}", "a photo of a {}."]):
        task = TaskData(str(data), model).task("base", template)
        method = METHODS["mma"].build(MMAConfig.span(1, 2), backbone, task, seed=1)
        both += ["--adapter", save_method(tmp_path / f"{number}.safetensors", method, model, task)]

    def told() -> list[str]:
        return [said for said in caplog.messages if "weights that nobody trained" not in said]

    _called(*test, *both[:2], "--out", tmp_path / "own.csv")
    # The first row, zero-shot CLIP, is what the others' `changed` is counted against.
    table = pd.read_csv(tmp_path / "own.csv")
    own = table[table["method"] != "zero-shot CLIP, dataset template"]
    assert list(own["template"]) == ["a drawing of {}"] * 2
    with pytest.raises(UserError, match=r"with 2 templates .*; name one by --template"):
        _called(*test, *both)
    assert not told()
    _called(*test, *both, "--template", "a photo of a {}.")
    assert [said.partition(" was ")[2] for said in told()] == [
        "trained with 'a drawing of {}' and is tested with 'a photo of a {}.'"
    ]


def test_an_adapter_of_an_untrained_backbone_is_said_to_be_one(tmp_path: Path) -> None:
    model = load_model("mini-clip", random_weights=True)
    backbone = Backbone(model.clip, tokenizer=model.tokenizer)
    task = TaskData("faces", model).task("base", "a photo of a {}.")
    method = METHODS["mma"].build(MMAConfig.span(5, 12), backbone, task, seed=1)
    save_method(tmp_path / "a.safetensors", method, model, task)
    words = ("export", "mini-clip", tmp_path / "a.safetensors", "--out", tmp_path / "a.pth.tar")
    assert _called(*words, "--random-weights").startswith("RANDOM WEIGHTS, nothing here says")


def _dataset(folder: Path) -> Path:
    """Draw test images of classes whose names have underscores, and return their folder."""
    generator = np.random.default_rng(0)
    for name in NAMED:
        (folder / "test" / name).mkdir(parents=True)
        for number in range(2):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "test" / name / f"{number}.png")
    return folder


def _called(*words: Any) -> str:
    result = CliRunner().invoke(cli.app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout.strip()


def test_what_is_wrong_on_the_command_line_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    for words, message in (
        (("absent.safetensors",), f"looked for {Path.cwd()}"),
        ((tmp_path / "a.safetensors",), "cannot read the adapter"),
        ((tmp_path / "a.safetensors", "--form", "merge"), "did you mean 'merged'"),
        ((tmp_path / "a.safetensors", "--form", "merged", "--classes", "a"), "embeds none"),
    ):
        monkeypatch.setattr(
            sys, "argv", ["vlmlayers", "export", "mini-clip", *map(str, words), "--out", "x"]
        )
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize("name", ["tip", "linear-probe"])
@pytest.mark.parametrize("form", [None, "classes"])
@pytest.mark.parametrize("file", ["m.safetensors", "m.pth.tar"])
def test_what_has_no_form_of_export_is_said_in_one_go(
    name: str, form: str | None, file: str, tmp_path: Path
) -> None:
    model = shared_backbone()
    method = METHODS[name].build(METHODS[name].Config(), Backbone(model.clip), TASK)
    path = save_method(tmp_path / name, method, model, TASK)
    with pytest.raises(UserError, match="no form of export is left; test it with"):
        export(path, model, tmp_path / file, form=form)


def test_a_file_is_not_named_for_another_format_than_it_gets(tmp_path: Path) -> None:
    model = shared_backbone()
    mma = save_method(tmp_path / "mma", _built("mma"), model, TASK)
    with pytest.raises(UserError, match="MMA is written in its .* name it m.pth.tar"):
        export(mma, model, tmp_path / "m.safetensors")
    coop = save_method(tmp_path / "coop", _built("coop"), model, TASK)
    with pytest.raises(UserError, match=r"CoOp is written as safetensors .*\*.safetensors"):
        export(coop, model, tmp_path / "m.pt")
    assert {path.stem for path in tmp_path.iterdir()} == {"mma", "coop"}


def test_an_adapter_that_is_not_there_or_names_no_class_is_said_to_be_so(tmp_path: Path) -> None:
    """The first was a traceback where the file to write was there, the second one of torch."""
    (tmp_path / "x.safetensors").write_bytes(b"of an earlier export")
    with pytest.raises(UserError, match="cannot read the adapter"):
        export(tmp_path / "no.safetensors", shared_backbone(), tmp_path / "x.safetensors")
    model, kind = shared_backbone(), METHODS["tip"]
    bare = kind.build(kind.Config(), Backbone(model.clip), Task())
    path = save_method(tmp_path / "bare", bare, model)
    with pytest.raises(UserError, match="saved without its classes; name some"):
        export(path, model, tmp_path / "x.safetensors", form="classes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "official", "classes": NAMED}, "form 'official' embeds none; leave one out"),
        ({"classes": ()}, "name no class, or an empty one"),
        ({"classes": ("owl", " ")}, "name no class, or an empty one"),
        ({"classes": ("owl", "bus", "owl")}, "classes name 'owl' 2 times"),
        (
            {"classes": ("sea_lion", "owl", "Sea lion")},
            "which text cannot tell apart: 'sea_lion', ",
        ),
        ({"classes": 3}, "classes takes strings or None, not 3"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = shared_backbone()
    coop = save_method(tmp_path / "coop", _built("coop"), model, TASK)
    with pytest.raises(UserError, match=message):
        export(coop, model, tmp_path / "x.safetensors", **options)
    with pytest.raises(UserError, match="is the adapter itself, which would be lost"):
        export(coop, model, tmp_path / "." / coop.name)
    assert export(coop, model, tmp_path / "x.safetensors", classes="grey_owl") == "classes"
    with pytest.raises(UserError, match="cannot read the adapter"):  # beside a file of that name
        export(tmp_path / "none.safetensors", model, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["description"])["class_names"] == ["grey_owl"]
