"""What to do with the answer: the exact command that proves it, and the lines that hand it over."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmlayers.files import read_toml
from vlmlayers.report.handover import handover_text
from vlmlayers.report.made import scored_beside
from vlmlayers.report.numbers import Answer
from vlmlayers.scores.summaries import dataset_names
from vlmlayers.words import counted

SEEDS, SHOTS, EPOCHS = (1, 2, 3), 16, 5  # of `vlmlayers validate` and the published recipe
# A step goes forward and backward through the adapted blocks, on average over a sweep of the first
# block half of them, and weights that are frozen need no gradient: one pass of the images, with the
# frozen blocks below shared by all placements. The rest is the prompts of the classes. On the
# mini-CLIP and a dataset of 16 classes it was 1.3 at most of a CPU's time, with tests and reading.
PASSES = 1.5
BESIDE = 8  # placements trained beside the sweep of the first block
TUNED = 2  # times the recipe's steps at a tuned amount, on average
TUNING = 8  # full trainings that tuning the amount of one placement takes, once for all seeds


@dataclass(frozen=True)
class NextStep:
    """One thing to do next.

    Attributes:
        title: What it is.
        text: Why, and how long it takes.
        code: What to type.
    """

    title: str
    text: str
    code: str


def next_steps(answer: Answer) -> list[NextStep]:
    """Return what to do with a run: prove the choice by training, and adapt with it."""
    trained, asked = _seeds(answer), _asked(answer)
    more = tuple(_several(asked.pop("seeds", SEEDS)))
    if trained:
        more = tuple(range(max(trained) + 1, max(trained) + 1 + len(trained)))
    proof = "Train more seeds" if trained else "Prove the choice by training"
    time = _longer(answer, trained) or _duration(answer, len(more), asked)
    return [
        NextStep(proof, time, _validate(answer, (*trained, *more), asked)),
        NextStep(
            "Fine-tune these layers",
            "Text to copy, for peft and for training the blocks themselves.",
            handover_text(answer),
        ),
    ]


def _seeds(answer: Answer) -> tuple[int, ...]:
    """Return the seeds that were trained, in order."""
    if answer.validation is None:
        return ()
    return tuple(sorted(map(int, answer.validation.cells["seed"].unique())))


def _asked(answer: Answer) -> dict[str, Any]:
    """Return what the training was asked for, or will be by the study's table `[validate]`."""
    if answer.validation is not None:
        return dict(answer.provenance.get("validate", {}))
    study = answer.run.study
    return dict(read_toml(study).get("validate", {})) if study.exists() else {}


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _validate(answer: Answer, seeds: tuple[int, ...], asked: dict[str, Any]) -> str:
    given = answer.provenance.get("given", {})
    words = ["vlmlayers", "validate", *_model_words(answer)]
    scored = sorted(dataset_names(answer.scores))
    beside = [name for name, _ in scored_beside(answer)]
    named = asked.get("datasets") or [*given.get("datasets", ()), *beside] or scored
    names = dict.fromkeys(_several(named))  # a dataset may be scored by two splits
    folder = str(answer.run.folder)
    words += [*(_place(name, given) for name in names), "--choice", folder]
    words += ["--out", folder]
    if given.get("data_root"):
        words += ["--data-root", given["data_root"]]
    asked = given.get("leaving_out", {}) | asked
    words += _as_asked({key: value for key, value in asked.items() if key != "datasets"})
    return shlex.join([*map(str, words), "--seeds", ",".join(map(str, seeds))])


def _place(name: str, given: Mapping[str, Any]) -> str:
    """Return a dataset as the command line takes it, where its name alone is known."""
    # A study looks beside itself and under the data root, a verb where it is started.
    known = given.get("datasets", ())
    places = {key: place for place in known for key in (Path(place).stem, Path(place).name)}
    return str((places | given.get("places", {})).get(name, name))


def _as_asked(part: dict[str, Any]) -> list[str]:
    """Return what a study's table `[validate]` asked for as the command line takes it.

    Cells that are there are then found again.
    """
    settings = part.pop("set", {})
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    for one in _several(part.pop("amounts", ())):
        words += ["--amounts", one]
    return words + _options(part)


def _model_words(answer: Answer) -> list[str]:
    """Return the model and its options as the command line takes them."""
    arguments = dict(answer.provenance.get("given", {}).get("model", {}))
    return [str(arguments.pop("name", answer.model)), *_options(arguments)]


def _options(values: Mapping[str, Any]) -> list[str]:
    """Return options and their values; true ones alone, false and empty ones not at all."""
    words = []
    for key, value in values.items():
        option = f"--{key.replace('_', '-')}"
        listed = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if value is True:
            words.append(option)
        elif value is not False and value not in (None, ""):
            words += [option, listed]
    return words


def _duration(answer: Answer, seeds: int, asked: dict[str, Any]) -> str:
    """Return how long the training takes, at the pace of the extraction, and how that is known.

    Without a time where epochs and placements are not those of MMA's recipe and the usual kinds.
    """
    what = (
        "Trains at the chosen blocks, at the paper's and at others on the same shots, and says "
        "whether the choice was good; a stopped run resumes with the same command."
    )
    pace, classes = _pace(answer), _classes(answer)
    usual = asked.get("method", "mma") == "mma" and not {"recipe", "kinds"} & asked.keys()
    if not pace or not classes or not usual:
        return what
    settings = {"shots": SHOTS, "epochs": EPOCHS} | asked.get("set", {})
    shots, epochs = asked.get("shots", settings["shots"]), settings["epochs"]
    placements = max(answer.depths.values()) + BESIDE
    images = placements * sum(shots * max(1, -(-c // 2)) * epochs for c in classes)
    given = PASSES * images * seeds / pace
    tuned = PASSES * images * (seeds * (1 + TUNED) + TUNING) / pace
    times = f"{_time(tuned)}, or {_time(given)} with --amount given"
    if asked.get("amount") == "given":
        times = _time(given)
    return (
        f"{what} About {times}, at the {pace:.0f} images a second of the extraction: {placements} "
        f"placements, {counted(seeds, 'seed')}, {counted(shots, 'shot')} of each base class, "
        f"{counted(epochs, 'epoch')}, a step at the cost of {PASSES} passes; testing comes on top."
    )


def _longer(answer: Answer, trained: tuple[int, ...]) -> str:
    """Return how long as many seeds again take, from what they took here; empty where unknown."""
    if not trained:
        return ""
    # Not that of the stage, which may have found most of them trained.
    seconds = answer.run.read(answer.run.verdict.name).get("training_seconds", 0)
    if not seconds:
        return ""
    return (
        f"As many seeds again: about {_time(seconds)}, as long as the {len(trained)} took here; "
        "testing comes on top. What is trained is not trained again; a stopped run resumes with "
        "the same command."
    )


def _pace(answer: Answer) -> float:
    """Return the images a second of the extraction; 0 where it was not timed."""
    timed = [one for one in _datasets(answer) if one.get("seconds")]
    seconds = sum(one["seconds"] for one in timed)
    return sum(one.get("items") or 0 for one in timed) / seconds if timed else 0.0


def _classes(answer: Answer) -> list[int]:
    return [int(one["classes"]) for one in _datasets(answer) if one.get("classes")]


def _datasets(answer: Answer) -> list[dict[str, Any]]:
    return list(answer.provenance.get("datasets", {}).values())


def _time(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.0f} h"
