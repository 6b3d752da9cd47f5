"""A flipped byte is detected and its file named; disks, clocks, workers and data may fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from backbones import shared_backbone
from score_tables import full
from starts import content, images, remount
from torch.utils.data import get_worker_info

from vlmadapters.data.task import Task
from vlmadapters.files import load_method, read_info, save_method
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.methods.mma.module import new_adapter
from vlmadapters.protocols.train import base_to_novel
from vlmadapters.training.recipes import Recipe, TrainConfig
from vlmadapters.training.state import load_training_state, save_training_state
from vlmlayers.errors import UserError
from vlmlayers.manifests import Manifest
from vlmlayers.models import extract, stream
from vlmlayers.models import stream as stream_function
from vlmlayers.models.processes import Processes
from vlmlayers.scores import read_scores, write_scores
from vlmlayers.scores.streamed import streamed_scores

CONFIG = MMAConfig.span(2, 3, dim=4, scale=0.3)
RECIPE = Recipe("test", TrainConfig(lr=0.3, epochs=2, batch_size=4, shots=2, save_every=1), CONFIG)
QUIET: dict[str, Any] = {"batch_size": 4, "text": "captions", "progress": False}


def flips(file: Path, count: int = 40) -> Iterator[int]:
    """Flip one bit of a file at places spread over it; put it right after each."""
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    places = {0, 5, len(whole) - 1, *random.integers(0, len(whole), count).tolist()}
    try:
        for place in sorted(places):
            changed = bytearray(whole)
            changed[place] ^= 1 << int(random.integers(8))
            file.write_bytes(changed)
            yield place
    finally:
        file.write_bytes(whole)


def detected(file: Path, read: Callable[[], Any], same: Callable[[Any], bool]) -> int:
    """Return how many flips were refused; the others must not have changed what is read."""
    refused = 0
    for place in flips(file):
        try:
            found = read()
        except UserError as error:
            assert str(file) in str(error), (place, error)
            refused += 1
        else:
            assert same(found), f"byte {place} of {file.name} changed what is read"
    return refused


def test_a_flipped_byte_in_an_adapter(tmp_path: Path) -> None:
    model = shared_backbone()
    adapter = new_adapter(model.clip, CONFIG, seed=3)
    file = save_method(tmp_path / "a.safetensors", adapter, model, Task(("cat", "dog")))
    state = adapter.official_state_dict()

    def same(found: Any) -> bool:
        own = found.official_state_dict()
        return all(torch.equal(own[key], state[key]) for key in state)

    assert detected(file, lambda: load_method(file, model), same) >= 40
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.safetensors is altered: its checksum differs; copy"):
        read_info(file)


def test_a_flipped_byte_in_a_training_state(tmp_path: Path) -> None:
    identity = {"seed": 1}
    state = {"epoch": 1, "step": 2, "runs": [{"losses": [0.5], "adapter": {"w": torch.ones(900)}}]}
    save_training_state(tmp_path, identity, state)

    def same(found: Any) -> bool:
        found.pop("identity")
        return repr(found) == repr(state)

    file = tmp_path / "training.pt"
    # A zip file holds bytes that say nothing, such as times.
    assert detected(file, lambda: load_training_state(tmp_path, identity), same) >= 10
    content = torch.load(file, weights_only=True)
    content["runs"][0]["adapter"]["w"][7] = 2
    torch.save(content, file)
    with pytest.raises(UserError, match=r"training\.pt is altered: its checksum differs; remove"):
        load_training_state(tmp_path, identity)
    for damaged in (b"", b"\0" + file.read_bytes()[1:], file.read_bytes()[:500]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"training\.pt cannot be read as .*; remove it"):
            load_training_state(tmp_path, identity)


def test_a_damaged_training_state_is_not_talked_about_twice(tmp_path: Path) -> None:
    """Torch warns in several lines of a pickle protocol that no one wrote."""
    save_training_state(tmp_path, {"seed": 1}, {"epoch": 1})
    file = tmp_path / "training.pt"
    file.write_bytes(file.read_bytes().replace(b"\x80\x02}", b"\x80\x0a}"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(UserError):
            load_training_state(tmp_path, {"seed": 1})


def test_a_flipped_byte_in_a_cell(tmp_path: Path) -> None:
    options: dict[str, Any] = {"seeds": (1,), "items": 20, "progress": False}
    work = lambda: base_to_novel(shared_backbone(), ["shapes_filled"], RECIPE, tmp_path, **options)  # noqa: E731
    work()
    (cell,) = (p for p in (tmp_path / "cells").iterdir() if "zero-shot" not in p.name)
    text = cell.read_text()
    cell.write_text(text.replace('"accuracy": 0.', '"accuracy": 1.', 1))
    assert cell.read_text() != text
    with pytest.raises(UserError, match=f"{cell.name} is altered: its checksum differs; remove it"):
        work()
    cell.write_text("[1]")
    with pytest.raises(UserError, match=f"{cell.name} is damaged"):
        work()
    cell.unlink()
    work()


@pytest.mark.parametrize("name", ["scores.parquet", "scores.csv"])
def test_a_flipped_byte_in_a_score_table(tmp_path: Path, name: str) -> None:
    write_scores(full(), tmp_path)
    file = tmp_path / name
    for _ in flips(file, 10):
        with pytest.raises(UserError, match="does not match its checksum") as caught:
            read_scores(file)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("word", [b"dataset_accuracy", b"vision", b"native", b"metric"])
def test_text_in_a_score_table_that_is_no_text(tmp_path: Path, word: bytes) -> None:
    """Without its sidecar, which would tell: Arrow decodes text only when it is looked at."""
    file = tmp_path / "t.parquet"
    full().to_parquet(file, index=False)
    data = bytearray(file.read_bytes())
    data[data.index(word) + 2] = 0xE1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"t\.parquet cannot be read as a score table"):
        read_scores(file)


def test_a_flipped_byte_in_saved_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = tiny.DrawnManifest(count=60)
    options: dict[str, Any] = {**QUIET, "sample": 20, "out": tmp_path / "sums"}
    whole = streamed_scores(stream(tiny.model(), manifest, "train", **options))
    file = tmp_path / "sums" / "sums.0.npz"

    def read() -> Any:
        found = stream(tiny.model(), tiny.DrawnManifest(count=60), "train", **options)
        return streamed_scores(found)

    refused = 0
    for _ in flips(file, 6):
        try:
            found = read()
        except UserError as error:
            assert str(file) in str(error)
            refused += 1
        else:
            assert found["value"].equals(whole["value"])
    assert refused >= 6
    assert read()["value"].equals(whole["value"])


def test_sums_resume_where_they_stopped_and_refuse_what_is_not_theirs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stops(tiny.DrawnManifest):
        def open_image(self, item, root=None, size=None):
            if len(self.opened) >= 40:
                raise KeyboardInterrupt
            return super().open_image(item, root, size)

    options: dict[str, Any] = {**QUIET, "sample": 20, "save_seconds": 0.0, "out": tmp_path / "sums"}
    module = sys.modules[stream_function.__module__]
    chunk, module.CHUNK = module.CHUNK, 8
    try:
        with pytest.raises(KeyboardInterrupt):
            stream(tiny.model(), Stops(count=60), "train", **options)
        rest = tiny.DrawnManifest(count=60)
        resumed = streamed_scores(stream(tiny.model(), rest, "train", **options))
    finally:
        module.CHUNK = chunk
    assert 20 <= len(rest.opened) <= 28
    at_once = stream(
        tiny.model(), tiny.DrawnManifest(count=60), "train", **(options | {"out": None})
    )
    np.testing.assert_allclose(resumed["value"], streamed_scores(at_once)["value"], rtol=1e-7)
    options |= {"out": tmp_path / "sums"}
    with pytest.raises(UserError, match="belongs to another extraction: batch_size"):
        stream(tiny.model(), rest, "train", **(options | {"batch_size": 5}))
    broken = tiny.DrawnManifest(count=60, broken={"train/005.png"})
    again = options | {"out": tmp_path / "again"}
    with pytest.raises(UserError, match="1 of 60 images of drawn cannot be read"):
        stream(tiny.model(), broken, "train", **again)
    mended = stream(tiny.model(), tiny.DrawnManifest(count=60), "train", **again)
    assert mended.datasets["drawn"].n == 60
    other = tiny.DrawnManifest(count=60, hash="9")
    with pytest.raises(UserError, match="of other data: 60 images then, 60 now: 60 altered"):
        stream(tiny.model(), other, "train", **again)
    skipping = options | {"out": tmp_path / "skipping", "skip_unreadable": True}
    for _ in range(2):  # also where the sums are taken up again
        caplog.clear()
        left_out = stream(tiny.model(), broken, "train", **skipping)
        assert left_out.datasets["drawn"].n == 59
        assert "1 of 60 images of drawn cannot be read and are left out, first train/005" in (
            caplog.text
        )
    with pytest.raises(UserError, match="leaves out 1 unreadable image; allow it with skip_unr"):
        stream(tiny.model(), broken, "train", **skipping | {"skip_unreadable": False})


def test_sums_of_several_processes_are_taken_up_and_none_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files as processes leave them that were killed: parts, and parts that were merged before."""
    folder, (first, parts) = tmp_path / "sums", (tmp_path / name for name in ("first", "parts"))
    options: dict[str, Any] = {**QUIET, "sample": 20, "out": folder}
    at_once = stream(tiny.model(), tiny.DrawnManifest(count=60), "train", **QUIET, sample=20)
    expected = streamed_scores(at_once)["value"]

    def batches(file: Path) -> set[int]:
        with np.load(file) as archive:
            return set(archive["batches"].tolist())

    def share_of(*numbers: int) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Processes, "share", lambda self, batches: list(numbers))
            stream(tiny.model(), tiny.DrawnManifest(count=60), "train", **options)

    def whole() -> None:
        manifest = tiny.DrawnManifest(count=60)
        found = stream(tiny.model(), manifest, "train", **options)
        assert found.datasets["drawn"].n == 60
        np.testing.assert_allclose(streamed_scores(found)["value"], expected, rtol=1e-7)
        assert [file.name for file in folder.glob("sums.*")] == ["sums.0.npz"]
        assert batches(folder / "sums.0.npz") == set(range(15))
        opened.append(len(manifest.opened))

    opened: list[int] = []
    share_of(*range(0, 9, 2))
    shutil.copytree(folder, first)
    shutil.rmtree(folder)
    share_of(1, 3, 14)
    shutil.copy(first / "sums.0.npz", folder / "sums.1.npz")
    shutil.copytree(folder, parts)
    whole()
    shutil.copy(first / "sums.0.npz", folder / "sums.2.npz")  # merged, and then not removed
    whole()
    assert opened == [28, 0]
    # Neither holds the other.
    shutil.rmtree(folder)
    shutil.copytree(parts, folder)
    (folder / "sums.1.npz").unlink()
    share_of(0, 1)
    shutil.copy(first / "sums.0.npz", folder / "sums.1.npz")
    with pytest.raises(UserError, match=r"sums\.0\.npz counts batches twice; delete"):
        stream(tiny.model(), tiny.DrawnManifest(count=60), "train", **options)
    shutil.rmtree(folder)
    share_of(1, 3)
    with pytest.raises(UserError, match="sample is 20 there, 30 here"):
        stream(tiny.model(), tiny.DrawnManifest(count=60), "train", **options | {"sample": 30})


@pytest.mark.parametrize("skipped", [False, True])
def test_a_mended_image_joins_sums_that_it_is_not_counted_in(skipped: bool, tmp_path: Path) -> None:
    """Where it was left out its batch is done; where it stopped the run its batch is made now."""
    broken = tiny.DrawnManifest(count=60, broken={"train/057.png"})
    options: dict[str, Any] = {**QUIET, "out": tmp_path / "sums", "skip_unreadable": skipped}
    try:
        stream(tiny.model(), broken, "train", **options)
    except UserError:
        assert not skipped
    mended = tiny.DrawnManifest(count=60)
    if skipped:
        with pytest.raises(UserError, match="of other data: 60 images then, 60 now: 1 altered"):
            stream(tiny.model(), mended, "train", **options)
        return
    found = stream(tiny.model(), mended, "train", **options)
    assert found.datasets["drawn"].n == 60 and len(mended.opened) == 4


def test_training_on_a_disk_that_fills_up(small_disk: Path, tmp_path: Path) -> None:
    def work(out: Path) -> Any:
        options: dict[str, Any] = {"seeds": (1, 2), "items": 20, "progress": False}
        return base_to_novel(
            shared_backbone(), ["shapes_filled"], RECIPE, out, save_adapters=True, **options
        ).drop(columns="seconds")

    with pytest.raises(UserError, match="cannot write .*small"):
        work(small_disk)
    assert not list(small_disk.rglob("*.part"))
    remount(small_disk, "size=8m")
    assert work(small_disk).equals(work(tmp_path / "other"))


def test_the_command_line_on_full_and_read_only_disks(small_disk: Path, tmp_path: Path) -> None:
    arguments = ["select", str(tmp_path / "run"), "--resamples", "0", "--out"]
    write_scores(full(), tmp_path / "run")
    (small_disk / "filler").write_bytes(b"x" * 40_000)

    def run(out: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vlmlayers.cli", *arguments, str(out)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for state, words in (("rw", "No space left on device; free space"),
                         ("ro", "Read-only file system; choose a folder")):  # fmt: skip
        remount(small_disk, state)
        done = run(small_disk / "choice.json")
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1
    remount(small_disk, "rw,size=4m")
    assert run(small_disk / "choice.json").returncode == 0


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(tiny.model(), tiny.DrawnManifest(), "train", out=tmp_path / "calm", **QUIET)
    random, real = np.random.default_rng(0), time.time

    def jumping() -> float:
        return real() + float(random.uniform(-1e6, 1e6))

    import tqdm.std

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(tqdm.std, "time", jumping)

    class Stops(tiny.DrawnManifest):
        def open_image(self, item, root=None, size=None):
            if len(self.opened) >= 9:
                raise KeyboardInterrupt
            return super().open_image(item, root, size)

    options = QUIET | {"progress": True, "out": tmp_path / "wild"}
    with pytest.raises(KeyboardInterrupt):
        extract(tiny.model(), Stops(), "train", **options)
    for number, file in enumerate(sorted((tmp_path / "wild.partial").rglob("*"))):
        os.utime(file, (number * 1e8, 4e9 - number * 1e8))  # from 1970 to 2096
    rest = tiny.DrawnManifest()
    extract(tiny.model(), rest, "train", **options)
    assert len(rest.opened) == 22 - 8
    assert content(tmp_path / "wild") == content(tmp_path / "calm")


class DiesInAWorker(tiny.DrawnManifest):
    def open_image(self, item, root=None, size=None):
        # The last batch, which is given out once others have arrived: what a process made and
        # nobody has fetched is lost with it.
        if get_worker_info() is not None and item.path.endswith("021.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open_image(item, root, size)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_decoding_worker_that_dies(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = stream if streaming else extract
    work(tiny.model(), tiny.DrawnManifest(), "train", out=tmp_path / "calm", **QUIET)
    survivor = DiesInAWorker()
    work(tiny.model(), survivor, "train", out=tmp_path / "died", **QUIET | {"workers": 2})
    assert caplog.text.count("decoding in processes failed") == 1
    assert 0 < len(survivor.opened) < 22  # here; what processes had decoded is kept
    assert content(tmp_path / "died") == content(tmp_path / "calm")


def test_a_data_root_that_disappears_during_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = images(tmp_path / "colours", each=8)
    manifest = Manifest.load(folder)
    options = QUIET | {"text": "prompts"}
    extract(tiny.model(), manifest, "train", out=tmp_path / "whole", **options)
    real, opened = Manifest.open_image, []

    def vanishing(self: Manifest, item: Any, root: Any = None, size: Any = None) -> Any:
        opened.append(item.path)
        if len(opened) == 14:
            folder.rename(tmp_path / "gone")
        return real(self, item, root, size)

    monkeypatch.setattr(Manifest, "open_image", vanishing)
    with pytest.raises(UserError, match="19 of 32 images of colours cannot be read"):
        extract(tiny.model(), manifest, "train", out=tmp_path / "s", **options)
    (tmp_path / "gone").rename(folder)
    opened.clear()
    opened += ["counted"] * 20
    extract(tiny.model(), manifest, "train", out=tmp_path / "s", **options)
    assert len(opened) - 20 == 20  # the five batches with a missing image
    assert content(tmp_path / "s") == content(tmp_path / "whole")


def test_a_data_root_that_disappears_during_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = images(tmp_path / "colours", each=4)
    options: dict[str, Any] = {"seeds": (1,), "progress": False}

    def work(out: Path) -> Any:
        found = base_to_novel(shared_backbone(), [str(folder)], RECIPE, out, **options)
        return found.drop(columns="seconds")

    whole = work(tmp_path / "whole")
    real = Manifest.open_image

    def vanishing(self: Manifest, item: Any, root: Any = None, size: Any = None) -> Any:
        if item.path.startswith("train/") and folder.exists():
            folder.rename(tmp_path / "gone")
        return real(self, item, root, size)

    with monkeypatch.context() as during:
        during.setattr(Manifest, "open_image", vanishing)
        with pytest.raises(UserError, match="the image .*colours.* is missing"):
            work(tmp_path / "o")
    (tmp_path / "gone").rename(folder)
    assert work(tmp_path / "o").equals(whole)


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    from vlmlayers.errors import printable

    name = "\x1b[2J\u202egnp.exe\n\x07"
    assert printable(f"class {name}") == r"class \x1b[2J\u202egnp.exe \x07"
    assert len(str(UserError("x" * 10_000))) < 2000
    assert "\n" not in str(UserError("one\ntwo"))
