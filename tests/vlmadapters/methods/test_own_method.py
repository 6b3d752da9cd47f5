"""A method of a user's own, in a file outside the repository, goes the whole way."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from backbones import shared_backbone
from typer.testing import CliRunner

import vlmadapters as va
from vlmadapters.cli import train as verbs
from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.task import Task, TaskData
from vlmadapters.files import load_method, read_info, save_method
from vlmadapters.training.recipes import TrainConfig
from vlmadapters.training.trainer import Trainer
from vlmlayers.cli import app
from vlmlayers.errors import UserError
from vlmlayers.features import TowerFeatures, open_features
from vlmlayers.models import extract, load_model

DROPPED = 'nn.functional.dropout(self.shifts[f"{tower}{block}"](out), training=self.training)'


@pytest.fixture(autouse=True)
def _new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of other tests are not known."""
    monkeypatch.setattr(va.METHODS, "_registered", {})
    monkeypatch.setattr(va.METHODS, "_packaged", {})


@pytest.fixture
def own(repository: Path, tmp_path: Path) -> Path:
    """The example of CONTRIBUTING.md as a file."""
    section = (repository / "CONTRIBUTING.md").read_text().split("## Add a method")[1]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    file = tmp_path / "my_method.py"
    file.write_text(code)
    return file


def test_the_example_trains_is_saved_and_is_evaluated(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "load_backbone", lambda *_: shared_backbone())
    words = [
        "train",
        "ViT-B-16",
        "--random-weights",
        "faces",
        "--out",
        str(tmp_path / "run"),
        "--method",
        f"{own}:Shift",
    ]
    words += ["--placement", "2-3", "--seeds", "1", "--items", "20", "--quiet"]
    small = ["epochs=2", "shots=2", "lr=2.0", "crop_scale=0.9,1"]
    words += [part for setting in small for part in ("--set", setting)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "run" / "results.csv")
    trained = table[table["method"] == "Shift"]
    assert list(trained["split_kind"]) == ["base", "novel"]
    assert set(trained["placement"]) == {"v2-3,t2-3"} and set(trained["parameters"]) == {192}
    assert set(trained["settings"]) == {"scale=1.0"} and (trained["changed"] > 0).all()
    (file,) = (tmp_path / "run" / "adapters").glob("*.safetensors")
    assert read_info(file).config.name == "shift"
    assert load_method(file, shared_backbone()).parameter_count() == 192
    words = ["evaluate", "ViT-B-16", "--random-weights", "faces", "--adapter", str(file)]
    done = CliRunner().invoke(app, [*words, "--items", "20", "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0 and "Shift" in done.output


def cells(own: Path, out: Path) -> pd.DataFrame:
    recipe = va.load_recipe("published", f"{own}:Shift").at("2-3")
    return va.train(
        shared_backbone(),
        "faces",
        recipe.changed({"epochs": 1, "shots": 1, "lr": 2.0}),
        out,
        seeds=[1],
        items=10,
        progress=False,
    )


def test_changed_code_is_trained_again_and_comments_are_not(
    own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, code = tmp_path / "run", own.read_text()
    first = cells(own, out)
    own.write_text(code.replace("class Shift(", "# a remark\nclass Shift("))
    pd.testing.assert_frame_equal(cells(own, out), first)
    assert len(list((out / "cells").glob("faces-shift-*"))) == 1
    own.write_text(code.replace("return out +", "return out -"))
    other = cells(own, out)
    assert len(list((out / "cells").glob("faces-shift-*"))) == 2
    assert "leaves out 1 finished cell of another recipe, method or code of it" in caplog.text
    assert len(other) == len(first)


def test_a_whole_number_is_the_same_setting_as_the_float(own: Path) -> None:
    method = f"{own}:Shift"
    whole, exact = (
        va.load_recipe("published", method).changed({}, {"scale": value}) for value in (3, 3.0)
    )
    assert whole.method.to_dict() == exact.method.to_dict()
    assert type(whole.method.settings()["scale"]) is float


def test_draws_of_torchs_own_generator_follow_the_seed(own: Path) -> None:
    """Weights of `nn.Linear` and dropout are drawn from it, where no one says otherwise."""
    code = own.read_text().replace("nn.Parameter(torch.zeros(widths[t]))", "nn.Linear(64, 64)")
    own.write_text(code.replace('self.shifts[f"{tower}{block}"]', DROPPED))
    recipe = va.load_recipe("published", f"{own}:Shift").at("v2")
    recipe = recipe.changed({"epochs": 1, "shots": 2})

    def trained(*seeds: int) -> list[float]:
        torch.rand(1)
        table = va.train(shared_backbone(), "faces", recipe, seeds=seeds, items=10, progress=False)
        return list(table.loc[table["seed"] == seeds[-1], "log_likelihood"])

    state = torch.random.get_rng_state()
    second = trained(2)
    assert trained(1, 2) == second != trained(1)
    torch.random.set_rng_state(state)


def test_what_ends_an_epoch_and_a_training_draws_as_the_seed_says(own: Path) -> None:
    """Measuring a step draws too: of the caller's generators nothing is taken."""
    dropped = DROPPED.replace("](out)", "]")
    code = own.read_text().replace('self.shifts[f"{tower}{block}"]', dropped)
    own.write_text(
        code.replace(
            "    def reads_norm",
            "        self.register_buffer('drawn', torch.zeros(0))\n"
            "    def end_epoch(self, epoch, epochs):\n"
            "        self.drawn = torch.cat([self.drawn, torch.rand(1)])\n"
            "    def finish(self, data):\n"
            "        self.drawn = torch.cat([self.drawn, torch.rand(1)])\n"
            "    def reads_norm",
        )
    )
    config = va.METHODS[f"{own}:Shift"].Config(vision=(2,))
    train, data = TrainConfig(epochs=2, shots=2), TaskData("faces", shared_backbone(), None)
    shots, task = data.shots(2, 1, "base"), data.task("base", train.template)

    def drawn(seed: int) -> list[float]:
        given = shared_backbone(), data.images, shots, task, [config], train, seed
        (result,) = Trainer(*given, progress=False).fit()
        return result.method.drawn.tolist()

    first, state = drawn(1), torch.get_rng_state()
    torch.rand(1)
    assert drawn(1) == first and len({*first, *drawn(2)}) == 6
    torch.set_rng_state(state)
    drawn(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_step_may_need_several_images_and_counts_only_in_training(own: Path) -> None:
    code = own.read_text().replace(
        "    def reads_norm",
        "        self.register_buffer('steps', torch.zeros(()))\n"
        "    def loss_parts(self, step):\n"
        "        if len(step.labels) < 2: raise ValueError('compares images')\n"
        "        self.steps += 1\n"
        "        return super().loss_parts(step)\n"
        "    def reads_norm",
    )
    own.write_text(code)
    config = va.METHODS[f"{own}:Shift"].Config(vision=(2,))
    train = TrainConfig(epochs=2, batch_size=3, shots=2)
    data = TaskData("faces", shared_backbone(), None)
    shots, task = data.shots(2, 1, "base"), data.task("base", train.template)
    made = Trainer(shared_backbone(), data.images, shots, task, [config], train, 1, progress=False)
    (result,) = made.fit()
    assert int(result.method.steps) == len(result.losses) > 1


def test_an_adapter_in_a_new_process_names_its_class(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = va.METHODS[f"{own}:Shift"].Config(vision=(2,))
    model = shared_backbone()
    method = va.METHODS["shift"].build(config, Backbone(model.clip), Task(("a", "b")))
    file = save_method(tmp_path / "shift", method, model, Task(("a", "b")))
    monkeypatch.setattr("vlmadapters.cli.train.load_backbone", lambda *_: model)
    monkeypatch.setattr("vlmadapters.cli.export.load_backbone", lambda *_: model)
    words = ["ViT-B-16", "--random-weights"]
    tested = ["evaluate", *words, "faces", "--adapter", str(file), "--items", "4", "--quiet"]
    exported = ["export", *words, str(file), "--out", str(tmp_path / "classes.safetensors")]
    for verb in (tested, exported):
        va.METHODS._registered.clear()  # as in a new process
        done = CliRunner().invoke(app, verb)
        assert isinstance(done.exception, UserError) or done.exit_code == 2
        said = str(done.exception) + done.output
        assert "'shift', which is not known here" in said and "--method my_method.py:Mine" in said
        done = CliRunner().invoke(app, [*verb, "--method", f"{own}:Shift"])
        # The example keeps to no form that could be exported, which its class alone tells.
        said = str(done.exception) + done.output
        assert "Shift computes beside" in said if verb is exported else done.exit_code == 0


def test_features_of_an_adapter_of_an_own_method(own: Path, tmp_path: Path) -> None:
    model = load_model("mini-clip")
    config = va.METHODS[f"{own}:Shift"].Config(vision=(2,))
    method = va.METHODS["shift"].build(config, Backbone(model.clip), Task(("a", "b")))
    (shift,) = method.parameters()
    shift.data.fill_(0.5)
    file = save_method(tmp_path / "shift", method, model, Task(("a", "b")))
    plain = extract(model, "digits", "val", items=4, tower="vision", progress=False)

    def features(*more: str, code: str = own.read_text()) -> TowerFeatures:
        own.write_text(code)
        va.METHODS._registered.clear()  # as in a new process
        words = ["extract", "mini-clip", "digits", "--items", "4", "--split", "val"]
        words += ["--tower", "vision", "--out", str(tmp_path / "run"), "--quiet"]
        done = CliRunner().invoke(app, [*words, "--adapter", str(file), *more])
        if done.exit_code:
            raise done.exception or AssertionError(done.output)
        (store,) = (tmp_path / "run" / "features").iterdir()
        return open_features(store).tower("vision")

    with pytest.raises(UserError, match="--method my_method.py:Mine"):
        features()
    alone = ["extract", "mini-clip", "digits", "--out", str(tmp_path / "x"), "--method", "mma"]
    assert "name that by --adapter" in str(CliRunner().invoke(app, alone).exception)
    named = ("--method", f"{own}:Shift")
    before, after = (tower.array("2") for tower in (plain.vision, features(*named)))
    np.testing.assert_allclose(after, before + 0.5, atol=1e-5)
    # Other code makes other features of the same file: none of the store is taken for them.
    other = own.read_text().replace("out + self.config", "out - self.config")
    with pytest.raises(UserError, match="belongs to another extraction"):
        features(*named, code=other)
    after = features(*named, "--force", code=other).array("2")
    np.testing.assert_allclose(after, before - 0.5, atol=1e-5)
    # What else it changes no hook can.
    other += "\n    def logits(self, backbone, images, classes):\n        return images\n"
    with pytest.raises(UserError, match="Shift changes more than the blocks of a tower"):
        features(*named, "--force", code=other)


def test_a_void_run_names_no_recipe_that_the_method_lacks(own: Path) -> None:
    recipe = va.load_recipe("published", f"{own}:Shift")
    still = recipe.changed({"lr": 1e-12, "shots": 2, "epochs": 1})
    found = va.validate(
        shared_backbone(), "2", "faces", recipe=still, seeds=[1], items=8, reference="all",
        kinds=["all"], amount="given", progress=False,
    )  # fmt: skip
    assert found.void and "--set lr=1e-11" in found.verdict and "mini" not in found.verdict


def test_a_file_of_postponed_annotations_and_of_another_methods_name(
    own: Path, tmp_path: Path
) -> None:
    code = "from __future__ import annotations\n" + own.read_text()
    own.write_text(code)
    assert va.METHODS[f"{own}:Shift"].Config(vision=(2,)).scale == 1.0
    own.write_text(code.replace('"shift"', '"mma"'))
    with pytest.raises(UserError, match="a method named 'mma' is known already; .* in its Config"):
        va.METHODS[f"{own}:Shift"]
    assert va.METHODS["mma"].Config is va.MMAConfig
    # Without one of its own it is that of the base class: its rows were zero-shot CLIP's.
    own.write_text(re.sub(r"    title: .*\n", "", code))
    with pytest.raises(UserError, match="has the title 'zero-shot CLIP' of 'zero-shot'"):
        va.METHODS[f"{own}:Shift"]
    own.write_text(code)
    other = tmp_path / "other" / own.name
    other.parent.mkdir()
    other.write_text(code)
    with pytest.raises(UserError, match="a method named 'shift' is known already"):
        va.METHODS[f"{other}:Shift"]
    own.write_text(code + "\nmissing_name\n")
    with pytest.raises(UserError, match=r"fails on import \(line \d+\): NameError: name 'missing"):
        va.METHODS[f"{own}:Shift"]


@pytest.mark.parametrize(
    ("where", "named", "said"),
    [
        ("offered:Shift", "other", "whose Config is named 'shift'; give both one name"),
        ("offered:Lost", "shift", "cannot be read: offered:Lost fails with AttributeError"),
        ("offered:ShiftConfig", "shift", "is not a method"),
    ],
)
def test_a_package_is_told_what_is_wrong_with_its_entry_point(
    own: Path, monkeypatch: pytest.MonkeyPatch, where: str, named: str, said: str
) -> None:
    own.rename(own.with_name("offered.py"))
    monkeypatch.syspath_prepend(own.parent)
    monkeypatch.setattr(type(va.METHODS), "_offered", lambda _: {named: where})
    with pytest.raises(UserError, match=said):
        va.METHODS[named]


def test_what_is_no_method_is_refused(own: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a method; it has to be a subclass"):
        va.METHODS[f"{own}:ShiftConfig"]
    with pytest.raises(UserError, match="did you mean 'Shift'"):
        va.METHODS[f"{own}:Shaft"]
    with pytest.raises(UserError, match="method file .* does not exist"):
        va.METHODS[f"{tmp_path}/absent.py:Shift"]
    with pytest.raises(UserError, match="a method named 'mma' is known already"):

        class Mine(va.Method):
            Config = va.MMAConfig

        va.METHODS.register(Mine)
