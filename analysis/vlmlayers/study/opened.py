"""A run folder in Python: features, scores, choice and what was trained, read when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TypeVar

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.features import LayerFeatures
from vlmlayers.features.store import FeatureStore
from vlmlayers.files import read_csv, read_json
from vlmlayers.runs import Run
from vlmlayers.selection import LayerChoice

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


class _Stored(Mapping[str, T]):
    """Parts of a run by name; each is read when asked for."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._folder = folder
        self._names = sorted(names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _ipython_key_completions_(self) -> list[str]:
        return self._names

    # Mapping would ask for the part, and what is not there is a UserError instead of a KeyError.
    def __contains__(self, name: object) -> bool:
        return name in self._names


class StoredFeatures(_Stored[LayerFeatures]):
    """The feature stores of a run by name, `dataset-split`; each is mapped when asked for."""

    def __init__(self, folder: Path) -> None:
        found = folder.iterdir() if folder.is_dir() else ()
        super().__init__(folder, (path.name for path in found if FeatureStore.exists(path)))

    def __getitem__(self, name: str) -> LayerFeatures:
        where = f"features of {self._folder.parent}"
        return FeatureStore.open(self._folder / check_one_of("dataset", name, self._names, where))

    def __repr__(self) -> str:
        return f"features of {', '.join(self._names) or 'no dataset'}"


class Told(dict[str, Any]):
    """What a file of JSON holds; shown by what it says, as the rest runs to pages."""

    def __repr__(self) -> str:
        said = str(self.get("verdict") or self.get("statement") or "")
        return fill(f"{type(self).__name__}({', '.join(self)})", 80) + f"\n{fill(said, 80)}"


class StoredTables(_Stored["pd.DataFrame"]):
    """The tables of a run but its scores, by the names of their CSV files."""

    def __init__(self, folder: Path) -> None:
        names = {path.stem for path in folder.glob("*.csv")}
        super().__init__(folder, names - {"scores"})  # these are read with their checksum

    def __getitem__(self, name: str) -> pd.DataFrame:
        if not self._names:
            raise UserError(f"{self._folder} holds no tables but its scores")
        check_one_of("table", name, self._names, f"tables of {self._folder}")
        return read_csv(self._folder / f"{name}.csv")

    def __repr__(self) -> str:
        return f"tables {', '.join(self._names) or 'none'}"


@dataclass(frozen=True)
class OpenedRun:
    """What a run folder holds.

    Attributes:
        run: The folder and the names in it.
    """

    run: Run

    @property
    def features(self) -> StoredFeatures:
        """Features by `dataset-split`; empty where none are stored."""
        return StoredFeatures(self.run.features)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The score table. Raises UserError where there is none."""
        from vlmlayers.scores import read_scores

        return read_scores(self.run.folder)

    @property
    def choice(self) -> LayerChoice:
        """The layers chosen. Raises UserError where there is no choice."""
        return LayerChoice.load(self.run.choice)

    @property
    def validation(self) -> pd.DataFrame:
        """What training reached at each placement, a row per dataset, seed and placement.

        Raises:
            UserError: Nothing was trained here.
        """
        return self._table(self.run.validation, "validate")

    @property
    def verdict(self) -> dict[str, Any]:
        """What `validation` says of the choice: verdict, regret, how far the ranking repeats.

        Raises:
            UserError: Nothing was validated here.
        """
        return self._object(self.run.verdict, "validate")

    @property
    def search(self) -> dict[str, Any]:
        """What a search picked, and why; its settings are `tables["search"]`.

        Raises:
            UserError: Nothing was searched here.
        """
        return self._object(self.run.search, "search")

    @property
    def results(self) -> pd.DataFrame:
        """What the protocols of `[[train]]` or of `train` reached, a row per accuracy.

        Raises:
            UserError: Nothing was trained here by a protocol.
        """
        return self._table(self.run.results, "train")

    @property
    def tables(self) -> StoredTables:
        """Every table of the folder but the scores, by the name of its CSV file."""
        return StoredTables(self.run.folder)

    @property
    def provenance(self) -> dict[str, Any]:
        """How the run was made: versions, hashes, seeds, options; empty where nothing is known."""
        return self.run.read_provenance()

    def __repr__(self) -> str:
        run = self.run
        parts = {
            "scores": run.scores,
            "search": run.search,
            "choice": run.choice,
            "results": run.results,
            "validation": run.validation,
        }
        here = [f"{len(self.features)} features"]
        here += [name for name, file in parts.items() if file.is_file()]
        return f"OpenedRun({run.folder}: {', '.join(here)})"

    def _table(self, path: Path, verb: str) -> pd.DataFrame:
        self._need(path, verb)
        return read_csv(path)

    def _object(self, path: Path, verb: str) -> Told:
        self._need(path, verb)
        return Told(read_json(path))

    def _need(self, path: Path, verb: str) -> None:
        if not path.is_file():
            raise UserError(
                f"{self.run.folder} holds no {path.name}; make one with `vlmlayers {verb}`"
            )


@checked
def open_run(folder: str | Path) -> OpenedRun:
    """Return what a run folder holds; each part is read when it is asked for.

    Args:
        folder: Run folder of `vlmlayers study`, `demo` or the verbs.

    Raises:
        UserError: There is no such folder, or it holds none of the parts of a run.
    """
    run = Run(Path(folder).expanduser())
    tables = (run.scores, run.scores.with_suffix(".csv"), run.results, run.validation)
    parts = (run.features, *tables, run.search, run.choice)
    if not any(part.exists() for part in parts):
        held = "holds no features, scores, choice or results"
        lost = "is no folder" if run.folder.exists() else "does not exist"
        state = held if run.folder.is_dir() else lost
        advice = run.names_inside() or "`vlmlayers study` makes one"
        raise UserError(f"{run.folder.absolute()} {state}; name a run folder: {advice}")
    return OpenedRun(run)
