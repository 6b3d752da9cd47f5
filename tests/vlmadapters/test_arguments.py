"""Natural Python calls: taken as meant, or refused in one line before any work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from backbones import shared_backbone

import vlmadapters as va
from vlmadapters.protocols.results import COLUMNS
from vlmlayers.errors import UserError
from vlmlayers.manifests import Manifest

FACES = Manifest.load("faces")
QUICK: dict[str, Any] = {"items": 10, "progress": False}


RESULTS = pd.DataFrame([dict.fromkeys(COLUMNS, 0)])


def logits(images: Callable[[Any], Any], tokens: Callable[[Any], Any] = lambda ids: ids) -> Any:
    """Return class logits of what fits, changed."""
    clip, towers = shared_backbone().clip, shared_backbone().towers
    return va.class_logits(
        clip, images(towers["vision"].example(2)), tokens(towers["text"].example(2))
    )


def train(datasets: Any = "faces", **options: Any) -> Any:
    return va.train(shared_backbone(), datasets, **QUICK | options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train("/data/pics", placement="2"), "/data/pics does not exist"),
        (
            lambda: va.base_to_novel(shared_backbone(), "/data/pics", placement="2"),
            "/data/pics does not exist",
        ),
        (lambda: va.attach(shared_backbone(), None).__enter__(), "such as `model.clip`, not"),  # type: ignore[arg-type]
        (lambda: train(recipe="minni"), "did you mean 'mini'"),
        (lambda: train(recipe=3), "its name or its path, or one of each method or None, not 3"),
        (lambda: train(placement="3-2"), "the block range 3-2 is reversed; write 2-3"),
        (lambda: train(placement="2-13"), "names vision block 4, but the vision tower has 3"),
        (lambda: train(placement="2", configs=va.MMAConfig.span(2, 3)), "configs or placement"),
        (lambda: train(method="mmma"), "did you mean 'mma'"),
        (lambda: train(protocol="fewshot"), "did you mean 'few-shot'"),
        (lambda: train(protocol="cross-dataset"), "needs target datasets"),
        (lambda: train(targets=["faces"]), "base-to-novel tests .* no target; leave targets out"),
        (lambda: train(seedz=1), "did you mean 'seeds'"),
        (lambda: train(shots=4), r"takes no shots; .* recipe=load_recipe\('published'\).changed"),
        (lambda: train(seeds=-1, placement="2"), "seeds is -1; at least 0 is needed"),
        (lambda: train(seeds=2**63, placement="2"), "at most 9223372036854775807 is needed"),
        (lambda: va.search(shared_backbone(), "faces", seeds=-1), "at least 0 is needed"),
        (lambda: va.validate(shared_backbone(), "2", "faces", seeds=-1), "at least 0 is needed"),
        (lambda: va.validate(shared_backbone(), "2", "faces", seed=-1), "seed takes a whole num"),
        (lambda: train(seeds=[1, 1, 3]), "'seeds': names 1 twice; a seed again is no new draw"),
        (lambda: va.search(shared_backbone(), "faces", seeds=(2, 2)), "'seeds': names 2 twice"),
        (lambda: va.search(shared_backbone(), "faces", budget=0), "budget is 0"),
        (lambda: va.search(shared_backbone(), "faces", shots=0), "shots is 0; at least 1"),
        (lambda: va.search(shared_backbone(), "faces", placement=7), "such as '5-12'"),
        (
            lambda: va.validate(shared_backbone(), "2", "faces", seeds=(2, 2)),
            "'seeds': names 2 twice",
        ),
        (lambda: train(seeds="one"), "seeds is 'one'; a whole number"),
        (lambda: train(together=0), "together is 0; at least 1 is needed"),
        (lambda: va.train("mini-clip", "faces"), "model takes a model, as `load_model` returns it"),
        (lambda: va.validate(shared_backbone(), "2-13", "faces"), "block 4"),
        (lambda: va.validate(shared_backbone(), None, "faces"), "choice takes a layer choice"),
        (lambda: va.validate(shared_backbone(), "2", "faces", kinds="al"), "did you mean 'all'"),
        (lambda: va.MMAConfig.span("5", 12), "first takes a whole number, not '5'"),
        (lambda: va.MMAConfig("5-12", (5,)), "vision takes whole numbers, not '5-12'"),
        (lambda: va.MMAConfig.span(5, 12, dim="x"), "dim takes a whole number"),
        (lambda: va.few_shot(FACES.items("train"), 1.5, 1), "shots takes a whole number, not 1.5"),
        (lambda: va.attach(shared_backbone(), va.MMAConfig.span(2, 3)).__enter__(), "clip takes"),
        (lambda: va.attach(shared_backbone().clip, "2-3").__enter__(), "config takes MMAConfig"),
        (lambda: va.METHODS["mmma"], "did you mean 'mma'"),
        (
            lambda: va.load_recipe("published", "cliplora").changed({"epochs": 3}, {}),
            "epochs is not read: steps_per_shot counts the steps",
        ),
        (lambda: va.load_recipe().changed({"eps": 1e-4}, {}), "eps is not read: the optimizer is"),
        (lambda: va.load_recipe().changed({"warmup_lr": 1e-4}, {}), "there is no warm-up"),
        (
            lambda: va.load_recipe().changed({"schedule": "constant", "final_lr": 1e-4}, {}),
            "final_lr is not read: the schedule is constant",
        ),
        (lambda: va.load_recipe(method="tip").changed({"lr": 1}, {}), "fitted in closed form"),
        (lambda: train(recipe=va.load_recipe(), method="coop"), "recipe is of mma, not of coop"),
        (
            lambda: va.search(shared_backbone(), "faces", recipe=va.load_recipe(), method="coop"),
            "recipe is of mma, not of coop",
        ),
        (
            lambda: va.validate(
                shared_backbone(), "2", "faces", recipe=va.load_recipe(), method="coop"
            ),
            "recipe is of mma, not of coop",
        ),
        (
            lambda: train(configs=va.MMAConfig.span(2, 3), method="coop"),
            "either configs or method, not both",
        ),
        (
            lambda: train(configs=va.MMAConfig.span(2, 3), placement="2"),
            "either configs or placement, not both",
        ),
        (lambda: train([]), "there is no dataset to train"),
        (lambda: train(seeds=[]), "there is no seed to train"),
        (lambda: train(split="train"), "'train' holds the images that are trained on"),
        (lambda: train(split="tets"), "did you mean 'test'"),
        (lambda: train(configs=[]), "there is no setting in configs to train"),
        (lambda: train(placement=[]), "there is no placement to train"),
        (lambda: train(recipe=[]), "there is no recipe to train"),
        (lambda: train(method=[]), "there is no method to train"),
        (lambda: train(placement=[5, 6]), "a placement is text such as '5-12'; this is 5"),
        (
            lambda: train(placement="2", save_adapters=True),
            "saves adapters beside the cells in out",
        ),
        (lambda: va.load_recipe(depths={"vision": 12}), "depths needs the blocks of vision and"),
        (lambda: va.MMAConfig.from_choice(3), "needs the keys 'vision' and 'text'"),
        (lambda: va.METHODS.register(dict), "not a method; it has to be a subclass"),  # type: ignore[type-var]
        (lambda: va.summarise(3), "results takes a results table, as `train` returns it, not 3"),
        (lambda: va.summarise(RESULTS.drop(columns="accuracy")), "lacks accuracy"),
        (lambda: va.summarise(RESULTS.assign(accuracy="high")), "text in the column accuracy"),
        (lambda: va.summarise(RESULTS.assign(accuracy=np.nan)), "has no accuracy in any row"),
        (
            lambda: va.class_logits(shared_backbone(), None, None),
            "clip takes a torch module, such as `model.clip`, not",
        ),
        (
            lambda: logits(lambda x: x[:, :1]),
            r"vision tower takes one item or more as \(item, 3, .*, not \(2, 1, .* of float32 on",
        ),
        (lambda: logits(lambda x: x.byte()), r"of float32 on cpu, not \(2, 3, .* of uint8 on cpu"),
        (lambda: logits(lambda x: x[:0]), r"one item or more as .*, not \(0, 3, "),
        (lambda: logits(lambda x: x, lambda ids: ids[0]), r"text tower takes one .* as \(item, "),
        (
            lambda: logits(lambda x: x, lambda ids: ids.float()),
            "of int64 on cpu, not .* of float32",
        ),
        (lambda: logits(lambda x: x, lambda ids: -ids), "take the tokenizer of the model"),
        (lambda: train(placement=["mma:2", "3"]), "the placement '3' is for no method"),
        (
            lambda: va.validate(shared_backbone(), "2", "faces", amount="given", folds=3),
            "folds is of amounts that are tuned",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_values_that_are_read_beside_others_are_taken() -> None:
    lora = va.load_recipe("published", "cliplora")
    assert lora.changed({"epochs": 3, "steps_per_shot": 0}, {}).train.epochs == 3
    assert va.load_recipe().changed({"optimizer": "adamw", "eps": 1e-4}, {}).train.eps == 1e-4
    assert lora.at("5-12@epochs=3").train.steps_per_shot == 0


def test_a_recipe_file_of_another_method_than_is_named_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('method = "maple"\nextends = "published"\nlr = 0.1\n')
    assert va.load_recipe(tmp_path / "mine.toml").method.name == "maple"
    assert va.load_recipe(tmp_path / "mine.toml", "maple").train.lr == 0.1
    with pytest.raises(UserError, match="is a recipe of maple, not of coop"):
        va.load_recipe(tmp_path / "mine.toml", "coop")


def test_a_bare_value_and_numpy_numbers_are_taken_as_meant() -> None:
    recipe = va.load_recipe("mini").changed({"epochs": 1, "shots": 2}, {})
    found = train(recipe=recipe, seeds=np.int64(1), placement="2-3", together=np.int32(2))
    trained = found[found["method"] == "MMA"]
    assert (set(trained["seed"]), set(trained["placement"])) == ({1}, {"v2-3,t2-3"})
    assert len(va.few_shot(FACES.items("train"), np.int32(2), np.int64(1))) == 2 * len(
        FACES.class_names()
    )


@pytest.mark.parametrize(
    "words",
    [
        ["train", "mini-clip", "nosuch/folder", "--out", "x"],
        ["train", "mini-clip", "faces", "--out", "x", "--placement", "12-5"],
        ["train", "mini-clip", "faces", "--out", "x", "--recipe", "minni"],
        ["train", "mini-clip", "faces", "--out", "x", "--set", "ebochs=1"],
        ["evaluate", "mini-clip", "nosuch/folder"],
        ["evaluate", "mini-clip", "digits", "--method", "coop"],
        ["evaluate", "mini-clip", "digits", "--adapter", "x.pth", "--scale", "1", "--set=scale=2"],
        ["train", "mini-clip", "digits", "--out", "x", "--target", "signs"],
        ["validate", "mini-clip", "nosuch/folder", "--placement", "5-12", "--out", "x"],
        ["validate", "mini-clip", "digits", "--placement", "5-13", "--out", "x"],
        ["validate", "mini-clip", "digits", "--placement=5-12", "--scores=no.csv", "--out", "x"],
        ["search", "mini-clip", "nosuch/folder", "--out", "x"],
        ["search", "mini-clip", "digits", "--placement", "12", "--placement", "5-13", "--out", "x"],
        ["search", "mini-clip", "digits", "--method", "tip", "--out", "x"],
    ],
    ids=" ".join,
)
def test_a_wrong_word_is_refused_before_torch_is_imported(words: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['vlmlayers', *sys.argv[1:]]\n"
        "from vlmlayers.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_every_public_name_says_itself_what_it_is() -> None:
    """A partial function has the words of `functools.partial` where it is given none."""
    for name in va.__all__:
        public = getattr(va, name)
        assert public.__doc__ and public.__doc__ != partial.__doc__, name
