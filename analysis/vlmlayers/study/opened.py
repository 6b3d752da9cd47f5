"""A run folder in Python: its features, scores, choice and validation, read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.features import LayerFeatures
from vlmlayers.features.store import FeatureStore
from vlmlayers.files import read_csv
from vlmlayers.runs import Run
from vlmlayers.selection import LayerChoice

if TYPE_CHECKING:
    import pandas as pd


class StoredFeatures(Mapping[str, LayerFeatures]):
    """The feature stores of a run by name, `dataset-split`; each is mapped when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = folder.iterdir() if folder.is_dir() else ()
        self._names = sorted(path.name for path in found if FeatureStore.exists(path))

    def __getitem__(self, name: str) -> LayerFeatures:
        where = f"features of {self._folder.parent}"
        return FeatureStore.open(self._folder / check_one_of("dataset", name, self._names, where))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"features of {', '.join(self._names) or 'no dataset'}"


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
        if not self.run.validation.is_file():
            raise UserError(
                f"{self.run.folder} holds no validation.csv; make one with `vlmlayers validate`"
            )
        return read_csv(self.run.validation)

    @property
    def provenance(self) -> dict[str, Any]:
        """How the run was made: versions, hashes, seeds, options; empty where nothing is known."""
        return self.run.read_provenance()

    def __repr__(self) -> str:
        run = self.run
        parts = {"scores": run.scores, "choice": run.choice, "validation": run.validation}
        here = [f"{len(self.features)} features"]
        here += [name for name, file in parts.items() if file.is_file()]
        return f"OpenedRun({run.folder}: {', '.join(here)})"


@checked
def open_run(folder: str | Path) -> OpenedRun:
    """Return what a run folder holds; each part is read when it is asked for.

    Args:
        folder: Run folder of `vlmlayers study`, `demo` or the verbs.

    Raises:
        UserError: There is no such folder, or it holds none of the parts of a run.
    """
    run = Run(Path(folder).expanduser())
    parts = (run.features, run.scores, run.scores.with_suffix(".csv"), run.choice, run.validation)
    if not any(part.exists() for part in parts):
        state = "holds no features, scores or choice" if run.folder.is_dir() else "does not exist"
        advice = run.names_inside() or "`vlmlayers study` makes one"
        raise UserError(f"{run.folder.absolute()} {state}; name a run folder: {advice}")
    return OpenedRun(run)
