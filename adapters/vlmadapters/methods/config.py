"""What every method's settings have in common: a name, the towers it can be placed in, blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from vlmlayers.errors import UserError, check_one_of, shortened
from vlmlayers.placement import Placement, runs
from vlmlayers.positions import TOWERS

# Blocks per tower of the backbone that public recipes and checkpoints are for.
VIT_B_16 = {"vision": 12, "text": 12}
OURS = ".safetensors"  # ends the files of trained methods; others are of the authors' layouts
# Why most methods cannot be exported as weights of the backbone, after their title.
UNMERGED = "computes beside the backbone's weights, and cannot be merged into them"


@dataclass(frozen=True)
class MethodConfig:
    """Settings of a method: where it acts and how large it is. Subclasses add their fields.

    Class attributes describe the method and are no settings: `name` is its key in `METHODS`,
    `title` its name in tables, `towers` those whose blocks a placement may name, `own_scale` the
    factor of its cosines where it is not the backbone's, else 0, `unstored` the settings that its
    answers depend on and its authors' files leave out, and `mergeable` whether weights of the
    backbone can hold it.

    Attributes:
        vision: Vision blocks at which the method acts, counted from 1, rising.
        text: Text blocks at which it acts, counted from 1, rising.

    Raises:
        UserError: A block is not a positive number or stands twice, or lies in a tower that the
            method cannot be placed in.
    """

    vision: tuple[int, ...] = ()
    text: tuple[int, ...] = ()

    name: ClassVar[str] = "zero-shot"
    title: ClassVar[str] = "zero-shot CLIP"
    towers: ClassVar[tuple[str, ...]] = ()
    own_scale: ClassVar[float] = 0.0
    unstored: ClassVar[tuple[str, ...]] = ()
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for one in fields(self):
            # `--set power=3` and `power=3.0` are one setting of a user's method, and one cell.
            if one.type in (float, "float") and type(value := getattr(self, one.name)) is int:
                object.__setattr__(self, one.name, float(value))
        placed = Placement(self.vision, self.text)
        for tower in TOWERS:
            # As `Placement` holds them, so that settings at equal placements are equal.
            object.__setattr__(self, tower, placed.blocks(tower))
            if placed.blocks(tower) and tower not in self.towers:
                raise UserError(
                    f"{self.name} acts at no {tower} block; name {self.towers[0]} blocks only"
                    if self.towers
                    else self._no_placement()
                )

    @classmethod
    def _no_placement(cls) -> str:
        return f"{cls.name} has no placement: it acts at no block of either tower"

    @classmethod
    def published(cls, depths: Mapping[str, int], **options: Any) -> Self:
        """Return the settings at the published placement, for a backbone of other depths too.

        Args:
            depths: Number of blocks of each tower.
            **options: Other fields.
        """
        return cls(**options)

    @classmethod
    def placed_in(cls, depths: Mapping[str, int]) -> Mapping[str, int]:
        """Return how many blocks of each tower of a backbone the method can be placed in."""
        return depths

    @classmethod
    def scaled(cls, blocks: Iterable[int], tower: str, depths: Mapping[str, int]) -> list[int]:
        """Return blocks of a tower of ViT-B/16 at the same share of a backbone's depth.

        9 to 12 are 17 to 24 of 24; a run of blocks keeps one block at least.
        """
        share = cls.placed_in(depths)[tower] / VIT_B_16[tower]
        found: set[int] = set()
        for run in runs(blocks):
            last = max(1, round(run[-1] * share))
            found.update(range(min(last, 1 + round((run[0] - 1) * share)), last + 1))
        return sorted(found)

    @classmethod
    def from_choice(cls, choice: Any, **options: Any) -> Self:
        """Act at the blocks of a layer choice, in the towers that the method can be placed in.

        Args:
            choice: A `LayerChoice`, its dictionary, or the path of a `choice.json` or a run.
            **options: Other fields, such as `scale`.

        Raises:
            UserError: The method has no placement, the file cannot be read, or a tower is missing.
        """
        if isinstance(choice, (str, Path)):
            from vlmlayers.selection import LayerChoice

            choice = LayerChoice.load(choice)
        if not cls.towers:
            raise UserError(cls._no_placement())
        found = choice if isinstance(choice, Mapping) else getattr(choice, "__dict__", {})
        if not {"vision", "text"} <= set(found):
            raise UserError(
                "a layer choice needs the keys 'vision' and 'text', and a placement is text such "
                f"as '5-12'; this is {shortened(repr(choice))}"
            )
        return cls(**{tower: tuple(found[tower]) for tower in cls.towers}, **options)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild the settings from `to_dict`.

        Raises:
            UserError: A key is unknown, with the nearest one, or a value is wrong.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            check_one_of(f"{cls.name} setting", key, known)
        made = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**made)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def settings(self) -> dict[str, Any]:
        """Return the fields without the blocks: what is equal at every placement of a sweep."""
        return {k: v for k, v in self.to_dict().items() if k not in ("vision", "text")}

    @property
    def in_steps(self) -> bool:
        """Whether steps train it; what is fitted in closed form reads neither rate nor epochs."""
        return type(self) is not MethodConfig  # zero-shot CLIP, of which nothing is trained

    @property
    def validates(self) -> bool:
        """Whether it chooses values on few-shot items of the validation split."""
        return False

    @property
    def class_bound(self) -> bool:
        """Whether it learns something of each class, so that no other class can be tested."""
        return False

    @property
    def advantage(self) -> str:
        """What training sees besides the shots and names of its classes, in words; often empty."""
        return ""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that settings name, on whose content answers depend; often none."""
        return ()

    @property
    def placement(self) -> str:
        """The placement in short, such as `v5-12,t5-12`; empty for a method that has none."""
        return str(Placement(self.vision, self.text)) if self.towers else ""

    def with_placement(self, vision: Iterable[int], text: Iterable[int]) -> Self:
        """Return the same settings at other blocks."""
        return replace(self, vision=tuple(vision), text=tuple(text))

    def check_depths(self, depths: Mapping[str, int]) -> None:
        """Raise a UserError where a block lies beyond a backbone's tower."""
        Placement(self.vision, self.text).check(depths)


def placements_of(methods: Sequence[str], placements: Iterable[Any]) -> dict[str, list[Any]]:
    """Return the placements meant for each of some methods, without the names of methods.

    `maple:1-9` is meant for MaPLe. One without a name is meant for every method that none names. A
    method whose list is empty keeps its own placement.

    Args:
        methods: Names of the methods.
        placements: Placements as text, or as anything else, which names no method.

    Raises:
        UserError: A placement names another method, or no method is left for one without a name.
    """
    found: dict[str, list[Any]] = {name: [] for name in methods}
    for_all = []
    for one in placements:
        name, _, blocks = one.rpartition(":") if isinstance(one, str) else ("", "", one)
        if name:
            if name not in methods:
                raise UserError(
                    f"the placement {one!r} is for {name}, and {', '.join(methods)} is trained"
                )
            found[name].append(blocks)
        else:
            for_all.append(blocks)
    if for_all and all(found.values()):
        raise UserError(
            f"the placement {str(for_all[0])!r} is for no method, as each has one that names it; "
            "leave it out, or name its method"
        )
    return {name: named or for_all for name, named in found.items()}


# JSON has no tuples: what is written has to equal what is read back.
def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
