"""Training methods: one, or several placements and methods side by side on the same views.

Those trained together see the same few-shot items, order and views as each would alone; what is
frozen below their first blocks is computed once for all. The losses are those of separate runs.
Where the whole vision tower is frozen, features of views are kept with the backbone, for every
training that shares it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmadapters.clip.frozen import VIEW_BYTES, Backbone
from vlmadapters.clip.products import adopt_products, timed_products
from vlmadapters.clip.walk import State
from vlmadapters.data.images import Images, as_first_seen, epoch_batches
from vlmadapters.data.task import Task
from vlmadapters.device import precision_of
from vlmadapters.methods import METHODS, own_code
from vlmadapters.methods.base import FitData, Method, Step
from vlmadapters.methods.config import MethodConfig
from vlmadapters.training import processes
from vlmadapters.training.graphs import StepGraph
from vlmadapters.training.memory import check_memory, view_bytes
from vlmadapters.training.optimization import learning_rate, new_optimizer, own_draws, set_rate
from vlmadapters.training.recipes import Recipe, TrainConfig
from vlmadapters.training.state import load_training_state, save_training_state
from vlmadapters.training.views import Views
from vlmlayers.errors import UserError
from vlmlayers.manifests import Item
from vlmlayers.models.devices import memory_errors, placed, products_in, resolve_precision
from vlmlayers.models.modes import at_rest, eval_mode
from vlmlayers.progress import bar
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)
DRAWS = 0xD5  # key of the random draws inside training steps
# Seconds between the states saved at ends of epochs: on a GPU some epochs take a third of one, and
# saving a fifth of that.
SAVE_SECONDS = 5.0
LOOK_EVERY = 20  # steps between two readings of the losses, for which the host waits for the device


@dataclass(eq=False)
class TrainResult:
    """A trained method and how it went.

    Attributes:
        method: The method, in evaluation mode.
        config: Its settings.
        losses: Loss of every update.
        seed: Seed of initialisation, order and views.
        seconds: Time of the whole group's training, over all its runs, divided evenly.
    """

    method: Method
    config: MethodConfig
    seed: int
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(eq=False)
class _Training:
    """One of the methods that are trained side by side."""

    method: Method
    classes: Any
    optimizer: torch.optim.Optimizer | None
    scaler: Any
    losses: list[float] = field(default_factory=list)
    unread: list[Tensor] = field(default_factory=list)  # losses that are still on the device only


class Diverged(UserError):
    """A training came to a loss, or answers, that are not finite.

    Attributes:
        numbers: Which of the methods that are trained side by side.
        settings: Their recipes, where an experiment trained them.
    """

    def __init__(self, message: str, numbers: Sequence[int]) -> None:
        super().__init__(message)
        self.numbers = tuple(numbers)
        self.settings: tuple[Recipe, ...] = ()


class Trainer:
    """Train one or several methods or placements on the same few-shot items.

    Args:
        model: The backbone with preprocessing and tokenizer (`vlmlayers.models.load_model`).
        images: Images of the dataset.
        items: Few-shot items with labels from 0, as `base_or_novel` returns them.
        task: The classes trained on, by label; class names alone stand for the recipe's template.
        configs: Settings of each method to train.
        train: The recipe, one for all.
        seed: Seed of initialisation, order and views.
        validation: Few-shot items of the validation split, for methods that fit on them.
        backbone: Walks to share with an evaluation; built here where absent.
        folder: Folder for checkpoints. Training resumes from the one it finds there.
        progress: Show a bar.
    """

    def __init__(
        self,
        model: Any,
        images: Images,
        items: Sequence[Item],
        task: Task | Sequence[str],
        configs: Sequence[MethodConfig],
        train: TrainConfig | None = None,
        seed: int = 1,
        *,
        validation: Sequence[Item] = (),
        backbone: Backbone | None = None,
        folder: Path | None = None,
        progress: bool = True,
    ) -> None:
        self.model, self.images, self.items = model, images, list(items)
        self.device, self.seed = model.device, seed
        self.train = resolved(train or TrainConfig(), self.device)
        if not isinstance(task, Task):
            task = Task(tuple(task), self.train.template)
        self.task, self.validation = task, list(validation)
        self.folder, self.progress = folder, progress
        self.configs = list(configs)
        self.train = replace(self.train, cuda_graph=self._records())
        self._check_items()
        self.known_labels = self._labels(self.items)
        self.labels = placed(self.known_labels, self.device)
        self.backbone = backbone or Backbone(model.clip, self.train.savings, model.tokenize)
        self.batch_size = min(self.train.batch_size, len(self.items))
        if any(config.in_steps for config in self.configs):
            processes.check_divides(map(len, self.batches(0)))
        self.autocast, _ = precision_of(self.train.precision, self.device)
        self.runs = [self._new_run(config) for config in self.configs]
        self.starts = [run.method.first(self.backbone, "vision") for run in self.runs]
        self.views = Views(
            self.images, self.items, self.train, seed, self.backbone, self.starts, self.autocast
        )
        self.steps_per_epoch = len(self.batches(0))
        self.total_steps = count_steps(self.train, len(self.items))
        # Rounded up, since schedules and `end_epoch` count whole epochs, begun ones too.
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self._check_warmup()
        self._check_memory()
        self.epoch = self.step = 0
        self.spent = 0.0  # seconds of earlier runs of this training
        self._saved_at = time.perf_counter()
        self.graph = StepGraph() if self.train.cuda_graph else None

    def _check_items(self) -> None:
        labels = {item.label for item in self.items}
        if not labels <= set(range(len(self.task.class_names))):
            raise UserError(
                f"training labels go up to {max(labels)}, but there are "
                f"{len(self.task.class_names)} class names; relabel the items with base_or_novel"
            )
        if not self.items:
            raise UserError("there are no training items; check the few-shot draw")

    def _check_warmup(self) -> None:
        """Refuse a training that ends in its warm-up, whose rate moves next to nothing."""
        trains = any(run.optimizer is not None for run in self.runs)
        if trains and self.train.warmup_epochs >= self.epochs:
            name = self.runs[0].method.config.name
            raise UserError(
                f"{name} would train {counted(self.total_steps, 'step')}, all of them warm-up at a "
                f"rate of {self.train.warmup_lr:g} (epochs {self.epochs}, warmup_epochs "
                f"{self.train.warmup_epochs}); train {self.train.warmup_epochs + 1} epochs or more "
                "or set warmup_epochs=0"
            )

    def _check_memory(self) -> None:
        _, size = processes.rank_and_size()
        cached = self.backbone.steps and not self.views.plain
        # Plain features are joint embeddings, whose size does not matter here.
        views = self.train.cached_views * len(self.items) if cached else 0
        kept = min(VIEW_BYTES, view_bytes(self.backbone, views, self.starts)) if views else 0
        trained = [run.method for run in self.runs if run.optimizer is not None]
        if trained:
            check_memory(self.backbone, trained, self.task, self.batch_size // size, kept)

    def _records(self) -> bool:
        """Return whether steps are recorded: as asked for, or wherever they can be."""
        varying = [config.title for config in self.configs if METHODS[config.name].varies]
        _, size = processes.rank_and_size()
        # Class prompts that are prepared in each step are read by a tokenizer on the host.
        anew = not self.train.savings.text_prefix
        if self.train.cuda_graph is None:
            return self.device.type == "cuda" and not varying and not anew and size == 1
        if self.train.cuda_graph and (varying or anew or size > 1):
            why = f"steps of {varying[0]} vary" if varying else f"there are {size} processes"
            why = "text_prefix=false prepares the prompts in each" if anew else why
            raise UserError(f"cuda_graph records steps that stay the same, but {why}; leave it off")
        return self.train.cuda_graph

    def _new_run(self, config: MethodConfig) -> _Training:
        with own_draws(config.name, self.seed, self.device):
            method = METHODS[config.name].build(config, self.backbone, self.task, self.seed)
        # Loss scaling adapts to one method's gradients, so that no other one changes its steps.
        _, scaler = precision_of(self.train.precision, self.device)
        return _Training(method, self._prepared(method), self._optimizer(method), scaler)

    def _optimizer(self, method: Method) -> torch.optim.Optimizer | None:
        """Return an optimizer of what a method trains; None where that is nothing."""
        groups = method.parameter_groups()
        # Optimizers refuse an empty list, and some methods are fitted without a gradient.
        return new_optimizer(groups, self.train) if any(g["params"] for g in groups) else None

    def _prepared(self, method: Method) -> Any:
        # In evaluation mode, or dropout of the backbone would enter the frozen class prompts.
        with torch.no_grad(), self.autocast(), eval_mode(self.backbone.clip):
            return method.prepare(self.backbone, self.task)

    def fit(self) -> list[TrainResult]:
        """Train to the end and return one result per method.

        Raises:
            Diverged: A loss is not a number.
            UserError: The device runs out of memory.
        """
        advice = (
            f"lower batch_size ({self.train.batch_size}), adapt later blocks, use fewer classes or "
            f"train fewer together ({len(self.runs)})"
        )
        with (
            memory_errors(self.device, advice),
            at_rest(self.backbone.clip),
            products_in(self.train.precision),
            self.images.arriving(as_first_seen(self.items, self.seed)),
        ):
            return self._fit()

    def _fit(self) -> list[TrainResult]:
        resumed = self._resume()
        self._started, done = time.perf_counter() - self.spent, self._steps_done()
        for run in self.runs:
            # The methods alone: the backbone stays in evaluation mode.
            run.method.train()
            if not resumed:
                # A fit may replace parameters by others, which the optimizer then has to hold.
                with own_draws(run.method.config.name, self.seed, self.device):
                    run.method.fit(self._fit_data(run))
                run.optimizer = self._optimizer(run.method)
        if resumed:
            LOG.debug("going on from step %d of %d in %s", done, self.total_steps, self.folder)
        if any(run.optimizer is not None for run in self.runs):
            with bar(
                description="train",
                total=self.total_steps,
                unit="step",
                show=self.progress and processes.is_first(),
                initial=done,
            ) as shown:
                while self._steps_done() < self.total_steps:
                    self._one_epoch(shown)
        for run in self.runs:
            with own_draws(run.method.config.name, self.seed, self.device):
                run.method.finish(self._fit_data(run))
            run.method.eval()
        # Views and frozen activations are shared, so that no method has a time of its own.
        share = (time.perf_counter() - self._started) / len(self.runs)
        return [
            TrainResult(run.method, run.method.config, self.seed, run.losses, share)
            for run in self.runs
        ]

    def _one_epoch(self, shown: Any) -> None:
        left = self.total_steps - self._steps_done()
        # From the step it stopped at, and no further than the steps that the recipe counts.
        batches = self.batches(self.epoch)[self.step :][:left]
        every, last = self.train.save_every, self.step + len(batches)
        for batch, images in self._with_images(batches):
            self._set_rates()
            self.update(batch, images)
            self.step += 1
            shown.update()
            # The last step's state is saved below, with what ends an epoch: without it, a training
            # killed in between would pass for done.
            saves = every and self.step % every == 0 and self.step < last
            if saves or self.step % LOOK_EVERY == 0:
                self._look(shown)
            if saves:
                self._save()
        self._look(shown)
        # Behind the draws of the last update, and not those of the next one.
        seed = self._generator(self.train.updates_per_batch).initial_seed()
        for run in self.runs:
            with own_draws(run.method.config.name, seed, self.device):
                run.method.end_epoch(self.epoch + 1, self.epochs)
        waited = time.perf_counter() - self._saved_at >= SAVE_SECONDS
        due = self.step % every == 0 if every else waited
        # A training that is counted in steps may end within an epoch.
        if self.step == self.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0
        if due or self._steps_done() == self.total_steps:
            self._save()

    def _look(self, shown: Any) -> None:
        """Read the losses of the steps since the last call and show the last one.

        Raises:
            Diverged: Losses are not finite; names the step that the first was in.
        """
        ends: dict[int, str] = {}
        for index, run in enumerate(self.runs):
            # All at once: the host waits for the device once for many steps, not at each.
            found = torch.cat(run.unread).tolist() if run.unread else []
            for number, loss in enumerate(found, len(run.losses)):
                if not math.isfinite(loss):
                    ends.setdefault(index, self._end(run, number, loss))
            run.losses += found
            run.unread.clear()
        if ends:
            raise Diverged(next(iter(ends.values())), list(ends))
        last = [run.losses[-1] for run in self.runs if run.losses]
        shown.set_postfix(loss=f"{np.mean(last):.3f}", refresh=False)

    def _end(self, run: _Training, number: int, loss: float) -> str:
        """Return that a loss is not finite, and in which update."""
        epoch, step = divmod(number // self.train.updates_per_batch, self.steps_per_epoch)
        return (
            f"the loss of {run.method.config.title} {run.method.config.placement} became {loss} in "
            f"epoch {epoch + 1}, step {step + 1}; lower lr ({self.train.lr}) or how strongly the "
            "method acts (its scale, where it has one)"
        )

    def _set_rates(self) -> None:
        done = self._steps_done()
        rate = learning_rate(self.train, done, self.total_steps, self.steps_per_epoch)
        for run in self.runs:
            if run.optimizer is not None:
                set_rate(run.optimizer, rate, self.epoch < self.train.warmup_epochs)

    def _with_images(
        self, batches: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor | None]]:
        """Yield batches with their images, which worker threads prepare one batch ahead."""
        if self.views.kept:  # most views are there already
            yield from ((batch, None) for batch in batches)
            return
        mine = [processes.share(batch) for batch in batches]
        view = partial(self.views.images_of, epoch=self.epoch)
        yield from zip(batches, self.images.ahead(view, mine))

    def update(self, batch: NDArray[np.int64], images: Tensor | None = None) -> None:
        """Update every method on one global batch; the host does not wait for the device.

        Args:
            batch: Indices of the items, over all processes.
            images: This process's share of the images, where they are made already.
        """
        # Order and views are drawn for the global batch, so that N processes see what one would.
        mine = processes.share(batch)
        rows = torch.from_numpy(mine)
        labels = self.labels[placed(rows, self.device)]
        kept = self.views.states(mine, self.epoch)
        if kept:
            inputs = [state.x for state in kept.values() if state.x is not None]
        else:
            inputs = [self.views.images_of(mine, self.epoch) if images is None else images]
        step = partial(self._step, kept, self.known_labels[rows])
        run_step = step if self.graph is None else partial(self.graph.run, step)
        trained = [run for run in self.runs if run.optimizer is not None]
        for run, losses in zip(trained, run_step(labels, *inputs)):
            run.method.touch()
            run.unread.append(losses)

    def _step(
        self, kept: Mapping[int, State], known: Tensor, labels: Tensor, *inputs: Tensor
    ) -> list[Tensor]:
        """Update every method; return its losses, (update,) each.

        A function of tensors alone where no method's step varies, so that it can be recorded.

        Args:
            kept: Frozen states by block whose activations `inputs` are; none where these are the
                images.
            known: (image,) classes, on the CPU.
            labels: The same on the device.
            inputs: The images, or activations of each kept state.
        """
        if kept:
            states = {b: replace(state, x=x) for (b, state), x in zip(kept.items(), inputs)}
        else:
            with self.autocast():
                states = self.backbone.images(inputs[0], self.starts)
        return [
            self._update_one(run, states[start], labels, known)
            for run, start in zip(self.runs, self.starts)
            if run.optimizer is not None
        ]

    def _update_one(self, run: _Training, images: State, labels: Tensor, known: Tensor) -> Tensor:
        assert run.optimizer is not None
        if not self.train.savings.text_prefix:
            run.classes = self._prepared(run.method)
        losses = []
        for repeat in range(self.train.updates_per_batch):
            # None, not 0: weight decay and momentum move a parameter whose gradient is 0, and leave
            # one that has none. LwEIB relies on the difference.
            run.optimizer.zero_grad(set_to_none=True)
            number = self._steps_done() * self.train.updates_per_batch + repeat
            # A generator for each update: methods trained together must not share its state.
            generator = self._generator(repeat)
            step = Step(
                self.backbone, images, labels, run.classes, generator,
                repeat=repeat, number=number, known=known,
            )  # fmt: skip
            with ExitStack() as held:
                if run.method.varies:  # what does not is recorded, and draws nothing
                    seed = generator.initial_seed()
                    held.enter_context(own_draws(run.method.config.name, seed, self.device))
                held.enter_context(self.autocast())
                loss = run.method.loss(step)
            run.scaler.scale(loss).backward()
            # Gradients are averaged while still scaled: an overflow in one process is then one in
            # all, and all of them skip the step.
            processes.average(run.method.parameters())
            if self.train.max_norm:
                # The norm to clip at is one of true gradients.
                run.scaler.unscale_(run.optimizer)
                nn.utils.clip_grad_norm_(run.method.parameters(), self.train.max_norm)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            losses.append(processes.mean_over_processes(loss))
        return torch.stack(losses)

    def _labels(self, items: Sequence[Item]) -> Tensor:
        return torch.tensor([item.label for item in items])

    def _generator(self, repeat: int) -> torch.Generator:
        """Return the source of a step's random draws: the same whether resumed or not."""
        # A hash of all that names the update: a sum would give two updates the same draws.
        key = np.random.SeedSequence([self.seed, self._steps_done(), repeat, DRAWS])
        return torch.Generator().manual_seed(int(key.generate_state(1)[0]))

    def _fit_data(self, run: _Training) -> FitData:
        def validation() -> tuple[Tensor, Tensor]:
            features = self.views.features_unchanged(self.validation)
            return features, placed(self._labels(self.validation), self.device)

        given = validation if self.validation else None
        return FitData(self.backbone, run.classes, self.labels, self.views.features, given)

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the items of each step of an epoch, by their index."""
        size, drop = self.batch_size, self.train.drop_last
        return epoch_batches(len(self.items), size, self.seed, epoch, drop_last=drop)

    def _steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {
            "methods": [{"method": c.name, **c.to_dict()} for c in self.configs],
            "train": self.train.identity(),
            "seed": self.seed,
            "model": self.model.identity(),
            "data": self.images.identity([*self.items, *self.validation]).text(),
            "task": self.task.to_dict(),
            **own_code(self.configs),
        }

    def _save(self) -> None:
        # Processes hold equal parameters and counters; two would write one file at a time.
        self._saved_at = time.perf_counter()
        if self.folder is None or not processes.is_first():
            return
        save_training_state(
            self.folder,
            self._identity,
            {
                "epoch": self.epoch,
                "step": self.step,
                "seconds": time.perf_counter() - self._started,
                "products": timed_products(),
                "runs": [_saved(run) for run in self.runs],
            },
        )

    def _resume(self) -> bool:
        """Take up the training that the folder holds; return whether there is one."""
        state = None
        if self.folder is not None:
            state = load_training_state(self.folder, self._identity)
        if state is None:
            return False
        if adopt_products(state.get("products", [])):
            for run in self.runs:  # which were prepared by products that round otherwise
                run.classes = self._prepared(run.method)
        self.epoch, self.step, self.spent = state["epoch"], state["step"], state["seconds"]
        for run, saved in zip(self.runs, state["runs"]):
            run.method.load_state_dict(saved["method"])
            run.method.touch()
            run.optimizer = self._optimizer(run.method)
            if run.optimizer is not None:
                # New groups: with `cuda_graph`, which may have been switched, rates are tensors.
                own = {"param_groups": run.optimizer.state_dict()["param_groups"]}
                run.optimizer.load_state_dict(saved["optimizer"] | own)  # rates are set each step
            run.scaler.load_state_dict(saved["scaler"])
            run.losses = list(saved["losses"])
        return True


def count_steps(train: TrainConfig, items: int) -> int:
    """Return the number of batches that a training on some number of items takes."""
    if train.steps_per_shot:
        return train.steps_per_shot * train.shots
    batches = epoch_batches(items, train.batch_size, 0, 0, drop_last=train.drop_last)
    return train.epochs * len(batches)


def resolved(train: TrainConfig, device: torch.device) -> TrainConfig:
    """Return a recipe with its precision resolved for a device.

    Raises:
        UserError: It asks for what the device does not have.
    """
    for name in ("device_crops", "cuda_graph"):
        if getattr(train, name) and device.type != "cuda":
            raise UserError(f"{name} needs a GPU, and the model is on {device}; leave it off")
    return replace(train, precision=resolve_precision(train.precision, device))


def _saved(run: _Training) -> dict[str, Any]:
    return {
        "method": run.method.state_dict(),
        "losses": run.losses,
        "optimizer": run.optimizer.state_dict() if run.optimizer is not None else {},
        "scaler": run.scaler.state_dict(),
    }
