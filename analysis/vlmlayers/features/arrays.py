"""Features of every position: what extraction hands to the metrics."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from vlmlayers.arguments import InOrder, Position, Takes, checked, in_order
from vlmlayers.errors import UserError, check_one_of, shortened
from vlmlayers.metrics.checks import numbers
from vlmlayers.positions import (
    ATTENTION,
    FINAL,
    PROJ,
    SPACES,
    is_block,
    relative_depth,
    sort_key,
    tower_positions,
    unextracted,
)
from vlmlayers.words import counted

if TYPE_CHECKING:
    import pandas as pd

MOST_CLASSES = 1_000_000  # labels beyond are ids of something else; a name each would fill memory
Recorded = Mapping[Position, Annotated[Any, Takes("an array", "arrays")]]
# As they come: an array of bool is a mask, which a tuple of its parts would not say.
Rows = Annotated[Any, Takes("row numbers in order, or a mask", convert=in_order)]
FLOAT32, TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False)
class TowerFeatures:
    """Activations of one tower over one set of items, pooled or by token, by space and position.

    Attributes:
        tower: `vision` or `text`.
        blocks: Number of blocks L of the tower.
        pooling: How tokens became one vector: `cls`, `eot`, `mean` or `model`.
        kind: What an item is: `images`, `prompts` (one per class) or `captions`.
        ids: (item,) relative image path, or the text itself.
        labels: (item,) index into the class names.
        arrays: space → position → (item, width), float32, memory-mapped where stored; (item, head)
            in the spaces `attention_entropy` and `attention_distance`.
        pairs: (item,) for captions, the row of the image each one describes; else None.
        joint_pooling: Pooling in `joint` space where it differs: `model` for attention pools.
        tokens: Names of the tokens (`cls`, `register 1`, `patch 2,3`, `token 4`) where pooling is
            `tokens`: arrays are (item, token, width) then, NaN behind the end of an item.
    """

    tower: str
    blocks: int
    pooling: str
    kind: str
    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    arrays: Mapping[str, Mapping[str, NDArray[np.floating]]]
    pairs: NDArray[np.int64] | None = None
    joint_pooling: str = ""
    tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.ids)
        for what, given in (("pairs", self.pairs), ("labels", self.labels)):
            if given is not None and len(given) != n:
                raise UserError(f"{self.tower} features have {n} ids but {len(given)} {what}")
        # -1 throughout stands for captioned images, which have no classes.
        if not (self.labels == -1).all():
            what = "classes counted from 0"
            _check_range(f"{self.tower} labels", self.labels, MOST_CLASSES, what)
        for space, by_position in self.arrays.items():
            by_token = (len(self.tokens),) if self.tokens and space not in ATTENTION else ()
            for position, array in by_position.items():
                if array.shape[:-1] != (n, *by_token):
                    raise UserError(
                        f"{self.tower} features at {position} ({space}) have shape {array.shape}; "
                        f"expected ({', '.join(map(str, (n, *by_token)))}, width)"
                    )

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        # Names of items and arrays would fill screens.
        spaces = "; ".join(
            f"{space}: {counted(len(self.arrays[space]), 'position')}" for space in self.spaces
        )
        items = counted(len(self), self.kind.removesuffix("s"))
        return f"TowerFeatures({self.tower}, {items}, {self.pooling}; {spaces})"

    @property
    def spaces(self) -> tuple[str, ...]:
        """Spaces that are recorded."""
        return tuple(self.arrays)

    @checked
    def positions(self, space: str = "native") -> tuple[str, ...]:
        """Return the recorded positions of a space, in order along the tower."""
        check_one_of("space", space, self.arrays, where=f"{self.tower} features")
        return tuple(sorted(self.arrays[space], key=sort_key))

    @checked
    def array(self, position: Position, space: str = "native") -> NDArray[np.floating]:
        """Return the features at one position, (item, width), or (item, token, width)."""
        check_one_of("space", space, self.arrays, where=f"{self.tower} features")
        check_one_of("position", position, self.positions(space), where=f"{self.tower} {space}")
        return self.arrays[space][position]

    def require_vectors(self) -> None:
        """Refuse features of tokens where one vector per item is needed.

        Raises:
            UserError: These are of tokens.
        """
        if self.tokens:
            raise UserError(
                f"these {self.tower} features are of tokens, and one vector per item is needed; "
                "extract with pooling='mean' (--pooling mean), or another"
            )

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.positions(self.spaces[0]))

    def __getitem__(self, where: Any) -> NDArray[np.floating]:
        """Return the features at a position, `features.vision[6]`, or in a space.

        features.vision["6"], features.vision[6], features.vision["proj", "joint"]
        """
        if isinstance(where, tuple) and len(where) != 2:
            raise UserError(
                f"{self.tower} features have a position, or position and space, and no "
                f"{shortened(repr(where))}; rows and columns are those of the array: [6][:, 0]"
            )
        # The first space recorded: `native` unless the extraction asked for others.
        position, space = where if isinstance(where, tuple) else (where, self.spaces[0])
        return self.array(position, space)

    @checked
    def to_numpy(self, space: str = "native") -> NDArray[np.floating]:
        """Return `embed` and all blocks as one array, (position, item[, token], width).

        Raises:
            UserError: The tower's blocks differ in width, or the space has none of them.
        """
        inside = [p for p in self.positions(space) if p not in (FINAL, PROJ)]
        arrays = [self.arrays[space][position] for position in inside]
        widths = sorted({array.shape[-1] for array in arrays})
        if len(widths) != 1:
            raise UserError(
                f"{self.tower} features have widths {', '.join(map(str, widths)) or 'none'} along "
                f"the blocks in {space} space; take one position: features.{self.tower}[1]"
            )
        return np.stack(arrays)

    @checked
    def to_frame(self, position: Position | None = None, space: str = "native") -> pd.DataFrame:
        """Return a row per item and position: tower, position, id, label, then the features.

        Where tokens are kept, a row per token that the item has, named in a column `token`.

        Args:
            position: The one to take; all where None.
            space: Space of the features.
        """
        import pandas as pd

        chosen = self.positions(space) if position is None else (position,)
        parts = []
        for one in chosen:
            array = np.asarray(self.array(one, space))
            each = array[:, None] if array.ndim == 2 else array  # (item, token, width)
            values = pd.DataFrame(each.reshape(-1, each.shape[2]))
            values.columns = [f"x{column}" for column in range(values.shape[1])]
            ids, labels = (np.repeat(given, each.shape[1]) for given in (self.ids, self.labels))
            head = {"tower": self.tower, "position": one, "id": ids, "label": labels}
            if array.ndim == 3:
                head["token"] = np.tile(self.tokens, len(self))
            found = pd.concat([pd.DataFrame(head), values], axis=1)
            # NaN stands for tokens behind the end of a text, which get no row.
            parts.append(found[found["x0"].notna()])
        return pd.concat(parts, ignore_index=True)

    def depth(self, position: str) -> float:
        """Return the relative depth of a position, 0 to 1."""
        return relative_depth(position, self.blocks)

    def pooling_in(self, space: str) -> str:
        """Return the pooling used in a space."""
        return self.joint_pooling or self.pooling if space == "joint" else self.pooling

    # Brackets take positions and the length is that of items: to walk it might mean either.
    __iter__ = None

    @checked
    def take(self, rows: Rows) -> TowerFeatures:
        """Return the same features for some items, in the order given.

        Args:
            rows: Rows of the items, those from the end negative; or a mask, (item,) of bool.

        Raises:
            UserError: A row is no whole number or not there, or a mask is of other length.
        """
        index = _row_numbers(rows, len(self))
        arrays = {s: {p: a[index] for p, a in by.items()} for s, by in self.arrays.items()}
        return replace(
            self,
            ids=tuple(self.ids[i] for i in index),
            labels=self.labels[index],
            arrays=arrays,
            pairs=None if self.pairs is None else self.pairs[index],
        )


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """Features of both towers at every position for one model and one split of one dataset.

    Attributes:
        model: Name of the architecture.
        weights: Tag, file name or `random`.
        dataset: Name of the manifest.
        split: `train`, `val` or `test`.
        class_names: Class names by label.
        vision: Features of the images, or None.
        text: Features of class prompts or captions, or None.
        random_weights: Whether the backbone is untrained; every output says so.
        identity: All that the values depend on (hashes, precision, template, versions).
    """

    model: str
    weights: str
    dataset: str
    split: str
    class_names: tuple[str, ...]
    vision: TowerFeatures | None = None
    text: TowerFeatures | None = None
    random_weights: bool = False
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Without names, as of captioned images, labels mean nothing.
        for tower in self.towers if self.class_names else ():
            count = len(self.class_names)
            _check_range(f"{tower.tower} labels", tower.labels, count, "the class names")
        if self.vision is not None and self.text is not None and self.text.pairs is not None:
            _check_range("pairs", self.text.pairs, len(self.vision), "the rows of the images")

    @checked
    def tower(self, name: str) -> TowerFeatures:
        """Return one tower's features.

        Raises:
            UserError: The name is unknown or the tower was not extracted.
        """
        check_one_of("tower", name, ("vision", "text"))
        found = self.vision if name == "vision" else self.text
        if found is None:
            raise UserError(f"{self.dataset}: {unextracted(name)}")
        return found

    @property
    def towers(self) -> tuple[TowerFeatures, ...]:
        """The towers that were extracted."""
        return tuple(tower for tower in (self.vision, self.text) if tower is not None)

    @classmethod
    @checked
    def from_arrays(
        cls,
        vision: Recorded | None = None,
        text: Recorded | None = None,
        *,
        labels: InOrder | None = None,
        class_names: Sequence[str] = (),
        space: str = "native",
        pairs: InOrder | None = None,
        text_labels: InOrder | None = None,
        model: str = "own features",
        weights: str = "own",
        dataset: str = "own data",
        split: str = "train",
        pooling: str = "mean",
    ) -> LayerFeatures:
        """Make features of arrays that were recorded elsewhere.

        Args:
            vision: Position (`embed`, `1`, `2`, …, `final`, `proj`) → (image, width): an array,
                a tensor or lists.
            text: The same for texts.
            labels: (image,) class of each image, a whole number from 0; all 0 where None.
            class_names: Names by label; "class 0", … where empty.
            space: Space that all arrays are in.
            pairs: (text,) row of the image that each text describes. Texts are class prompts, one
                per class, where None.
            text_labels: (text,) class of each text; by `pairs`, or counting up, where None.
            model: Name in tables.
            weights: Name of the weights in tables.
            dataset: Name of the dataset in tables.
            split: Name of the split in tables.
            pooling: Name of the pooling in tables.

        Raises:
            UserError: No arrays, unknown positions or space, gaps between blocks, no numbers, NaN
                or Inf, numbers of rows that do not agree, labels or pairs that are no rows or have
                no name, or labels and pairs of a tower that is not given.
        """
        check_one_of("space", space, SPACES)
        if not (vision or text):
            raise UserError("from_arrays needs arrays of at least one tower")
        for name, given, needed, of in (
            ("labels", labels, vision, "vision"),
            ("pairs", pairs, vision, "vision"),
            ("pairs", pairs, text, "text"),
            ("text_labels", text_labels, text, "text"),
        ):
            if given is not None and not needed:
                raise UserError(f"from_arrays: {name} needs {of} arrays, and there are none")
        images = words = None
        if vision:
            own = None if labels is None else _whole("labels", labels)
            images = _own_tower("vision", vision, own, space, pooling, "images")
        if text:
            links = None if pairs is None else _whole("pairs", pairs)
            of_texts = None if text_labels is None else _whole("text_labels", text_labels)
            if links is not None and images is not None:
                _check_range("pairs", links, len(images), "the rows of the images")
                described = images.labels[links]
                if of_texts is not None and not np.array_equal(of_texts, described):
                    raise UserError("from_arrays: text_labels differ from the labels by pairs")
                of_texts = described
            kind = "prompts" if links is None else "captions"
            words = _own_tower("text", text, of_texts, space, pooling, kind, links)
        known = [int(part.labels.max()) for part in (images, words) if part is not None]
        names = class_names or tuple(f"class {i}" for i in range(max(known) + 1))
        return cls(model, weights, dataset, split, tuple(names), images, words)

    @checked
    def take_images(self, rows: Rows) -> LayerFeatures:
        """Return the features of some images, in the order given, and of their captions alone.

        Class prompts, which belong to no image, all stay. `rows` is as of `TowerFeatures.take`.
        """
        vision, text = self.tower("vision"), self.text
        rows = _row_numbers(rows, len(vision))
        if text is not None and text.pairs is not None:
            # A caption follows its image to all new rows of it: a resample takes some images twice.
            places: dict[int, list[int]] = {}
            for place, row in enumerate((rows % len(vision)).tolist()):
                places.setdefault(row, []).append(place)
            pairs = [(i, place) for i, of in enumerate(text.pairs) for place in places.get(of, ())]
            taken, images = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
            text = replace(text.take(taken), pairs=images)
        return replace(self, vision=vision.take(rows), text=text)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the towers that were extracted."""
        return (tower.tower for tower in self.towers)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def __getitem__(self, tower: str) -> TowerFeatures:
        """Return one tower's features; see `tower`."""
        return self.tower(tower)

    def to_numpy(self, space: str = "native") -> dict[str, NDArray[np.floating]]:
        """Return tower → (position, item, width); see `TowerFeatures.to_numpy`."""
        return {tower.tower: tower.to_numpy(space) for tower in self.towers}

    def to_frame(self, position: Position | None = None, space: str = "native") -> pd.DataFrame:
        """Return a row per item and position, with the class by name.

        Where towers or positions differ in width, the narrower ones end in NaN.
        """
        import pandas as pd

        parts = [tower.to_frame(position, space) for tower in self.towers]
        found = pd.concat(parts, ignore_index=True)
        if self.class_names:
            names = [self.class_names[label] for label in found["label"]]
            found.insert(list(found).index("label") + 1, "class_name", names)
        return found

    @checked
    def save(self, path: str | Path) -> Path:
        """Write a feature store, as `extract(…, out=)` does; `LayerFeatures.load` reads it.

        A store that holds just these features already stays as it is.

        Raises:
            UserError: There is no item, or the folder holds something else or cannot be written.
        """
        writer = import_module("vlmlayers.features.writer")  # it reads back what it wrote
        writer.write_features(Path(path), self)
        return Path(path)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> LayerFeatures:
        """Return the features of a store, memory-mapped; see `FeatureStore.open` for errors."""
        return import_module("vlmlayers.features.store").open_features(path)

    def summary(self) -> pd.DataFrame:
        """Return one row per tower and space: items, positions, widths, pooling, megabytes."""
        import pandas as pd

        rows = []
        for tower in self.towers:
            for space in tower.spaces:
                arrays = [tower.arrays[space][p] for p in tower.positions(space)]
                rows.append(
                    {
                        "tower": tower.tower,
                        "space": space,
                        "kind": tower.kind,
                        "items": len(tower),
                        "blocks": tower.blocks,
                        "positions": len(arrays),
                        "widths": "/".join(map(str, dict.fromkeys(a.shape[-1] for a in arrays))),
                        "pooling": tower.pooling_in(space),
                        "megabytes": round(sum(a.nbytes for a in arrays) / 1e6, 3),
                    }
                )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        sizes = [(t, len(t.positions(t.spaces[0]))) for t in self.towers]
        parts = [
            f"{counted(len(t), t.kind.removesuffix('s'))} × {counted(positions, 'position')}"
            for t, positions in sizes
        ]
        untrained = ", RANDOM WEIGHTS" if self.random_weights else ""
        return (
            f"LayerFeatures({self.model} [{self.weights}{untrained}] on {self.dataset} "
            f"{self.split}: {'; '.join(parts)})"
        )

    def _repr_html_(self) -> str:
        note = " <b>(random weights: untrained)</b>" if self.random_weights else ""
        title = f"{self.model} [{self.weights}] on {self.dataset}, {self.split}"
        return f"<p>{escape(title)}{note}</p>{self.summary().to_html(index=False)}"


def _own_tower(
    name: str,
    arrays: Mapping[str, Any],
    labels: NDArray[np.int64] | None,
    space: str,
    pooling: str,
    kind: str,
    pairs: NDArray[np.int64] | None = None,
) -> TowerFeatures:
    """Return one tower of arrays that were recorded elsewhere, checked.

    Without labels images are of one class and prompts of one each.
    """
    given = sorted(int(p) for p in arrays if is_block(p))
    blocks = given[-1] if given else 0
    if given != list(range(1, blocks + 1)):
        raise UserError(f"{name} arrays have blocks {given}; they have to be 1 to L without gaps")
    # Where no block is named as one, "1" and so on are what is missing from the names.
    valid = tower_positions(blocks or len(arrays), "native")
    checked = {}
    for position, values in arrays.items():
        check_one_of("position", position, valid, where=f"{name} arrays")
        checked[position] = _numbers(values, f"{name} array at {position}")
    n = len(next(iter(checked.values())))
    if labels is None:
        labels = np.arange(n) if kind == "prompts" else np.zeros(n, np.int64)
    ids = tuple(f"{name} {row}" for row in range(n))
    return TowerFeatures(name, blocks, pooling, kind, ids, labels, {space: checked}, pairs)


def _numbers(values: Any, where: str) -> NDArray[np.float32]:
    """Return an array, a tensor or lists as finite float32, (item, width).

    Raises:
        UserError: It holds no numbers, has another shape, or a value that float32 cannot hold.
    """
    array = numbers(values, where)
    if array.ndim != 2 or not array.size:
        raise UserError(f"{where} has shape {array.shape}; expected (item, width)")
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise UserError(f"NaN or Inf in {where}, first at item {row}, column {column}")
    # The cast would make them Inf with no more than a warning, or all 0.
    largest = float(abs(array).max())
    if largest > FLOAT32:
        raise UserError(f"{where} has values beyond {FLOAT32:.0e}, the largest of float32")
    if 0.0 < largest < TINY:
        raise UserError(f"{where} has no value as large as {TINY:.0e}, the least of float32")
    return array.astype(np.float32)


def _whole(name: str, values: Collection[Any]) -> NDArray[np.int64]:
    """Return numbers that are whole as int64, (item,).

    Raises:
        UserError: One is not; the first is named.
    """
    if any(isinstance(value, str) for value in values):
        raise UserError(
            f"{name} are words; number them: class_names, labels = np.unique(words, "
            "return_inverse=True)"
        )
    given = numbers(values, name)
    if given.ndim != 1:
        raise UserError(f"{name} have shape {given.shape}; expected one whole number per item")
    cut = np.flatnonzero(~(given % 1 == 0))  # NaN % 1 is NaN, which is refused here as well
    if len(cut):
        raise UserError(f"{name} has {given[cut[0]]:g} at item {cut[0]}; expected whole numbers")
    return given.astype(np.int64)


def _row_numbers(rows: Any, count: int) -> NDArray[np.int64]:
    """Return rows of `count` items by number; of a mask, the rows that it marks."""
    if np.asarray(rows).dtype == bool:
        # As numbers, False and True would be the first two rows, again and again.
        if np.shape(rows) != (count,):
            raise UserError(f"a mask of shape {np.shape(rows)} is not of {counted(count, 'item')}")
        return np.flatnonzero(rows)
    index = _whole("rows", rows)
    outside = index[(index < -count) | (index >= count)]
    if len(outside):
        raise UserError(f"there is no row {outside[0]}; valid: 0 to {count - 1}")
    return index


def _check_range(name: str, values: NDArray[np.int64], below: int, what: str) -> None:
    """Refuse numbers that are not from 0 to below, and name the first."""
    outside = np.flatnonzero((values < 0) | (values >= below))
    if len(outside):
        first = outside[0]
        raise UserError(
            f"{name} has {values[first]} at item {first}; valid: 0 to {below - 1}, {what}; leave "
            "out items that have none"
        )
