"""`LayerChoice`: the layers picked in each tower, with the rule and the evidence."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import atomically
from vlmlayers.placement import DEEPEST, Placement, describe_blocks
from vlmlayers.positions import TOWERS

KEYS = ("vision", "text", "rule", "evidence")


@dataclass(frozen=True)
class LayerChoice:
    """Blocks to adapt in each tower.

    Attributes:
        vision: Blocks of the image tower, from 1, ascending.
        text: Blocks of the text tower, from 1, ascending.
        rule: Name of the rule that chose them.
        evidence: What the rule saw: values, thresholds, stability, and a statement.
    """

    vision: tuple[int, ...]
    text: tuple[int, ...]
    rule: str
    evidence: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        placed = Placement(self.vision, self.text)
        known = {tower: _depth(self.evidence, tower) for tower in TOWERS}
        placed.check({t: DEEPEST if depth is None else depth for t, depth in known.items()})
        for tower in TOWERS:
            object.__setattr__(self, tower, placed.blocks(tower))

    @property
    def decided(self) -> bool:
        """Whether the data decide; False where the choice would change on resampled scores."""
        return bool(self.evidence.get("decided", True))

    @property
    def statement(self) -> str:
        """How sure the choice is, in one or two sentences."""
        return str(self.evidence.get("statement", ""))

    @property
    def placement(self) -> Placement:
        """The chosen blocks as a placement."""
        return Placement(self.vision, self.text)

    @checked
    def blocks(self, tower: str) -> tuple[int, ...]:
        """Return the blocks of one tower."""
        return self.placement.blocks(tower)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `choice.json`."""
        return {
            "vision": list(self.vision),
            "text": list(self.text),
            "rule": self.rule,
            "evidence": self.evidence,
        }

    @checked
    def save(self, path: str | Path) -> Path:
        """Write `choice.json`; a half-written file never appears under the final name."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        return atomically(Path(path), lambda part: part.write_text(text, encoding="utf-8"))

    @classmethod
    @checked
    def load(cls, path: str | Path) -> LayerChoice:
        """Read a choice.

        Raises:
            UserError: The file is absent, not JSON, has unknown or missing keys, or its blocks
                are not positive whole numbers.
        """
        source = Path(path)
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"cannot read the choice {source}: {error.strerror}; "
                "write it with `vlmlayers select`"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{source} is not valid JSON ({error}); write it again with `vlmlayers select`"
            ) from None
        return cls.from_dict(content, where=str(source))

    @classmethod
    def from_dict(cls, content: Any, where: str = "the choice") -> LayerChoice:
        """Return the choice that a dictionary describes, checked key by key."""
        if not isinstance(content, Mapping):
            raise UserError(f"{where} must hold an object with the keys {', '.join(KEYS)}")
        for key in content:
            check_one_of("key", key, KEYS, where=where)
        for key in KEYS[:3]:
            if key not in content:
                raise UserError(f"{where} lacks the key {key!r}")
        evidence = content.get("evidence") or {}
        if not isinstance(evidence, Mapping) or not isinstance(content["rule"], str):
            raise UserError(f"{where}: 'rule' must be a name and 'evidence' an object")
        try:
            return cls(content["vision"], content["text"], content["rule"], dict(evidence))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def __str__(self) -> str:
        return (
            f"vision {describe_blocks(self.vision)}, text {describe_blocks(self.text)} "
            f"(rule {self.rule})"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th scope='row'>{tower}</th><td>{describe_blocks(self.blocks(tower))}</td></tr>"
            for tower in TOWERS
        )
        return (
            f"<table><caption style='white-space:nowrap'>Layers to adapt, rule "
            f"{html.escape(self.rule)}</caption>{rows}"
            f"</table><p>{html.escape(self.statement)}</p>"
        )


def _depth(evidence: Mapping[str, Any], tower: str) -> int | None:
    """Return the number of blocks that the evidence gives a tower, None where it gives none."""
    found: Any = evidence
    for key in ("towers", tower, "depth"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, int) else None
