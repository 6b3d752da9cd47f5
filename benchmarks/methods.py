"""One training step of each method: ours against a plain transcription of its public recipe.

    python benchmarks/methods.py [--rounds N] [--architecture NAME] [--methods coop,maple]
                                 [--batch N]

ViT-B/16 size with random weights, the method's published batch, the prompts of 50 classes of
Caltech101. Both sides start from the same parameters, get the same images and labels and take
turns; their losses are compared. Decoding and augmenting are not in the step. Views: `fresh`
computes what is frozen of the vision tower at every step, `cached` has it from an earlier epoch.
`ratio` is the median over rounds of wall time public / ours, `cpu_ratio` the same in processor
time, which other work on the machine disturbs less. `gigaflop` counts multiplications and additions
of the products and convolutions of a step, and `gigaflop_ratio` is public / ours of these: what is
saved by computing less. A ratio above it comes from computing the same faster. MMA has a benchmark
of its own, `training.py`; Tip-Adapter without training and the linear probe have no steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import open_clip
import torch
from common import machine, read_table, write_table
from public_methods import PUBLIC, ProDA
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from training import ARCHITECTURE, CLASSES, Side, row
from training import PUBLIC as PUBLIC_SIDE

from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.task import Task
from vlmadapters.methods import METHODS
from vlmadapters.methods.base import Method, Step
from vlmadapters.methods.tip import Tip
from vlmadapters.training.recipes import load_recipe
from vlmlayers.models.load import build_clip

# Settings that leave nothing to chance where a side could not be given the other's draws.
ALIKE: dict[str, dict[str, Any]] = {"cliplora": {"dropout": 0.0}}


def draws_of(name: str, labels: Tensor) -> dict[str, Tensor] | None:
    """Return draws that both sides are given; None where a method draws nothing.

    ProDA's group of prompts, no noise for LASP, and for LwEIB all classes, in their first
    description, at slow blocks.
    """
    every = torch.arange(len(CLASSES))
    given: dict[str, dict[str, Tensor]] = {
        "proda": {"prompts": torch.tensor(ProDA.GROUP)},
        "lasp": {},
        "lweib": {
            "classes": every, "description": torch.zeros_like(every), "relabelled": labels,
        },
    }  # fmt: skip
    return given.get(name)


def updates(loss: Callable[[], Tensor], parameters: list[Any]) -> Callable[[], float]:
    """Return one update: forward, backward, SGD."""
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        found = loss()
        found.backward()
        optimizer.step()
        return found.item()

    return step


def public_side(name: str, clip: Any, method: Method, task: Task, data: tuple[Tensor, ...]) -> Side:
    """Return the step of a public recipe from our initial parameters."""
    kind: Any = PUBLIC[name]
    if hasattr(kind, "templates"):
        kind.templates = templates_of(name)
    if isinstance(method, Tip):
        kind.cached = method.labels
    public = kind(clip, method.official_state_dict(), task.class_names, task.other_names)
    loss = partial(public.loss, *data)
    return Side(PUBLIC_SIDE, "fresh", updates(loss, list(public.p.values())))


def templates_of(name: str) -> tuple[str, ...]:
    """Return the templates of the frozen texts that a method compares with."""
    if name == "lasp":
        from vlmadapters.methods.lasp import TEMPLATES

        return tuple(TEMPLATES)
    from vlmadapters.methods.promptsrc import default_templates

    return default_templates()


def our_side(
    name: str, views: str, backbone: Backbone, method: Method, task: Task, data: tuple[Tensor, ...]
) -> Side:
    """Return our step."""
    images, labels = data
    first = method.first(backbone, "vision")
    with torch.no_grad():
        classes = method.prepare(backbone, task)
        kept = backbone.images(images, [first])[first]

    def loss() -> Tensor:
        state = kept if views == "cached" else backbone.images(images, [first])[first]
        generator = torch.Generator().manual_seed(0)
        draws = draws_of(name, labels)
        return method.loss(Step(backbone, state, labels, classes, generator, draws=draws))

    groups = method.train().parameter_groups()
    parameters = [value for group in groups for value in group["params"]]
    return Side("ours", views, updates(loss, parameters))


def compare(
    name: str, architecture: dict[str, Any], device: str, rounds: int, batch: int = 0
) -> list[dict[str, Any]]:
    """Measure every side of one method in turn, at its own batch where 0; return a row for each."""
    generator = torch.Generator().manual_seed(0)
    clip: Any = build_clip(architecture, device=device).requires_grad_(False)
    recipe, size = load_recipe("published", name), clip.visual.image_size
    batch = batch or recipe.train.batch_size
    images = torch.randn(batch, 3, *size, generator=generator).to(device)
    labels = torch.randint(0, len(CLASSES), (batch,), generator=generator).to(device)
    task = Task(tuple(CLASSES), other_names=tuple(f"toy_{one}" for one in CLASSES))
    backbone = Backbone(clip, recipe.train.savings, open_clip.tokenize)
    depths = {tower: walk.tower.depth for tower, walk in backbone.walks.items()}
    config = recipe.method
    if set(depths.values()) != {12}:
        config = type(config).published(depths, **config.settings())

    config = replace(config, **ALIKE.get(name, {}))

    def new() -> Method:
        method = METHODS[name].build(config, backbone, task, seed=0)
        if isinstance(method, Tip):  # whose cache is filled before the first step
            own = torch.arange(len(CLASSES), device=device).repeat_interleave(recipe.train.shots)
            drawn = torch.Generator().manual_seed(0)
            keys = torch.randn(len(own), backbone.joint, generator=drawn).to(device)
            method.fill(F.normalize(keys, dim=-1), own)
        return method

    data = images, labels
    counted: dict[int, float] = {}
    sides = [public_side(name, clip, new(), task, data)]
    sides += [our_side(name, views, backbone, new(), task, data) for views in ("fresh", "cached")]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for number in range(rounds + 1):  # the first round warms up
        for index, side in enumerate(sides) if number % 2 else reversed(list(enumerate(sides))):
            with counting(counted, index) if not number else nullcontext():
                side.run(wait)
            if not number:
                side.forget_times()
    where = {"batch": batch, "classes": len(CLASSES), "rounds": rounds}
    return [
        {
            "method": config.title, **row(side, sides[0], device, batch),
            "gigaflop": round(counted[index] / 1e9, 1),
            "gigaflop_ratio": round(counted[0] / counted[index], 2), **where, **machine(device),
        }
        for index, side in enumerate(sides)
    ]  # fmt: skip


@contextmanager
def counting(counted: dict[int, float], index: int) -> Iterator[None]:
    """Note under a number how many operations products take inside the context."""

    def linear(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * int(prod(x)) * int(weight[0])

    # What oneDNN multiplies, torch's counter does not know.
    known = {torch.ops.mkldnn._linear_pointwise: linear}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        yield
    counted[index] = counter.get_total_flops()


def main() -> None:
    """Measure on the GPU where there is one, else on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--architecture", default=ARCHITECTURE)
    parser.add_argument("--methods", default=",".join(PUBLIC))
    parser.add_argument("--batch", type=int, default=0, help="images; 0 takes the method's own")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    architecture = open_clip.get_model_config(asked.architecture)
    table = f"methods_{device}"
    for name in asked.methods.split(","):
        made = compare(name, architecture, device, asked.rounds, asked.batch)
        rows = [{"model": asked.architecture, **one} for one in made]
        others = [one for one in read_table(table) if one["method"] != rows[0]["method"]]
        write_table(table, [*rows, *others])  # the others as they were measured last


if __name__ == "__main__":
    main()
