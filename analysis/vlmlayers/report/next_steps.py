"""What to do with the answer: the exact command that proves it, and the lines that hand it over."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from vlmlayers.report.handover import handover_text
from vlmlayers.report.numbers import Answer
from vlmlayers.runs import read_json

SEEDS, SHOTS, EPOCHS = (1, 2, 3), 16, 5  # of `vlmlayers validate` and the published recipe
# A step goes forward once, the frozen blocks below shared by all placements, and backward, at about
# twice the cost, through the adapted blocks: on average over a sweep of the first block, half.
PASSES = 2
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
    proof = "Train more seeds" if answer.validation is not None else "Prove the choice by training"
    seeds = (4, 5, 6) if answer.validation is not None else SEEDS
    return [
        NextStep(proof, _duration(answer, len(seeds)), _validate(answer, seeds)),
        NextStep(
            "Fine-tune these layers",
            "Text to copy, for peft and for training the blocks themselves.",
            handover_text(answer),
        ),
    ]


def _validate(answer: Answer, seeds: tuple[int, ...]) -> str:
    given = answer.provenance.get("given", {})
    words = ["vlmlayers", "validate", *_model_words(answer)]
    names = given.get("datasets") or sorted(set(answer.scores["dataset"]) - {"*"})
    folder = str(answer.run.folder)
    words += [*names, "--choice", folder, "--out", folder]
    if given.get("data_root"):
        words += ["--data-root", given["data_root"]]
    return shlex.join([*map(str, words), "--seeds", ",".join(map(str, seeds))])


def _model_words(answer: Answer) -> list[str]:
    """Return the model and its options as the command line takes them."""
    arguments = dict(answer.provenance.get("given", {}).get("model", {}))
    words = [str(arguments.pop("name", answer.model))]
    for key, value in arguments.items():
        option = f"--{key.replace('_', '-')}"
        listed = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if value is True:
            words.append(option)
        elif value not in (False, None, ""):
            words += [option, listed]
    return words


def _duration(answer: Answer, seeds: int) -> str:
    """Return how long the training takes, at the pace of the extraction, and how that is known."""
    what = (
        "Trains at the chosen blocks, at the paper's and at others on the same shots, and says "
        "whether the choice was good; a stopped run resumes with the same command."
    )
    pace, classes = _pace(answer), _classes(answer)
    if not pace or not classes:
        return what
    placements = max(answer.depths.values()) + BESIDE
    images = placements * sum(SHOTS * max(1, -(-c // 2)) * EPOCHS for c in classes)
    given = PASSES * images * seeds / pace
    tuned = PASSES * images * (seeds * (1 + TUNED) + TUNING) / pace
    return (
        f"{what} About {_time(tuned)}, or {_time(given)} with --amount given, at the {pace:.0f} "
        f"images a second of the extraction: {placements} placements, {seeds} seeds, {SHOTS} shots "
        f"of each base class, {EPOCHS} epochs, a step at the cost of {PASSES} passes; testing "
        "comes on top."
    )


def _pace(answer: Answer) -> float:
    """Return the images a second of the extraction; 0 where it was not timed."""
    ledger = answer.run.folder / "stages.json"
    seconds = read_json(ledger).get("extract", {}).get("seconds", 0) if ledger.exists() else 0
    images = sum(one.get("items") or 0 for one in _datasets(answer))
    return images / seconds if seconds else 0.0


def _classes(answer: Answer) -> list[int]:
    return [int(one["classes"]) for one in _datasets(answer) if one.get("classes")]


def _datasets(answer: Answer) -> list[dict[str, Any]]:
    return list(answer.provenance.get("datasets", {}).values())


def _time(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.0f} h"
