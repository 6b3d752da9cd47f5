"""`Placement`: the blocks of both towers where a method acts, as a value and as text.

The grammar, for command lines, study files, tables and figures alike:

    5-12            blocks 5 to 12 of both towers
    v5-12,t7-12     blocks of the vision and of the text tower
    v1,3,5-7        a tower's blocks follow its letter; commas and plus signs mean the same
    t5-12           no vision block, which is written `v-,t5-12`
    zero-shot       no block at all
    5-12@scale=0.3,epochs=15    the same blocks, and how much is trained there
    @lr=0.01        an amount alone, for a method that has no placement
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from operator import index
from sys import float_info
from typing import Any

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of, shortened
from vlmlayers.positions import TOWERS
from vlmlayers.words import counted

ZERO_SHOT = "zero-shot"
CHOICE = "choice"  # stands for the choice of a study, or of --choice, among placements
SAMPLE = 3  # as many datasets are a sample of datasets; fewer stand for themselves
LARGEST = float_info.max  # a longer whole number is no float
DEEPEST = 9999  # no tower is that deep, and a longer range would fill memory
_TOKEN = re.compile(r"([vt]?)(?:(\d+)(?:-(\d+))?|-|none)")


@dataclass(frozen=True)
class Amount:
    """How much a training adapts, as opposed to where; what is None is as in the recipe.

    Attributes:
        scale: How strongly the method acts, for methods that have such a setting.
        lr: Learning rate.
        epochs: Passes over the training items.
        steps_per_shot: Steps per shot, for recipes that count these instead of epochs.

    Raises:
        UserError: A value is not a number above 0, or not a whole one where steps are counted.
    """

    scale: float | None = None
    lr: float | None = None
    epochs: int | None = None
    steps_per_shot: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            whole = name in ("epochs", "steps_per_shot")
            kinds = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= LARGEST:
                kind = "whole number from 1" if whole else "number above 0"
                raise UserError(
                    f"the amount's {name} is {shortened(repr(value))}; it must be a {kind}"
                )
            if not whole:
                object.__setattr__(self, name, float(value))

    @classmethod
    def parse(cls, text: str) -> Amount:
        """Read an amount such as `scale=0.3,epochs=15`, as `str` writes it.

        Raises:
            UserError: A key is unknown or named twice, or a value is not a number.
        """
        found: dict[str, Any] = {}
        for part in "".join(text.split()).split(","):
            key, equals, value = part.partition("=")
            if not equals or key in found:
                raise UserError(f"cannot read the amount {text[:80]!r}; write scale=0.3,epochs=15")
            check_one_of("key", key, [f.name for f in fields(cls)], where=f"amount {text[:80]!r}")
            found[key] = _number(value)
        return cls(**found)

    def given(self) -> dict[str, Any]:
        """Return the values that differ from the recipe's, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __bool__(self) -> bool:
        return bool(self.given())

    def __str__(self) -> str:
        return ",".join(
            f"{name}={str(value).removesuffix('.0')}" for name, value in self.given().items()
        )


@dataclass(frozen=True)
class Placement:
    """Blocks of both towers where a method acts. Iterating gives vision, then text.

    Attributes:
        vision: Blocks of the vision tower, from 1, rising.
        text: Blocks of the text tower, from 1, rising.
        amount: How much is trained there, where that is not as in the recipe.

    Raises:
        UserError: A block is not a whole number from 1, or stands twice.
    """

    vision: tuple[int, ...] = ()
    text: tuple[int, ...] = ()
    amount: Amount = Amount()

    def __post_init__(self) -> None:
        for tower in TOWERS:
            object.__setattr__(self, tower, _checked(getattr(self, tower), f"{tower} "))

    @classmethod
    def parse(cls, text: str) -> Placement:
        """Read a placement written in the grammar above, as `str` writes it.

        Raises:
            UserError: The text is not a placement, or a range runs backwards.
        """
        blocks_of, at, amount = text.partition("@") if isinstance(text, str) else (text, "", "")
        if at:
            placed = cls.parse(blocks_of) if blocks_of.strip() else cls()
            return replace(placed, amount=Amount.parse(amount))
        found: dict[str, list[int]] = {}
        letter = ""
        for token in _cleaned(text).split(","):
            named, blocks = _token(token, text, "the placement", "5-12, v5-12,t7-12 or v1,3,5-7")
            if named and "" in found:
                raise UserError(f"the placement {text[:80]!r} names both towers, then one of them")
            letter = named or letter
            found.setdefault(letter, []).extend(blocks)
        # A tower that is not named has no block: `t5-12` is text alone.
        both = found.get("", ())
        return cls(tuple(found.get("v", both)), tuple(found.get("t", both)))

    @classmethod
    @checked
    def span(cls, first: int, last: int) -> Placement:
        """Return blocks `first` to `last` of both towers; (5, 12) is MMA's published placement."""
        blocks = _span(first, last)
        return cls(blocks, blocks)

    def __str__(self) -> str:
        amount = f"@{self.amount}" if self.amount else ""
        if not self:
            return amount or ZERO_SHOT
        named = (
            letter + ("+".join("-".join(map(str, run)) for run in runs(blocks)) or "-")
            for letter, blocks in zip("vt", self)
        )
        return ",".join(named) + amount

    def __repr__(self) -> str:
        amount = f", amount={self.amount!r}" if self.amount else ""
        return f"Placement(vision={self.vision}, text={self.text}{amount})"

    def __bool__(self) -> bool:
        return bool(self.vision or self.text)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter((self.vision, self.text))

    def blocks(self, tower: str) -> tuple[int, ...]:
        """Return the blocks of one tower."""
        check_one_of("tower", tower, TOWERS)
        return self.vision if tower == "vision" else self.text

    @property
    def label(self) -> str:
        """The placement for an axis: `5–12` where both towers have the same blocks."""
        amount = f"@{self.amount}" if self.amount else ""
        if not self:
            return amount or ZERO_SHOT
        words = [describe_blocks(blocks).replace(", ", "+") for blocks in self]
        if self.vision == self.text:
            return words[0] + amount
        named = [letter + word for letter, word in zip("vt", words) if word != "none"]
        return ",".join(named) + amount

    @property
    def size(self) -> int:
        """Number of blocks, of both towers together."""
        return len(self.vision) + len(self.text)

    def check(self, depths: Mapping[str, int], what: str = "") -> Placement:
        """Return the placement if every block exists.

        Args:
            depths: Number of blocks of each tower; a tower that is not named has none.
            what: What holds the placement, for the message.

        Raises:
            UserError: Names the first block beyond its tower.
        """
        for tower in TOWERS:
            depth = depths.get(tower, 0)
            for block in self.blocks(tower):
                if block > depth:
                    has = f"the {tower} tower has {counted(depth, 'block')}"
                    raise UserError(
                        f"{what or f'the placement {self}'} names {tower} block {block}, but "
                        f"{has if depth else f'there is no {tower} tower'}"
                    )
        return self


def parse_blocks(blocks: str | int | Iterable[int]) -> tuple[int, ...]:
    """Return the blocks of one tower from `5-12`, `3,5-7`, `none`, a number or numbers.

    Raises:
        UserError: They are none of these.
    """
    if not isinstance(blocks, str):
        return _checked([blocks] if isinstance(blocks, int) else blocks)
    found: list[int] = []
    for token in _cleaned(blocks).split(",") if blocks.strip() else ():
        letter, some = _token(token, blocks, "the blocks", "5-12 or 3,5-7")
        if letter:
            raise UserError(
                f"the blocks {blocks[:80]!r} are those of one tower; leave {letter} out"
            )
        found.extend(some)
    return _checked(found)


def describe_blocks(blocks: Iterable[int]) -> str:
    """Return blocks in words, for prose: `5–12`, `3, 5–7`, or `none`."""
    return ", ".join("–".join(map(str, run)) for run in runs(blocks)) or "none"


def module_pattern(blocks: Iterable[str], layers: Iterable[str]) -> str:
    r"""Return the regular expression of all layers in some blocks, as peft's `target_modules`.

    Args:
        blocks: Names of the blocks in a model, such as `visual.transformer.resblocks.4`.
        layers: Names of the layers inside a block, such as `mlp.c_fc`.

    Returns:
        str: One such as `visual\.transformer\.resblocks\.(?:4|5)\.(?:attn|mlp\.c_fc)`.
    """
    # Per parent: block 4 of one tower must not match block 4 of the other.
    by_parent: dict[str, list[str]] = {}
    for name in blocks:
        parent, _, last = name.rpartition(".")
        by_parent.setdefault(parent, []).append(last)
    inside = "|".join(map(re.escape, layers))
    return "|".join(
        re.escape(f"{parent}." if parent else "") + f"(?:{'|'.join(map(re.escape, own))})"
        rf"\.(?:{inside})"
        for parent, own in by_parent.items()
    )


def is_choice(placement: str) -> bool:
    """Return whether a placement is `choice`, or that for one method as in `maple:choice`."""
    return placement.rpartition(":")[2] == CHOICE


def _cleaned(text: str) -> str:
    if not isinstance(text, str):
        raise UserError(
            f"a placement is text such as 5-12 or v5-12,t7-12, not {shortened(repr(text))}"
        )
    cleaned = "".join(text.split()).casefold().replace("–", "-").replace("+", ",")
    return "none" if cleaned == ZERO_SHOT else cleaned


def _token(token: str, text: str, what: str, examples: str) -> tuple[str, tuple[int, ...]]:
    """Return the letter of a tower, or none, and the blocks of one part of a placement."""
    found = _TOKEN.fullmatch(token)
    # \d also matches the digits of other scripts, and int() would read them.
    if found is None or not token.isascii():
        raise UserError(f"cannot read {what} {text[:80]!r}; write {examples}")
    letter, first, last = found.groups()
    if max(len(first or ""), len(last or "")) > len(str(DEEPEST)):
        raise UserError(f"{what} {text[:80]!r}: no tower has a block beyond {DEEPEST}")
    return letter, _span(int(first), int(last or first)) if first else ()


def _span(first: int, last: int) -> tuple[int, ...]:
    if first > last:
        raise UserError(f"the block range {first}-{last} is reversed; write {last}-{first}")
    return tuple(range(first, last + 1))


def runs(blocks: Iterable[int]) -> list[tuple[int, ...]]:
    """Return runs of neighbouring blocks: (first, last), or (block,) where it stands alone."""
    runs: list[tuple[int, ...]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][-1] + 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block,))
    return runs


def sweep_first(table: Any) -> Any:
    """Return rows of a table of placements by first block, those of the column `sweep` first."""
    names = sorted(range(len(table)), key=lambda row: _first(str(table["placement"].iloc[row])))
    # Stable, so that the order by first block is kept within both parts.
    return table.iloc[names].sort_values("sweep", ascending=False, kind="stable", ignore_index=True)


def _first(placement: str) -> tuple[float, float]:
    """Return first block and number of blocks; what names no block stands last."""
    vision, text = Placement.parse(placement)
    blocks = [*vision, *text]
    return (min(blocks), -len(blocks)) if blocks else (float("inf"), 0.0)


def of_kind(table: Any, kind: str) -> Any:
    """Return which rows of a validation table are placements of a kind, as one of `start+paper`."""
    return table["kind"].astype(str).str.split("+").map(lambda kinds: kind in kinds).astype(bool)


def complete_cells(table: Any) -> Any:
    """Return the rows of a validation table whose dataset and seed hold every placement.

    They are compared in pairs; a training without an outcome is none.
    """
    known = table.dropna(subset=["base", "novel", "hm"])
    held = known.groupby(["dataset", "seed"])["placement"].transform("nunique")
    return known[held == table["placement"].nunique()]


def how_trained(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what accuracies depend on besides model, placement and data: recipe and settings.

    Args:
        record: What `validation.json` holds.
    """
    own = {key: record[key] for key in ("method", "items") if key in record}
    recipe = {k: v for k, v in record.get("recipe", {}).items() if k not in ("name", "precision")}
    return {**own, **recipe, **record.get("settings", {})}


def untrained(choice: Placement, then: str, tried: Iterable[str]) -> str:
    """Say that another placement was trained as the choice than is chosen now; empty if not.

    Args:
        choice: What is chosen now; what lies in the towers that the method acts in counts.
        then: What was trained as the choice.
        tried: All that was trained, which tells these towers.
    """
    placed, others = Placement.parse(then), [Placement.parse(one) for one in tried]
    acting = [tower for tower in TOWERS if any(one.blocks(tower) for one in others)]
    if all(choice.blocks(tower) == placed.blocks(tower) for tower in acting):
        return ""
    now = replace(choice, amount=Amount())
    return f"the choice was not trained: {then} stood for it in the validation, and it is {now}"


def _checked(blocks: Any, tower: str = "") -> tuple[int, ...]:
    """Return blocks in rising order, each a whole number from 1 and there once."""
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise UserError(
            f"{tower}blocks must be a list of whole numbers from 1, not {shortened(repr(blocks))}"
        )
    found: dict[int, None] = {}
    for block in blocks:
        # By `__index__`, which arrays' whole numbers have too; so has True, never meant as block 1.
        if isinstance(block, bool) or not hasattr(block, "__index__") or index(block) < 1:
            raise UserError(f"{tower}block {shortened(repr(block))} is not a whole number from 1")
        if index(block) in found:
            raise UserError(f"{tower}block {block} is named twice")
        found[index(block)] = None
    return tuple(sorted(found))


def _number(text: str) -> Any:
    """Return the number that a text writes, whole where it can be; else the text as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
