"""What training found, as the stage `validate` wrote it into a run folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from vlmlayers.errors import UserError
from vlmlayers.files import read_csv
from vlmlayers.placement import ZERO_SHOT, complete_cells, of_kind, sweep_first
from vlmlayers.runs import Run

TIE = 1e-9  # means of the same cells differ by rounding where they are equal


@dataclass(frozen=True, eq=False)
class RecordedValidation:
    """What training found, as the stage `validate` wrote it.

    Attributes:
        cells: One row per dataset, seed and placement.
        placements: One row per placement: means and intervals of base, novel, hm.
        zero_shot: The same of CLIP without an adapter, one row; empty where it was not compared.
        correlations: Kendall's τ of each placement score with trained HM.
        predicted: Predicted and trained value of each placement and score.
        verdict: The one sentence, or empty.
        chosen: Label of the chosen placement.
        reference: Label of the placement it is compared with.
        best: Label of the placement with the highest harmonic mean.
        predictors: In words, which placement scores predicted the outcome; or empty.
        judged: Scores and free baselines as predictors in single cells, beside the ceiling.
        repeatability: How far the ranking repeats, as `validation.json` says; or empty.
        warning: What is wrong with the comparison, or empty.
        untuned: Placements compared at the recipe's amount, beside the tuned comparison, or empty.
        untuned_words: What that comparison says, with its warning.
        amounts: Held-out accuracy of each placement over amount; or empty.
    """

    cells: pd.DataFrame
    placements: pd.DataFrame
    zero_shot: pd.DataFrame
    correlations: pd.DataFrame
    predicted: pd.DataFrame
    verdict: str = ""
    chosen: str = ""
    reference: str = ""
    best: str = ""
    predictors: str = ""
    judged: pd.DataFrame = field(default_factory=pd.DataFrame)
    repeatability: dict[str, Any] = field(default_factory=dict)
    warning: str = ""
    untuned: pd.DataFrame = field(default_factory=pd.DataFrame)
    untuned_words: str = ""
    amounts: pd.DataFrame = field(default_factory=pd.DataFrame)

    @classmethod
    def read(cls, run: Run) -> RecordedValidation | None:
        """Read the validation of a run; None where there is none, or it shows nothing."""
        if not run.validation.exists() or void_verdict(run):
            return None
        cells = _table(run.validation)
        needed = {"placement", "dataset", "seed", "base", "novel", "hm"}
        if not needed <= set(cells.columns) or cells.empty:
            raise UserError(
                f"{run.validation} lacks rows or the columns "
                f"{', '.join(sorted(needed - set(cells.columns))) or '–'}; "
                "run `vlmlayers validate` again"
            )
        if "comparison" in cells:  # the tuned comparison is what is shown, the other stands beside
            first = "tuned" if (cells["comparison"] == "tuned").any() else "given"
            cells = cells[cells["comparison"] == first].reset_index(drop=True)
        notes = run.read(run.verdict.name)
        beside = notes.get("untuned", {})
        warned = beside.get("warning")
        chosen = str(notes.get("chosen") or _kind(cells, "chosen"))
        reference = str(notes.get("reference") or _kind(cells, "paper"))
        placements = _table(run.folder / "validation_placements.csv")
        # A run of an earlier version, or one that was stopped, has its cells alone.
        placements = placements if len(placements) else _means(_compared(cells))
        trained = placements["placement"] != ZERO_SHOT
        means = placements[trained].set_index("placement")["hm"]
        return cls(
            cells,
            placements[trained].reset_index(drop=True),
            placements[~trained].reset_index(drop=True),
            _table(run.folder / "validation_correlations.csv"),
            _table(run.folder / "validation_predicted.csv"),
            str(notes.get("verdict", "")),
            chosen,
            reference,
            str(means.idxmax()) if means.notna().any() else "",
            str(notes.get("predictors", "")),
            _table(run.folder / "validation_predictors.csv"),
            dict(notes.get("repeatability", {})),
            str(notes.get("warning", "")),
            _table(run.folder / "validation_untuned.csv"),
            " ".join(filter(None, [beside.get("verdict"), warned and f"Warning: {warned}."])),
            _table(run.folder / "validation_amounts.csv"),
        )

    @property
    def compared(self) -> pd.DataFrame:
        """The cells that the means are of: of the datasets and seeds that hold every placement."""
        return _compared(self.cells)

    @property
    def best_words(self) -> str:
        """What the placement with the highest mean is called; a tie is called one."""
        means = self.placements["hm"]
        tied = int((means > means.max() - TIE).sum())
        # Where amounts were tuned, a placement beside the table may be higher at the recipe's.
        tuned = "comparison" in self.cells and (self.cells["comparison"] == "tuned").any()
        words = "best of all at tuned amounts" if tuned else "best of all trained"
        return f"{words}, with {tied - 1} equal" if tied > 1 else words

    @property
    def published(self) -> bool:
        """Whether the reference is the published placement, as it is where nobody asks for one."""
        kinds = self.kind(self.reference)
        return not kinds or "paper" in kinds.split("+")

    @property
    def reference_words(self) -> str:
        """What the reference is called in tables and sentences."""
        return "the paper's" if self.published else "the reference"

    def kind(self, placement: str) -> str:
        """Return why a placement was trained, such as `start+paper`; empty where unknown."""
        rows = self.cells[self.cells["placement"] == placement]
        return str(rows["kind"].iloc[0]) if len(rows) and "kind" in rows.columns else ""

    def outcomes(self) -> pd.DataFrame:
        """Return one row per placement: the sweep of the start block, then the others by start.

        Added columns: chosen, published, and sweep, whether the placement belongs to that sweep.
        """
        names = list(dict.fromkeys(self.cells["placement"]))
        frame = self.placements.set_index("placement").reindex(names).reset_index()
        kinds = [self.kind(name).split("+") for name in names]
        chosen, sweep = frame["placement"] == self.chosen, ["start" in kind for kind in kinds]
        return sweep_first(
            frame.assign(chosen=chosen, published=["paper" in kind for kind in kinds], sweep=sweep)
        )


def void_verdict(run: Run) -> str:
    """Return the verdict of a validation in which training changed nothing, else nothing."""
    notes = run.read(run.verdict.name)
    return str(notes.get("verdict", "")) if notes.get("void") else ""


def validated(run: Run) -> dict[str, str]:
    """Return of which model and weights a validation is, as far as it says; empty without one."""
    cells, notes = _table(run.validation), run.read(run.verdict.name)
    found = {key: cells[key].iloc[0] for key in ("model", "weights") if key in cells and len(cells)}
    return {**found, "weights_hash": notes.get("weights_hash", "")} if len(cells) else {}


def _table(path: Path) -> pd.DataFrame:
    try:
        return read_csv(path) if path.exists() else pd.DataFrame()
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as a table ({type(error).__name__}); "
            "run `vlmlayers validate` again"
        ) from None


def _kind(cells: pd.DataFrame, kind: str) -> str:
    if "kind" not in cells.columns:
        return ""
    rows = cells[of_kind(cells, kind)]
    return str(rows["placement"].iloc[0]) if len(rows) else ""


def _compared(cells: pd.DataFrame) -> pd.DataFrame:
    kept: pd.DataFrame = complete_cells(cells)
    return kept if len(kept) else cells  # of a run that was stopped before any was complete


def _means(cells: pd.DataFrame) -> pd.DataFrame:
    values = [name for name in ("base", "novel", "hm", "parameters") if name in cells.columns]
    # By dataset first, so that one with more seeds does not weigh more.
    per_dataset = cells.groupby(["placement", "dataset"], sort=False)[values].mean()
    return per_dataset.groupby("placement", sort=False).mean().reset_index()
