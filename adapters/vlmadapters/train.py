"""Training adapters: one, or several placements side by side on the same views.

Placements trained together see the same few-shot items, order and views as each would alone; what
is frozen below their first blocks is computed once for all. The losses are those of separate runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vlmadapters import parallel
from vlmadapters.checkpoints import load_training_state, save_training_state
from vlmadapters.config import MMAConfig
from vlmadapters.fewshot import class_prompts
from vlmadapters.frozen import VIEW_BYTES, Backbone, ViewCache
from vlmadapters.images import Images, epoch_batches
from vlmadapters.memory import check_memory, view_bytes
from vlmadapters.mma import Adapter, new_adapter
from vlmadapters.recipes import TrainConfig
from vlmadapters.walk import State
from vlmlayers.errors import UserError
from vlmlayers.manifests import Item
from vlmlayers.progress import bar


@dataclass(eq=False)
class TrainResult:
    """A trained adapter and how it went.

    Attributes:
        adapter: The adapter, not attached.
        config: Its placement and size.
        losses: Loss of every update.
        seed: Seed of initialisation, order and views.
        change: Largest change of any parameter, relative to the largest initial value.
        seconds: Time of the whole group's training, divided evenly.
        images_per_second: Images through this adapter per second of its share.
        peak_memory: Bytes at the peak on a GPU, 0 on a CPU.
    """

    adapter: Adapter
    config: MMAConfig
    seed: int
    losses: list[float] = field(default_factory=list)
    change: float = 0.0
    seconds: float = 0.0
    images_per_second: float = 0.0
    peak_memory: int = 0


@dataclass(eq=False)
class _Run:
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    scaler: Any
    initial: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)


class Trainer:
    """Train one or several placements on the same few-shot items.

    Args:
        model: The backbone with preprocessing and tokenizer (`vlmlayers.models.load_model`).
        images: Images of the dataset.
        items: Few-shot items with labels from 0, as `base_or_novel` returns them.
        class_names: Class names by label.
        configs: Placements to train.
        train: The recipe.
        seed: Seed of initialisation, order and views.
        backbone: Walks to share with an evaluation; built here where absent.
        folder: Folder for checkpoints. Training resumes from the one it finds there.
        progress: Show a bar.
    """

    def __init__(
        self,
        model: Any,
        images: Images,
        items: Sequence[Item],
        class_names: Sequence[str],
        configs: Sequence[MMAConfig],
        train: TrainConfig | None = None,
        seed: int = 1,
        *,
        backbone: Backbone | None = None,
        folder: Path | None = None,
        progress: bool = True,
    ) -> None:
        self.model, self.images, self.items = model, images, list(items)
        self.class_names = list(class_names)
        self.train, self.seed = train or TrainConfig(), seed
        self.folder, self.progress = folder, progress
        self.configs = list(configs)
        self._check_items()
        self.backbone = backbone or Backbone(model.clip, self.train.savings)
        self.batch_size = min(self.train.batch_size, len(self.items))
        parallel.check_divides(self.batch_size)
        self.device = model.device
        self.autocast, _ = precision_of(self.train.precision, self.device)
        self.vision_starts = [self.backbone.start(c, "vision") for c in self.configs]
        self.text_starts = [self.backbone.start(c, "text") for c in self.configs]
        self._check_memory()
        self.runs = [self._new_run(config) for config in self.configs]
        self.epoch = self.step = 0
        self._views: ViewCache | None = None

    def _check_items(self) -> None:
        labels = {item.label for item in self.items}
        if not labels <= set(range(len(self.class_names))):
            raise UserError(
                f"training labels go up to {max(labels)}, but there are {len(self.class_names)} "
                "class names; relabel the items with base_or_novel"
            )
        if not self.items:
            raise UserError("there are no training items; check the few-shot draw")

    def _check_memory(self) -> None:
        _, processes = parallel.rank_and_size()
        views = self.train.cached_views * len(self.items) if self.backbone.steps else 0
        kept = min(VIEW_BYTES, view_bytes(self.backbone, views, len(set(self.vision_starts))))
        batch = self.batch_size // processes
        check_memory(self.backbone, self.configs, batch, self._tokens(), kept)

    def _new_run(self, config: MMAConfig) -> _Run:
        adapter = new_adapter(self.model.clip, config, self.seed)
        optimizer = torch.optim.SGD(
            adapter.parameters(),
            lr=self.train.lr,
            momentum=self.train.momentum,
            weight_decay=self.train.weight_decay,
        )
        # Loss scaling adapts to one placement's gradients, so that no other one changes its steps.
        _, scaler = precision_of(self.train.precision, self.device)
        return _Run(adapter, optimizer, scaler, adapter.official_state_dict())

    def fit(self) -> list[TrainResult]:
        """Train to the end and return one result per placement.

        Raises:
            UserError: A loss is not a number, or the training does not fit into memory.
        """
        self._resume()
        clip = self.model.clip.eval()
        clip.requires_grad_(False)
        started, done = time.perf_counter(), self._steps_done()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        total = self.train.epochs * len(self._batches(0))
        rank, _ = parallel.rank_and_size()
        with bar(
            description="train",
            total=total,
            unit="step",
            show=self.progress and rank == 0,
            initial=done,
        ) as shown:
            prompts = self._prompts()
            while self.epoch < self.train.epochs:
                self._one_epoch(prompts, shown)
        return self._results(time.perf_counter() - started, total - done)

    def _one_epoch(self, prompts: dict[int, State], shown: Any) -> None:
        rate = 0.5 * self.train.lr * (1 + math.cos(math.pi * self.epoch / self.train.epochs))
        for run in self.runs:
            for group in run.optimizer.param_groups:
                group["lr"] = rate
        for batch, images in self._with_images(self._batches(self.epoch)[self.step :]):
            losses = self.update(batch, prompts, images)
            self.step += 1
            shown.update()
            shown.set_postfix(loss=f"{np.mean(losses):.3f}", refresh=False)
            if self.train.save_every and self.step % self.train.save_every == 0:
                self._save()
        self.epoch, self.step = self.epoch + 1, 0
        if not self.train.save_every or self.epoch == self.train.epochs:
            self._save()

    def _with_images(
        self, batches: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor | None]]:
        """Yield batches with their images, which worker threads prepare one batch ahead."""
        if self.train.cached_views:  # most views are there already
            yield from ((batch, None) for batch in batches)
            return
        mine = [parallel.share(batch) for batch in batches]
        yield from zip(batches, self.images.ahead(self._augmented, mine))

    def update(
        self,
        batch: NDArray[np.int64],
        prompts: dict[int, State],
        images: Tensor | None = None,
    ) -> list[float]:
        """Make one update of every placement on one global batch; return the losses.

        Args:
            batch: Indices of the items, over all processes.
            prompts: Frozen states of the class prompts.
            images: This process's share of the images, where they are made already.
        """
        mine = parallel.share(batch)
        labels = torch.tensor([self.items[i].label for i in mine], device=self.device)
        with self.autocast():
            states = self._image_states(mine, images)
            if not self.train.savings.text_prefix:
                prompts = self._prompts()
        return [self._update_one(i, states, prompts, labels) for i in range(len(self.runs))]

    def _update_one(
        self, index: int, states: dict[int, State], prompts: dict[int, State], labels: Tensor
    ) -> float:
        run = self.runs[index]
        run.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.backbone.logits(
                states[self.vision_starts[index]], prompts[self.text_starts[index]], run.adapter
            )
        loss = F.cross_entropy(logits.float(), labels)
        value = parallel.mean_over_processes(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"the loss of {self.configs[index].placement} became {value} in epoch "
                f"{self.epoch + 1}, step {self.step + 1}; lower lr ({self.train.lr}) or the "
                f"adapter's scale ({self.configs[index].scale})"
            )
        run.scaler.scale(loss).backward()
        parallel.average(run.adapter.parameters())
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.adapter.touch()
        run.losses.append(value)
        return value

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        return epoch_batches(len(self.items), self.batch_size, self.seed, epoch)

    def _tokens(self) -> Tensor:
        texts = class_prompts(self.class_names, self.train.template)
        tokens: Tensor = self.model.tokenizer(texts)
        return tokens.to(self.device)

    def _prompts(self) -> dict[int, State]:
        with self.autocast():
            return self.backbone.prompts(self._tokens(), self.text_starts)

    def _view(self) -> int:
        """Return the number of the view that this epoch sees of every image."""
        views = self.train.cached_views
        return self.epoch % views if views else self.epoch

    def _augmented(self, batch: NDArray[np.int64]) -> Tensor:
        """Return this epoch's view of some items, (item, 3, height, width)."""
        augmentation = self.train.augmentation
        draws = augmentation.draws(len(self.items), self.seed, self._view())
        items = [self.items[i] for i in batch]
        return self.images.augmented(items, draws[batch], augmentation)

    def _image_states(
        self, batch: NDArray[np.int64], images: Tensor | None = None
    ) -> dict[int, State]:
        views = self.train.cached_views
        if not views or not self.backbone.steps:
            images = self._augmented(batch) if images is None else images
            return self.backbone.images(images, self.vision_starts)
        if self._views is None:
            self._views = ViewCache(self.backbone, self.vision_starts, views * len(self.items))
        rows = self._view() * len(self.items) + batch
        return self._views.states(rows, lambda missing: self._augmented(batch[missing]))

    def _steps_done(self) -> int:
        return self.epoch * len(self._batches(0)) + self.step

    def _results(self, seconds: float, steps: int) -> list[TrainResult]:
        share = seconds / len(self.runs)
        peak = 0
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        return [
            TrainResult(
                run.adapter,
                run.adapter.config,
                self.seed,
                run.losses,
                _change(run),
                share,
                steps * self.batch_size / share if share else 0.0,
                peak,
            )
            for run in self.runs
        ]

    def _identity(self) -> dict[str, Any]:
        return {
            "adapters": [config.to_dict() for config in self.configs],
            "train": self.train.identity(),
            "seed": self.seed,
            "weights": self.model.weights_hash,
            "items": [item.path for item in self.items],
            "classes": self.class_names,
        }

    def _save(self) -> None:
        rank, _ = parallel.rank_and_size()
        if self.folder is None or rank:
            return
        save_training_state(
            self.folder,
            self._identity(),
            {
                "epoch": self.epoch,
                "step": self.step,
                "runs": [
                    {
                        "adapter": run.adapter.official_state_dict(),
                        "losses": run.losses,
                        "initial": run.initial,
                        "optimizer": run.optimizer.state_dict(),
                        "scaler": run.scaler.state_dict(),
                    }
                    for run in self.runs
                ],
            },
        )

    def _resume(self) -> None:
        if self.folder is None:
            return
        state = load_training_state(self.folder, self._identity())
        if state is None:
            return
        self.epoch, self.step = state["epoch"], state["step"]
        for run, saved in zip(self.runs, state["runs"]):
            run.adapter.load_official_state_dict(saved["adapter"])
            run.optimizer.load_state_dict(saved["optimizer"])
            run.scaler.load_state_dict(saved["scaler"])
            run.losses, run.initial = list(saved["losses"]), saved["initial"]


def precision_of(
    precision: str, device: torch.device
) -> tuple[Callable[[], AbstractContextManager[Any]], Any]:
    """Return a function that opens the autocast context, and the gradient scaler."""
    kind = device.type
    if precision == "auto":
        precision = "fp32"
        if kind == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if precision == "fp16" and kind == "cpu":
        raise UserError("precision fp16 needs a GPU; use fp32 or bf16 on a CPU")
    scaler = torch.amp.GradScaler(kind, enabled=precision == "fp16")
    if precision == "fp32":
        return nullcontext, scaler
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return lambda: torch.autocast(kind, dtype=dtype), scaler


def _change(run: _Run) -> float:
    now = run.adapter.official_state_dict()
    moved = max(
        float((now[key] - value.to(now[key])).abs().max()) for key, value in run.initial.items()
    )
    size = max(float(value.abs().max()) for value in run.initial.values())
    return moved / size if size else moved
