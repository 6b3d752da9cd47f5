"""The answer of a run and the sentences of its report, all computed from its tables."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlmlayers.errors import UserError
from vlmlayers.placement import describe_blocks, untrained
from vlmlayers.plots.style import axis_label
from vlmlayers.positions import TOWERS
from vlmlayers.report.validation import TIE, RecordedValidation, validated, void_verdict
from vlmlayers.runs import Run
from vlmlayers.scores import read_scores
from vlmlayers.scores.reading import (
    POOLED,
    as_read,
    bare,
    check_scores,
    depths,
    is_random,
    values_mark,
)
from vlmlayers.scores.sources import other_features
from vlmlayers.scores.summaries import curves, over_datasets
from vlmlayers.selection import (
    RULES,
    LayerChoice,
    make_rule,
    paper_blocks,
)
from vlmlayers.selection.choice import OFTEN, not_of
from vlmlayers.selection.curves import BlockTable
from vlmlayers.words import inside, percent

# What `extract` records of itself in `provenance.json`.
EXTRACTED = ("model", "datasets", "extract", "given", "left_out", "seed")
FARTHEST = 4  # datasets whose zero-shot margin the answer lists
FIRM = f"in at least {percent(OFTEN)} of the resamples"


@dataclass(frozen=True, eq=False)
class Answer:
    """A run as its report sees it.

    Attributes:
        run: The run folder.
        scores: Its score table.
        choice: Its choice.
        provenance: How it was made.
        validation: What training found, or None.
        attributes: Attributes of the score table: cost, refusals, protocol.
        foreign_validation: Of which model training was, where not of the scores'; else empty.
        foreign_extraction: The same of the last extraction, whose provenance is then left out.
    """

    run: Run
    scores: pd.DataFrame
    choice: LayerChoice
    provenance: dict[str, Any] = field(default_factory=dict)
    validation: RecordedValidation | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    foreign_validation: str = ""
    foreign_extraction: str = ""

    @cached_property
    def depths(self) -> dict[str, int]:
        """Blocks of each tower."""
        return depths(self.scores)

    def curves(self, metric: str) -> pd.DataFrame:
        """Return a metric along both towers, as `curves` does; made once for all that show it."""
        if metric not in self._curves:
            self._curves[metric] = curves(self.scores, metric)
        return self._curves[metric]

    @cached_property
    def _curves(self) -> dict[str, pd.DataFrame]:
        return {}

    @property
    def chosen_by(self) -> tuple[str, ...]:
        """The metrics that the choice was made by; none of a rule of the user's own or a search."""
        if self.choice.rule not in RULES:
            return ()
        try:
            rule = make_rule(self.choice.rule, self.choice.evidence.get("options", {}))
            return tuple(rule.reads(self.depths))
        except UserError:  # options of another version: the answer says so where it compares values
            return ()

    @property
    def model(self) -> str:
        """Architecture."""
        return str(self.scores["model"].iloc[0])

    @property
    def weights(self) -> str:
        """Tag, file name or `random`."""
        return str(self.scores["weights"].iloc[0])

    @property
    def random_weights(self) -> bool:
        """Whether the backbone is untrained."""
        recorded = self.provenance.get("model", {}).get("random_weights", False)
        return bool(recorded or is_random(self.scores))

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """What each stage was given, as recorded; of the choice, what it says of itself.

        The verb `select` may have made it anew since.
        """
        recorded = {name: self.provenance.get(name) for name in ("extract", "score")}
        found = {name: one for name, one in recorded.items() if isinstance(one, dict)}
        evidence = self.choice.evidence
        if "options" in evidence:
            drawn = evidence.get("resamples", {}).get("n", 0)
            found["select"] = {
                "rule": self.choice.rule, "resamples": drawn, "options": evidence["options"]
            }  # fmt: skip
        return found

    @property
    def paper(self) -> LayerChoice:
        """The paper's placement at this depth."""
        known = self.provenance.get("model", {}).get("towers", {})
        depth = {tower: one["blocks"] for tower, one in known.items() if one.get("blocks")}
        depth |= {tower: one["depth"] for tower, one in self._towers.items() if "depth" in one}
        vision, text = (paper_blocks((depth | self.depths).get(tower, 0)) for tower in TOWERS)
        return LayerChoice(vision, text, "paper")

    @cached_property
    def search(self) -> dict[str, Any]:
        """What a search on training shots of this model found; empty without one."""
        return {} if self.foreign_search else self.run.read(self.run.search.name)

    @property
    def foreign_search(self) -> str:
        """Of which other model or weights the run's `search.json` is; empty where of none."""
        found, ours = self.run.read(self.run.search.name), (self.model, self.weights)
        theirs = (found.get("model", self.model), found.get("weights", self.weights))
        if theirs != ours:
            return "{} ({})".format(*theirs)
        return self.run.other_weights(found)

    @property
    def headline(self) -> str:
        """The answer in one or two sentences."""
        return "".join(words for words, _ in self.headline_parts)

    @property
    def headline_parts(self) -> list[tuple[str, bool]]:
        """The answer in pieces: words, and whether the data make them firm.

        A tower of which no block is firm keeps the default, the paper's placement at its depth. A
        choice by search is the search's answer.
        """
        if "search" in self.choice.evidence:
            return self._searched(self.choice.evidence["search"])
        adapt: list[tuple[str, bool]] = []
        default: dict[str, str] = {}
        for tower in [*self.depths, *self.unscored]:
            fixed = tower not in self.depths or "fixed" in self.standing(tower)
            if not fixed and not self.choice.firm(tower):
                if self._resampled(tower) or self.choice.open(tower):
                    default[tower] = _blocks(self.paper.blocks(tower))
                continue
            blocks = self.choice.blocks(tower) if fixed else self.choice.firm(tower)
            adapt.append((" and " if adapt else "Adapt ", False))
            adapt.append((f"{_blocks(blocks)} of the {tower} tower", not fixed))
            if not fixed and (others := self.choice.open(tower)):
                adapt.append((f" ({_blocks(others)} open)", False))
        if adapt:
            adapt.append((".", False))
        if default:
            adapt.append((self._undecided(default, bool(adapt)), False))
        return adapt or [("No block is chosen.", False)]

    def _searched(self, found: Mapping[str, Any]) -> list[tuple[str, bool]]:
        placed = self.choice.placement
        if not placed:
            return [
                ("Do not adapt", True),
                (": zero-shot CLIP does better on held-out shots.", False),
            ]
        towers = join(f"{_blocks(placed.blocks(t))} of the {t} tower" for t in TOWERS
                      if placed.blocks(t))  # fmt: skip
        setting = towers + (f" by {placed.amount}" if placed.amount else "")
        if not found["decided"]:
            return [(f"The data do not decide: the default stands, {setting}.", False)]
        # Which placement is the better one may be told where whether training pays is not.
        return [("Adapt ", False), (setting, self.choice.decided), (".", False)]

    def _undecided(self, default: dict[str, str], follows: bool) -> str:
        """Return that the data do not decide for some towers, and which default stands in each."""
        towers = f"the {join(default)} tower{'s' * (len(default) > 1)}"
        kept = join(dict.fromkeys(default.values()))
        if follows:
            return f" For {towers} the data do not decide: the default stands, {kept}."
        return f"The data do not decide: the default stands, {kept} of {towers}."

    @property
    def _towers(self) -> Mapping[str, Mapping[str, Any]]:
        towers: Mapping[str, Mapping[str, Any]] = self.choice.evidence.get("towers", {})
        return towers

    @property
    def unscored(self) -> list[str]:
        """Towers in which blocks are chosen and of which the scores say nothing."""
        return [t for t in TOWERS if t not in self.depths and self.choice.blocks(t)]

    def _resampled(self, tower: str) -> bool:
        return "frequency" in self._towers.get(tower, {})

    def standing(self, tower: str) -> tuple[str, ...]:
        """Return how each block of a tower stands: `firm`, `open`, `frozen` or `fixed`."""
        return self.choice.standing(tower, self.depths[tower])

    @property
    def doubts(self) -> list[str]:
        """Why the data do not decide, one reason each; empty where they do."""
        found = [str(one) for one in self.choice.evidence.get("doubts", ())]
        return [
            *filter(None, [self.stale, self.unproved]),
            *found,
            *filter(None, [self.void]),
        ]

    @property
    def void(self) -> str:
        """The verdict of a training of this model that changed nothing; else empty."""
        return "" if self.foreign_validation else void_verdict(self.run)

    @cached_property
    def stale(self) -> str:
        """What is older than what it was made from, and how to make it again; empty if nothing."""
        folder = str(self.run.folder)
        if of := other_features(self.run, self.attributes):
            return (
                f"the scores were not made from the features of {of} that are here; run "
                f"{shlex.join(['vlmlayers', 'score', folder])} again"
            )
        again = f"run {shlex.join(['vlmlayers', 'select', folder, *self._chosen_as()])} again"
        weights_hash = str(self.attributes.get("weights_hash", ""))
        searched = self.choice.evidence.get("search")
        why = _not_of(self.choice, self.scores, weights_hash)
        if not why and not searched and (lost := self.unscored):
            why = f"they hold nothing of the {join(lost)} tower"
        if why:
            return f"the choice was made from other scores than these ({why}); {again}"
        if searched and self.search.get("statement", now := searched["statement"]) != now:
            return f"the choice is of an earlier search than that in search.json; {again}"
        return ""

    def _chosen_as(self) -> list[str]:
        """Return rule and options of the choice as the command line takes them."""
        rule, options = self.choice.rule, self.choice.evidence.get("options", {})
        if rule not in RULES:
            return []
        usual = asdict(make_rule(rule, {})) | {"file": options.get("file")}  # the run's own search
        given = [f"{key}={one}" for key, one in options.items() if one != usual.get(key)]
        return ["--rule", rule, *(word for one in given for word in ("--set", one))]

    @cached_property
    def unproved(self) -> str:
        """That another placement was trained than is chosen now; empty if it was this one.

        Of the choice counts what lies in the towers that the trained method acts in.
        """
        if self.validation is None or not self.validation.chosen:
            return ""
        tried = self.validation.placements["placement"].astype(str)
        why = untrained(self.choice.placement, self.validation.chosen, tried)
        again = f"run vlmlayers validate again with --choice {shlex.quote(str(self.run.folder))}"
        return f"{why}; {again}" if why else ""

    @property
    def lead(self) -> str:
        """The statement up to its doubts, for where these follow as a list."""
        doubts, statement = self.choice.evidence.get("doubts", ()), self.choice.statement
        tail = f" {'; '.join(map(str, doubts))}."
        if not doubts or not statement.endswith(tail):
            return statement
        # Not the headline's words again, which stand right above.
        if any(self.choice.firm(tower) for tower in self.depths):
            return "What the data leave open:"
        return "Why the data do not decide:"

    @property
    def parameters(self) -> int | None:
        """Parameters that were trained at the chosen placement; None where nothing was trained."""
        if self.validation is None or "parameters" not in self.validation.placements.columns:
            return None
        if self.unproved:
            return None
        placed = self.validation.placements.set_index("placement")["parameters"]
        return int(placed[self.validation.chosen]) if self.validation.chosen in placed else None

    def facts(self) -> list[tuple[str, str]]:
        """Return what stands beside the answer: label and text."""
        found = [("Rule", self._rule()), *self._starts()]
        found += self._searching()
        if towers := [tower for tower in self.depths if self._resampled(tower)]:
            # Pooled scores are of all datasets at once, of which none can be left out.
            apart = any(self._towers[tower].get("without") for tower in towers)
            how = FIRM + " and of the choices without one dataset" * apart
            firm = f"{self._blocks_of(towers, 'firm')} ({how}; none of a tower in doubt)"
            found.append(("Firm blocks", firm))
            if any(self.choice.open(tower) for tower in towers):
                found.append(("Open blocks", self._blocks_of(towers, "open")))
        if behind := self._behind():
            found.append(("Behind the curves", behind))
        if (count := self.parameters) is not None:
            found.append(("Trained parameters", f"{count:,} at the chosen placement"))
        same = (self.choice.vision, self.choice.text) == (self.paper.vision, self.paper.text)
        scaled = (
            f"vision {describe_blocks(self.paper.vision)}, text {describe_blocks(self.paper.text)}"
        )
        found.append(
            (
                "The paper's placement",
                "the same: " + scaled if same else f"{scaled} (5–12 of 12, scaled to this depth)",
            )
        )
        if margins := self._margins():
            found.append(("Zero-shot margin", margins))
        found.append(("Tested by training", self._proof()))
        return found

    def _margins(self) -> str:
        """Return how far the datasets are from the pretraining, the farthest first, if scored."""
        rows = as_read(self.scores, "zero_shot_margin").sort_values("value")
        listed = [
            # `z`, here and below, shows −0.000 as 0.000.
            f"{row['dataset']} {row['value']:z.3f} [{row['low']:z.3f}, {row['high']:z.3f}], chance "
            f"{row['null']:z.3f}"
            for row in rows.head(FARTHEST).to_dict("records")
        ]
        more = len(rows) - len(listed)
        tail = f"; {more} more" if more else ""
        return (
            f"{'; '.join(listed)}{tail}; smaller is farther from the pretraining" if listed else ""
        )

    def _searching(self) -> list[tuple[str, str]]:
        """Return what a search on training shots said, where there was one."""
        if not self.search:
            return []
        folds = len(self.search["to_zero_shot"]["folds"])
        cost = f"{self.search['cost']['trainings']:g} full trainings, {folds} folds"
        return [("Search on training shots", f"{self.search['statement']} Cost: {cost}.")]

    def _blocks_of(self, towers: list[str], how: str) -> str:
        sets = {t: self.choice.firm(t) if how == "firm" else self.choice.open(t) for t in towers}
        return ", ".join(f"{tower} {describe_blocks(blocks)}" for tower, blocks in sets.items())

    def _behind(self) -> str:
        """Return how many images and texts the first metric of the rule was read on."""
        metric = next(iter(self._metrics()), "")
        if metric not in set(self.scores["metric"]):
            return ""
        frame = self.curves(metric)
        frame = frame[(frame["dataset"] == POOLED) == (frame["dataset"] == POOLED).any()]
        counts = frame.groupby(["tower", "dataset"], sort=False)["n"].max().groupby("tower").sum()
        names = {"vision": "images", "text": "texts"}
        words = [f"{int(counts[t]):,} {names[t]}" for t in self.depths if counts.get(t, 0) > 0]
        return f"{axis_label(metric)} is read on {join(words)}" if words else ""

    def _metrics(self) -> list[str]:
        """Return the metrics that the rule read."""
        read = (found.get("values", {}) for found in self._towers.values())
        return list(dict.fromkeys(name for values in read for name in values))

    def _rule(self) -> str:
        """Return the rule in words, with the options that are numbers or names."""
        rule = RULES.get(self.choice.rule)
        meaning = (rule.__doc__ or "").partition("\n")[0].rstrip(".") if rule else ""
        meaning = meaning.replace("`", "")  # a page shows no code marks
        options = ", ".join(
            f"{key.replace('_', ' ')} {_number(value)}"
            for key, value in self.choice.evidence.get("options", {}).items()
            if value is not False
        )
        words = f"{self.choice.rule}: {inside(meaning)}" if meaning else ""
        return (words or self.choice.rule) + (f" ({options})" if options else "")

    def _starts(self) -> list[tuple[str, str]]:
        """Return the first chosen block of each tower with its interval over resamples."""
        parts = []
        for tower in self.depths:
            found = self._towers.get(tower, {})
            if (found.get("start") or {}).get("value") is not None:
                parts.append(f"{tower} {found['start']['value']} ({_start_words(found)})")
        return [("First block", "; ".join(parts))] if parts else []

    def _proof(self) -> str:
        if self.void:
            return self.void
        if self.validation is None:
            return "not yet; the command vlmlayers validate trains here and at competing placements"
        if self.validation.verdict:
            then = f"of the choice of then, {self.validation.chosen}: " if self.unproved else ""
            return then + self.validation.verdict
        frame = self.validation.placements.set_index("placement")["hm"]
        best = join(frame.index[frame > frame.max() - TIE])
        text = f"best {best} with harmonic mean {_number(frame.max())}"
        for name, label in (
            (self.validation.chosen, "chosen"),
            (self.validation.reference, self.validation.reference_words),
        ):
            if name in frame.index:
                text = f"{label} {_number(frame[name])}, {text}"
        return text

    def reading(self, metric: str) -> str:
        """Return what a curve shows, in one or two sentences of numbers."""
        frame = over_datasets(self.curves(metric)).dropna(subset=["value"])
        sentences = []
        for tower, part in frame.groupby("tower", sort=False):
            first, last = part.iloc[0], part.iloc[-1]
            sentence = (
                f"{str(tower).capitalize()}: {first['value']:z.2f} at {first['position']}, "
                f"{last['value']:z.2f} at {last['position']}"
            )
            top = float(part["value"].max())
            if top - max(first["value"], last["value"]) > 0.005:
                equal = part[part["value"].round(2) == round(top, 2)]["position"].astype(str)
                tied = f" (equal within 0.01: {', '.join(equal)})" if len(equal) > 1 else ""
                peak = part["position"].iloc[int(part["value"].argmax())]
                sentence += f", highest {top:z.2f} at {peak}{tied}"
            sentences.append(sentence)
        nulls = frame.dropna(subset=["null"]).groupby("tower", sort=False)["null"]
        chance = {str(name): _ends(float(null.min()), float(null.max())) for name, null in nulls}
        words = next(iter(chance.values()), "")
        if len(set(chance.values())) > 1:
            words = join(f"{ends} for {tower}" for tower, ends in chance.items())
        return ". ".join(sentences) + "." + (f" Chance {words}." if words else "")


def _start_words(found: Mapping[str, Any]) -> str:
    """Return where resampled choices start, and that they start elsewhere where they do."""
    start, empty = found["start"], found.get("empty", 0.0)
    value, low, high = start["value"], start["low"], start["high"]
    if low is None:
        return "no resample chooses a block"
    at = f"{low}" if low == high else f"{low} to {high}"
    span = f"95 % of resamples start at {at}"
    if empty:
        span = f"95 % of resamples that choose any start at {at}, {percent(empty)} choose none"
    if low <= value <= high:
        return span
    share = found["frequency"][value - 1]
    return f"not where resamples start: {span}; block {value} is chosen in {percent(share)} of all"


def _blocks(blocks: tuple[int, ...]) -> str:
    return f"block{'s' * (len(blocks) > 1)} {describe_blocks(blocks)}"


def _ends(low: float, high: float) -> str:
    """Return `0.10`, or `0.71 to 0.98`."""
    return " to ".join(dict.fromkeys((f"{low:z.2f}", f"{high:z.2f}")))


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _not_of(choice: LayerChoice, scores: pd.DataFrame, weights_hash: str) -> str:
    """Return in what the scores that a choice was made from differ from some; empty if in nothing.

    Of rules that ship the values are recorded that they read, of others a mark of all values.
    """
    evidence = choice.evidence
    model, weights = map(str, scores[["model", "weights"]].iloc[0])
    if other := choice.of_another(model, weights, weights_hash):
        return other
    read = {t: one["values"] for t, one in evidence.get("towers", {}).items() if one.get("values")}
    if "scores" in evidence and evidence["scores"] != values_mark(scores):
        return "they hold other values"
    if choice.rule not in RULES or not read:
        return ""
    try:
        rule = make_rule(choice.rule, evidence.get("options", {}))
        picks = rule(BlockTable.of(check_scores(scores), depths(scores)))
    except UserError as error:
        return str(error)
    for tower, values in read.items():
        now = picks[tower].values if tower in picks else {}
        for metric, column in values.items():
            then, found = column.get("value", ()), now.get(metric, {}).get("value", ())
            if len(found) != len(then) or not np.allclose(found, then):
                return f"{inside(axis_label(metric))} of the {tower} tower differs"
    return ""


def read_answer(run: Run | str | Path) -> Answer:
    """Read a run folder.

    Raises:
        UserError: It holds no score table or no choice, or one of towers of another depth.
    """
    found = run if isinstance(run, Run) else Run.open(run)
    found.require_choice()
    scores, provenance = read_scores(found.folder), found.read_provenance()
    extracted = provenance.get("model", {})
    known = extracted.get("weights_hash", "")
    ours = [*scores[["model", "weights"]].iloc[0], scores.attrs.get("weights_hash", known)]
    other = ""
    if known and known != ours[-1]:
        other = f"{extracted.get('name')} ({extracted.get('weights')}, {known[:12]})"
        provenance = {key: one for key, one in provenance.items() if key not in EXTRACTED}
    foreign = not_of(validated(found), *map(str, ours))
    choice = LayerChoice.load(found.choice)
    for tower, depth in depths(scores).items():
        chosen_of = choice.evidence.get("towers", {}).get(tower, {}).get("depth", depth)
        if chosen_of != depth:
            raise UserError(
                f"the choice is of {chosen_of} {tower} blocks and the scores are of {depth}; run "
                f"{shlex.join(['vlmlayers', 'select', str(found.folder)])} again"
            )
    return Answer(
        found,
        bare(scores),
        choice,
        provenance,
        None if foreign else RecordedValidation.read(found),
        {str(name): value for name, value in scores.attrs.items()},
        foreign,
        other,
    )


def join(words: Iterable[str]) -> str:
    """Return words as `a, b and c`."""
    names = list(words)
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
