"""Recorded runs of methods that learn context: CoOp, CoCoOp, KgCoOp, ProDA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from golden import Check, Recording, largest
from replays.runs import Differences, Run, Steps
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.data.task import Task
from vlmadapters.methods import METHODS
from vlmadapters.training.recipes import TrainConfig

PARTS = {
    "coop": {"cross_entropy": "parts/cross_entropy"},
    "cocoop": {"cross_entropy": "parts/cross_entropy"},
    "kgcoop": {"cross_entropy": "parts/cross_entropy", "distance": "parts/score"},
    "proda": {"cross_entropy": "parts/cross_entropy", "overlap": "parts/loss_m"},
}
KEYS = {
    "eval_logits": "eval/logits",
    "final_eval_logits": "final/eval_logits",
    "final_novel_logits": "novel/eval_logits",
    "train_logits": "train/logits",
}
# Features of class prompts, as `class_features` gives them, under the names of the files.
FEATURES = ("eval/text_features", "eval/text_features_mean")
ALLOWED = {"initial words": 1e-7, "features": 1e-5, "hand-made": 1e-5}


def replay(recording: Recording) -> Iterator[Check]:
    """Yield the checks of a file."""
    method = recording.info["method"]
    for name, told in recording.info["variants"].items():
        novel = told.get("novel_classes")
        yield from ContextRun(
            recording,
            name,
            f"{name}/",
            METHODS[method].Config.from_dict(SETTINGS[method](told)),
            task_of(told, told["classes"]),
            train_config(told),
            recording.group(f"{name}/init/"),
            task_of(told, novel) if novel else None,
            PARTS[method],
            draws_of(recording, f"{name}/prompt_idx"),
            ALLOWED,
            KEYS,
            batch=told["batch_size"],
            seed=told["seed"],
        ).checks()


class ContextRun(Run):
    """A run that also records initial words and features of class prompts."""

    def before(self, steps: Steps) -> Differences:
        """Compare a start from words."""
        if self.recording.info["variants"][self.name].get("ctx_init"):
            drawn = steps.method.official_state_dict()["ctx"]
            yield "initial words", largest(drawn, self.start["ctx"])

    @torch.no_grad()
    def beside(self, steps: Steps) -> Differences:
        """Compare features of class prompts."""
        method, backbone, texts = steps.method, steps.backbone, steps.classes
        for key in FEATURES:
            if key in self:
                yield (
                    "features",
                    largest(method.class_features(backbone, texts), self.recorded(key)),
                )
        if "anchor_text_features" in self:
            found = F.normalize(texts.hand_made, dim=-1)
            yield "hand-made", largest(found, self.recorded("anchor_text_features"))
        if "nc_text_features" in self:
            expected = F.normalize(self.recorded("nc_text_features"), dim=-1)
            yield "features", largest(method.bare_features(backbone, texts), expected)


def draws_of(recording: Recording, key: str) -> Any:
    """Return the function from a step to the prompts that the record drew in it."""

    def draws(number: int) -> Mapping[str, Tensor] | None:
        return {"prompts": recording.tensor(key)[number]} if key in recording else None

    return draws


def task_of(told: Mapping[str, Any], names: list[str]) -> Task:
    """Return the task of telling classes apart, with the template of the hand-made prompts."""
    if "anchor_prompts" not in told:
        return Task(tuple(names))
    name, prompt = told["classes"][0].replace("_", " "), told["anchor_prompts"][0]
    return Task(tuple(names), own_template=prompt.replace(name, "{}"))


def train_config(told: Mapping[str, Any]) -> TrainConfig:
    """Return the recorded optimizer as a recipe; with a schedule every step is an epoch."""
    optim, scheduled = told["optim"], told.get("epoch_per_step", False)
    return TrainConfig(
        optimizer=optim["name"],
        lr=optim["lr"],
        momentum=optim["momentum"],
        weight_decay=optim["weight_decay"],
        schedule="epoch" if scheduled else "constant",
        epochs=optim.get("max_epoch", told["steps"]),
        warmup_epochs=optim.get("warmup_epoch", 0),
        warmup_lr=optim.get("warmup_cons_lr", 1e-5),
    )


def words_of(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of words; KgCoOp's flag stands for the common ones."""
    words = told.get("ctx_init") or ""
    if words is True:
        words = "a photo of a"
    return {"words": words, "length": 0 if words else told["n_ctx"]}


def coop(told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **words_of(told),
        "class_specific": told.get("csc", False),
        "class_at": told.get("class_token_position", "end"),
        "as_published": True,
    }


def kgcoop(told: Mapping[str, Any]) -> dict[str, Any]:
    return {**coop(told), "weight": told["w"]}


def proda(told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompts": told["n_prompt"],
        "group": told["prompt_bs"],
        "length": told["n_ctx"],
        "weight": told["alpha"],
        "as_published": True,
    }


SETTINGS = {"coop": coop, "cocoop": words_of, "kgcoop": kgcoop, "proda": proda}
