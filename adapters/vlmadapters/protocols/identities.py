"""What each cell of an experiment depends on: everything that its numbers do, and nothing else.

One key too many trains again, one too few shows stale numbers. How a step is computed (savings,
graphs) is not part of it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from vlmadapters.data.options import DataOptions
from vlmadapters.methods import own_code
from vlmadapters.protocols.cells import Cell, Like
from vlmadapters.protocols.datasets import Datasets
from vlmadapters.protocols.trained import Target
from vlmadapters.training.recipes import Recipe, TrainConfig
from vlmadapters.training.titles import title
from vlmadapters.training.trainer import resolved
from vlmlayers.errors import UserError


class Identities:
    """The cells of an experiment by what they depend on.

    Args:
        model: The model.
        datasets: The datasets of the experiment.
        template: Prompt template of zero-shot CLIP.
        precision: Precision of all tests.
        options: How images are read, and how many are tested.
    """

    def __init__(
        self, model: Any, datasets: Datasets, template: str, precision: str, options: DataOptions
    ) -> None:
        self.model, self.datasets = model, datasets
        self.template, self.precision, self.options = template, precision, options
        # Once: every cell asks for it, several times, and looking at all weights takes a while.
        self._of_model = model.identity()
        self._marks: dict[tuple[str, str], str] = {}  # of the tokens of tested classes

    @property
    def fits(self) -> bool:
        """Whether values may be chosen on validation items: not where these are tested."""
        return self.datasets.split != "val"

    def train_of(self, recipe: Recipe, source: str) -> TrainConfig:
        """Return the training values of a recipe on a source."""
        data = self.datasets[source]
        return resolved(recipe.train_for(data.origin).of_share(data.share), self.model.device)

    def zero_shot(self, source: str) -> Cell:
        """Return the cell of zero-shot CLIP on all that a source's trainings are tested on."""
        return Cell(f"{source}-zero-shot", self._untrained(source))

    def cell(self, source: str, seed: int, recipe: Recipe) -> Cell:
        """Return the cell of one training."""
        config = recipe.method_for(self.datasets[source].origin)
        identity = {
            **self._untrained(source),
            "data": self.datasets.hashes(self.datasets.read(source)),
            "seed": seed,
            "method": config.name,
            "settings": config.to_dict(),
            "train": self.train_of(recipe, source).identity(),
            **own_code([config]),
        }
        # Cells from when values were chosen on tested items, or on those of another draw, differ.
        if config.validates and not self.fits:
            identity["validation"] = "none"
        elif config.validates and "val" in identity["data"][source]:
            identity["validation"] = "drawn after the training items"
        parts = [source, config.name, config.placement, f"s{seed}"]
        return Cell("-".join(filter(None, parts)), identity)

    def like(self, source: str, recipe: Recipe) -> Like:
        """Return what trained cells have to be like to stand in a table with a recipe's."""
        # Any seed will do: cells of all seeds belong in the table.
        return Like(self.cell(source, 0, recipe).identity, title(recipe), recipe.amount)

    def _untrained(self, source: str) -> dict[str, Any]:
        """Return all that zero-shot rows depend on, as JSON values."""
        protocol, targets = self.datasets.protocol, self.datasets.tested(source)
        return {
            "protocol": protocol.name,
            "source": source,
            "split": self.datasets.split,
            "limit": self.options.items,  # its name when the first cells were kept
            "left_out": [self.options.present_only, self.options.skip_unreadable],
            "template": self.template,
            "model": self._of_model,
            "precision": self.precision,
            "targets": {
                f"{one.dataset.manifest.name}/{one.kind}": self._told_by(one) for one in targets
            },
            "data": self.datasets.hashes(
                (name, self.datasets.split) for name in (source, *self.datasets.targets)
            ),
        }

    def _told_by(self, target: Target) -> str:
        """Return the template of a target's zero-shot rows, and what marks the tokens of its words.

        OpenAI's tokens have no mark.
        """
        key = target.dataset.manifest.name, target.kind
        if key not in self._marks:
            task = target.dataset.task(target.kind, self.template)
            prompts = [*task.prompts(), *task.prompts(task.own_template)]
            self._marks[key] = ""
            with suppress(UserError):  # a model without a tokenizer is refused in its place
                self._marks[key] = self.model.tokens_mark(prompts)
        own = target.dataset.manifest.zero_shot_template
        return " in tokens ".join(filter(None, (own, self._marks[key])))
