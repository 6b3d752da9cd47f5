"""Zero-shot CLIP on what trained methods are tested on, with two templates."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmadapters.methods.base import Method
from vlmadapters.protocols.cells import Rows
from vlmadapters.protocols.evaluate import Answers, Case, Evaluator
from vlmadapters.protocols.results import ZERO_SHOT_CLIP, ZERO_SHOT_OWN
from vlmadapters.protocols.trained import Target, result_row
from vlmlayers.metrics.checks import Labels


@dataclass(eq=False)
class ZeroShot:
    """Answers of the untrained model, each target tested once.

    Papers print zero-shot CLIP with a template for each dataset; most methods start from the common
    one. A gain over either is a claim of its own.

    Args:
        protocol: Name of the protocol, for rows.
        evaluator: Tests the model.
        template: The common template.
    """

    protocol: str
    evaluator: Evaluator
    template: str
    _found: dict[tuple[str, str, tuple[str, ...]], list[Answers]] = field(
        default_factory=dict, init=False, repr=False
    )

    def answers(self, target: Target) -> list[Answers]:
        """Return the answers with the common and with the dataset's own template."""
        return self._answers(target, self._templates(target))

    def labels_in(self, target: Target, template: str) -> Labels:
        """Return the labels given with any template, tested anew where it is none of the two."""
        known = self._templates(target)
        if template in known:
            return self.answers(target)[known.index(template)].labels
        return self._answers(target, (template,))[0].labels

    def _answers(self, target: Target, templates: tuple[str, ...]) -> list[Answers]:
        data, key = target.dataset, (target.dataset.manifest.name, target.kind, templates)
        if key not in self._found:
            plain = Method()
            cases = [Case(plain, data.task(target.kind, one)) for one in templates]
            self._found[key] = self.evaluator.answers(data.images, target.items(), cases)
        return self._found[key]

    def rows(self, target: Target) -> Rows:
        """Return the rows of a target, one for each template."""
        truth, named = target.truth(), zip((ZERO_SHOT_CLIP, ZERO_SHOT_OWN), self._templates(target))
        return [
            result_row(self.protocol, self.evaluator, target, truth, answers, method, template)
            for answers, (method, template) in zip(self.answers(target), named)
        ]

    def _templates(self, target: Target) -> tuple[str, str]:
        return self.template, target.dataset.manifest.zero_shot_template
