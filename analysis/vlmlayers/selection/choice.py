"""`LayerChoice`: the layers picked in each tower, with the rule and the evidence."""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmlayers.arguments import Natural, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import read_json, write_text
from vlmlayers.placement import DEEPEST, Amount, Placement, describe_blocks
from vlmlayers.positions import TOWERS
from vlmlayers.words import WIDTH, counted

KEYS = ("vision", "text", "rule", "evidence")
SELDOM, OFTEN = 0.25, 0.75  # shares of resamples up to which, and from which, they agree


@dataclass(frozen=True, repr=False)
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
    # Not compared: the same blocks are the same choice, however they were found.
    evidence: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        placed = Placement(self.vision, self.text)
        known = {tower: _depth(self.evidence, tower) for tower in TOWERS}
        placed.check({t: DEEPEST if depth is None else depth for t, depth in known.items()})
        for tower in TOWERS:
            # Through `Placement`, which takes lists, text and numpy numbers, and sorts them.
            object.__setattr__(self, tower, placed.blocks(tower))

    @property
    def decided(self) -> bool:
        """Whether the data decide all of it; `firm` says for which blocks they do."""
        return bool(self.evidence.get("decided", True))

    @property
    def statement(self) -> str:
        """How sure the choice is, in one or two sentences."""
        return str(self.evidence.get("statement", ""))

    @checked
    def of_another(self, model: str, weights: str, weights_hash: str = "") -> str:
        """Return whose scores it was made from, and not whose; empty where of these, or unsaid.

        Args:
            model: Name of the model.
            weights: Name of its weights, which is that of the file for those of a file.
            weights_hash: Hash of its weights, which tells two files of one name apart.
        """
        return not_of(self.evidence, model, weights, weights_hash)

    @checked
    def chosen_on(self, dataset: str, split: str = "test") -> bool:
        """Return whether it was made from scores of images of a split of a dataset."""
        splits = self.evidence.get("chosen_on", {})
        # Pooled rows alone do not say of which datasets they are.
        return bool({split, "all"} & set(splits.get(dataset, splits.get("*", "")).split("/")))

    @property
    def placement(self) -> Placement:
        """The chosen blocks as a placement, with the amount that a search chose beside them."""
        amount = self.evidence.get("amount")
        return Placement(self.vision, self.text, Amount.parse(amount) if amount else Amount())

    @checked
    def blocks(self, tower: str) -> tuple[int, ...]:
        """Return the blocks of one tower."""
        return self.placement.blocks(tower)

    @checked
    def placed(self, depths: Mapping[str, int]) -> Placement:
        """Return the placement in towers of so many blocks, as many as it was chosen among.

        Args:
            depths: Number of blocks of each tower; a tower that is not named has none.

        Raises:
            UserError: A block is not there, or was chosen in a tower of another depth: block 6 of
                12 says nothing of block 6 of 24.
        """
        placed = self.placement.check(depths, "the choice")
        for tower in TOWERS:
            known, depth = _depth(self.evidence, tower), depths.get(tower, 0)
            if placed.blocks(tower) and known not in (None, depth):
                raise UserError(
                    f"the choice was made among {known} {tower} blocks, and the {tower} tower has "
                    f"{counted(depth, 'block')}; choose from scores of this model"
                )
        return placed

    def _placed_in(self, model: Any) -> Placement:
        from vlmlayers.models.handover import block_names

        return self.placed({tower: len(names) for tower, names in block_names(model).items()})

    @property
    def zero_based(self) -> dict[str, tuple[int, ...]]:
        """The chosen blocks by tower, counted from 0 as modules and peft count them."""
        return {tower: tuple(block - 1 for block in self.blocks(tower)) for tower in TOWERS}

    def module_names(self, model: Any) -> dict[str, tuple[str, ...]]:
        """Return the names of the chosen blocks in `model.named_modules()`, by tower.

        Args:
            model: What `load_model` gives, a model of open_clip or transformers, also inside
                `DataParallel`, `torch.compile` or peft, or what open_clip's factory returns.

        Raises:
            UserError: It is no such model, has no such block, or another depth than the towers
                that the choice was made in.
        """
        # Late, here and below: models bring torch, which reading a choice does not need.
        from vlmlayers.models import handover

        return handover.module_names(model, self._placed_in(model))

    def to_peft(self, model: Any, **options: Any) -> Any:
        """Return the `LoraConfig` that puts LoRA into the chosen blocks of each tower alone.

            peft_model = peft.get_peft_model(clip, choice.to_peft(clip, r=8, lora_alpha=16))

        Args:
            model: As for `module_names`.
            **options: Those of peft's `LoraConfig`. `target_modules` are names of layers inside a
                block, such as `q_proj`; where absent every linear layer that is called, and fused
                attention, of which peft has neither DoRA nor initial values made from the weights.
                One whose weights alone are read, as `qkv` of EVA, would not train.

        Raises:
            UserError: peft is not installed or refuses an option, no block is chosen or none has
                such a layer, or what `module_names` raises.
        """
        from vlmlayers.models import handover

        return handover.lora_config(model, self._placed_in(model), options)

    def freeze(self, model: Any) -> dict[str, int]:
        """Leave the chosen blocks of a model alone trainable, and count their parameters.

        Args:
            model: As for `module_names`; its `requires_grad` flags are set.

        Returns:
            Trainable parameters by tower.

        Raises:
            UserError: No block is chosen, which would freeze the whole model, those chosen have
                LoRA, or what `module_names` raises.
        """
        from vlmlayers.models import handover

        return handover.freeze(model, self._placed_in(model))

    def parameter_groups(self, model: Any, **options: Any) -> list[dict[str, Any]]:
        """Return the trainable parameters of the chosen blocks as groups for an optimiser.

            optimiser = torch.optim.AdamW(choice.parameter_groups(clip, lr=1e-5))

        Args:
            model: As for `module_names`, after `freeze` or `get_peft_model`.
            **options: Of each group, such as `lr`; biases and norms never decay.

        Returns:
            A group for each tower's matrices, `vision` and `text`, and one for what has one
            dimension, `vision 1d` and `text 1d`; those that would be empty are left out.

        Raises:
            UserError: No block is chosen, or nothing in those chosen is trainable.
        """
        from vlmlayers.models import handover

        return handover.parameter_groups(model, self._placed_in(model), options)

    @checked
    def standing(self, tower: str, depth: Natural | None = None) -> tuple[str, ...]:
        """Return how each block of a tower stands, from block 1 on.

        `firm`: chosen here, in at least 75 % of the resamples and of the choices without one of the
        datasets; `frozen`: left out here and in as many; `open`: they disagree with each other or
        with this choice, or the rule itself doubts the tower, whatever they say: noise can be
        chosen again and again; `fixed`: chosen without resamples.

        Args:
            tower: `vision` or `text`.
            depth: Number of its blocks; None takes what the evidence says, 0 where it says nothing.
        """
        depth = depth or _depth(self.evidence, tower) or 0
        found = self.evidence.get("towers", {}).get(tower, {})
        if found.get("notes"):
            return ("open",) * depth
        share = found.get("frequency")
        if share is None:
            chosen = self.blocks(tower)
            return tuple("fixed" if b in chosen else "frozen" for b in range(1, depth + 1))
        chosen, without = self.blocks(tower), found.get("without", {})
        return tuple(
            _standing(b in chosen, float(one)) if borne(b, b in chosen, without) else "open"
            for b, one in enumerate(share, 1)
        )

    @checked
    def firm(self, tower: str) -> tuple[int, ...]:
        """Return the blocks of a tower that the data decide for; see `standing`."""
        return self._that_stand(tower, "firm")

    @checked
    def open(self, tower: str) -> tuple[int, ...]:
        """Return the blocks of a tower on which the data do not decide; see `standing`."""
        return self._that_stand(tower, "open")

    def _that_stand(self, tower: str, how: str) -> tuple[int, ...]:
        return tuple(b for b, one in enumerate(self.standing(tower), 1) if one == how)

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
        # NaN is no JSON, and readers other than Python's refuse it.
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        return write_text(Path(path), text)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> LayerChoice:
        """Read a choice, from its file or its run folder.

        Raises:
            UserError: The file is absent, not JSON, has unknown or missing keys, or its blocks
                are not positive whole numbers.
        """
        path = Path(path) / "choice.json" if Path(path).is_dir() else Path(path)
        content = read_json(path, "the choice", "write it with `vlmlayers select`")
        return cls.from_dict(content, where=str(path))

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

    def __repr__(self) -> str:
        # The evidence would fill screens; the statement sums it up.
        said = textwrap.wrap(self.statement, WIDTH, max_lines=8, placeholder=" …")
        return "\n".join([f"LayerChoice({self})", *said])

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


def not_of(found: Mapping[Any, Any], model: str, weights: str, weights_hash: str = "") -> str:
    """Return of which model something is, and not of which; empty where of this, or unsaid.

    Args:
        found: What it says of itself, under the names of the other arguments.
        model: Name of the model.
        weights: Name of its weights.
        weights_hash: Hash of its weights; compared where both are known.
    """
    ours = (model, weights)
    theirs = tuple(found.get(key, one) for key, one in zip(("model", "weights"), ours))
    hashes = (str(found.get("weights_hash", "")), weights_hash)
    if theirs == ours and all(hashes) and hashes[0] != hashes[1]:
        theirs, ours = ((model, f"{weights}, {one[:12]}") for one in hashes)
    return "" if theirs == ours else "of {} ({}), not of {} ({})".format(*theirs, *ours)


def borne(block: int, chosen: bool, without: Mapping[str, Sequence[int]]) -> bool:
    """Return whether the choices without one dataset agree on a block as resamples have to.

    Args:
        block: Number of the block.
        chosen: Whether it is chosen with all datasets.
        without: The blocks chosen without each dataset; empty where that is not known.
    """
    if not without:
        return True
    share = sum(block in blocks for blocks in without.values()) / len(without)
    return _standing(chosen, share) != "open"


def _standing(chosen: bool, share: float) -> str:
    if chosen and share >= OFTEN:
        return "firm"
    return "frozen" if share <= SELDOM and not chosen else "open"


def _depth(evidence: Mapping[str, Any], tower: str) -> int | None:
    """Return the number of blocks that the evidence gives a tower, None where it gives none."""
    found: Any = evidence
    for key in ("towers", tower, "depth"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, int) else None
