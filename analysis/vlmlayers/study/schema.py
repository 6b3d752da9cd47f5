"""What a study file may say."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of, no_file
from vlmlayers.extraction import RecordOptions, WeightsOptions
from vlmlayers.files import read_toml, shipped
from vlmlayers.options import Options, Seed, validated
from vlmlayers.positions import TOWERS
from vlmlayers.prompts import TEMPLATE, Template
from vlmlayers.selection.resampling import RESAMPLES, check_resampling
from vlmlayers.user_code import is_user_code

Split = Literal["train", "val", "test", "all"]
STUDY_TEMPLATE = Path(__file__).with_name("template.toml")
# What metrics need, of the keys of `vlmlayers.metrics.declare.NEEDS`.
OF_DATASETS = ("datasets", "dataset confusion", "styles", "style classes", "other datasets")
OF_TOWERS = ("pairs", "pair matrix", "prompts", "modalities", "queries")
NO_PROMPTS = "makes prompts of class names; text = 'captions' and tower = 'vision' have none"
DEFAULT_METRICS = (
    "dataset_accuracy",
    "dataset_accuracy_ncm",
    "dataset_accuracy_knn",
    "class_accuracy",
    "zero_shot_accuracy",
    "fisher_ratio",
    "cka_debiased",
    "centroid_gap",
    "rmg",
)


class ModelPart(WeightsOptions):
    """One backbone, with its weights.

    Attributes:
        name: open_clip architecture, `mini-clip`, `hf-hub:organisation/name`, or `local` with
            `config` and `checkpoint`.
        path: Folder with `open_clip_config.json` or `config.json` and weights, instead of a name;
            relative to the study file, else to the data root.
        config: Configuration file for `local`.
        checkpoint: A file of weights.
        adapter: Trained adapter to attach: features are those of the adapted model.
        method: Method of the adapter, or `path.py:Class` beside the study file, where the adapter
            does not say: of a method of one's own, or in another method's layout than MMA's.
        label: Name of the run folder where a study has several models.
    """

    name: str = ""
    path: str = ""
    config: str | None = None
    checkpoint: str | None = None
    adapter: str = ""
    method: str = ""
    label: str = ""

    @model_validator(mode="after")
    def _one_source(self) -> ModelPart:
        if bool(self.name) == bool(self.path):
            raise ValueError("a model needs either 'name' or 'path'")
        if self.method and not self.adapter:
            raise ValueError("'method' is of an 'adapter', and none is named")
        return self

    @property
    def title(self) -> str:
        """Name for folders and messages."""
        base = self.label or (Path(self.path).name if self.path else self.name)
        if not self.label:
            base += "-random" * self.random_weights + "-adapted" * bool(self.adapter)
        # The title names a folder: a slash in it would make two.
        return re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-.") or "model"


class DatasetPart(Options):
    """One dataset; what is absent comes from `extract`."""

    name: str
    split: Split | None = None
    items: int | None = Field(default=None, ge=0)
    present_only: bool | None = None
    template: Template | None = None
    text: Literal["prompts", "captions"] | None = None


class ExtractPart(RecordOptions):
    """How features are recorded, and of what."""

    split: Split = Field(default="train", description="train, val, test or all.")
    items: int = Field(default=300, ge=0, description="Items per dataset, 0 for all.")
    template: Template = Field(default=TEMPLATE, description="Prompt around the names of classes.")
    device: str = Field(default="auto", description="auto, cpu, cuda, …")

    def idle(self) -> Iterator[tuple[str, str]]:
        """Yield what is of the tower that is not recorded."""
        yield from super().idle()
        if self.tower == "vision":
            yield "template", "makes prompts; tower='vision' records no texts"


class ScorePart(Options):
    """Which metrics, and the options of `vlmlayers.score`.

    Attributes:
        metrics: Names of the METRICS table, or `path.py:function`, beside the study file.
        options: Fields of `vlmlayers.scores.ScoreOptions`, such as `seeds` and `bootstrap`.
    """

    metrics: tuple[str, ...] = DEFAULT_METRICS
    options: dict[str, Any] = Field(default_factory=dict)


class SelectPart(Options):
    """Which rule, and its options; `search` where the study has a table of that name."""

    rule: str = "threshold"
    resamples: int = Field(default=RESAMPLES, ge=0)
    options: dict[str, Any] = Field(default_factory=dict)


class ReportPart(Options):
    """What the report says beyond the numbers.

    Attributes:
        title: Heading; the study's title where empty.
        note: A paragraph of the author.
        formats: Formats of the saved figures.
        metrics: Metrics to draw a publication figure of; empty takes the usual ones.
    """

    title: str = ""
    note: str = ""
    formats: tuple[Literal["svg", "png", "pdf"], ...] = ("svg", "png", "pdf")
    metrics: tuple[str, ...] = ()


class Study(Options):
    """A study file.

    Attributes:
        title: Heading of the report.
        data_root: Where the datasets lie, relative to the study file; an option of the command
            line or `VLMLAYERS_DATA` comes first.
        seed: Seed of item draws and resampling.
        stages: Stages to run where the command line names none; all where empty.
        models: One or more backbones; several give one run folder each and a comparison.
        datasets: Names, manifests or image folders, or tables with `name` and what differs from
            `extract`. Paths are looked up beside the study file, under the data root, then here.
        extract: How features are recorded.
        score: Metrics.
        select: Rule.
        search: The table `search`, handed to the stage that searches amount and placement on
            training shots, whose pick is the choice; absent: nothing is searched.
        train: The tables `[[train]]`, handed to the training stage: protocols of the paper.
        validate_: The table `validate`, handed to the validation stage; absent: not validated.
        report: Report.
    """

    model_config = ConfigDict(populate_by_name=True)

    title: str = "Layer analysis"
    data_root: str | None = None
    seed: Seed = 0
    stages: tuple[
        Literal["extract", "score", "search", "select", "train", "validate", "report"], ...
    ] = ()
    models: tuple[ModelPart, ...] = Field(min_length=1)
    datasets: tuple[DatasetPart, ...] = Field(min_length=1)
    extract: ExtractPart = ExtractPart()
    score: ScorePart = ScorePart()
    search: dict[str, Any] | None = None
    select: SelectPart = SelectPart()
    train: tuple[dict[str, Any], ...] = ()
    # With an underscore, because pydantic's models have a method of that name.
    validate_: dict[str, Any] | None = Field(default=None, alias="validate")
    report: ReportPart = ReportPart()

    @field_validator("datasets", mode="before")
    @classmethod
    def _names_are_tables(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [{"name": one} if isinstance(one, str) else one for one in value]
        return value

    @model_validator(mode="before")
    @classmethod
    def _search_is_the_choice(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("search") is not None:
            rule = content.get("select", {})
            if isinstance(rule, dict):
                return content | {"select": {"rule": "search"} | rule}
        return content

    @model_validator(mode="after")
    def _different_names(self) -> Study:
        for kind, names in (
            ("model", [model.title for model in self.models]),
            ("dataset", [f"{d.name} ({self.part(d)['split']})" for d in self.datasets]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                hint = "; give each a label" if kind == "model" else ""
                raise ValueError(f"{kind} {twice[0]!r} is named twice{hint}")
        return self

    @model_validator(mode="after")
    def _templates_apply(self) -> Study:
        of_captions = [self.part(dataset)["text"] == "captions" for dataset in self.datasets]
        for dataset, captions in zip(self.datasets, of_captions):
            if dataset.template and (captions or self.extract.tower == "vision"):
                raise ValueError(f"template of dataset {dataset.name!r} {NO_PROMPTS}")
        if all(of_captions) and self.extract.template != TEMPLATE:
            raise ValueError(f"template of [extract] {NO_PROMPTS}")
        return self

    @model_validator(mode="after")
    def _some_model_is_trained(self) -> Study:
        tables = {"search": self.search, "train": self.train or None, "validate": self.validate_}
        for name, table in tables.items():
            if table is not None and all(model.adapter for model in self.models):
                raise ValueError(
                    f"the table [{name}] is for backbones, and every model has an adapter; leave "
                    "it out, or name a model without one"
                )
        return self

    def part(self, dataset: DatasetPart) -> dict[str, Any]:
        """Return the extraction options of one dataset."""
        # None means absent here; `items = 0` and `present_only = false` are said.
        common = self.extract.model_dump(include=set(DatasetPart.model_fields))
        return common | dataset.model_dump(exclude={"name"}, exclude_none=True)


@checked
def study_file(name: str | Path) -> Path:
    """Return the study file of a path, or of the name of a study that ships with the package.

    Raises:
        UserError: There is neither; names the nearest shipped one.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = {file.stem: file for file in sorted(shipped("data_manifests/studies").glob("*.toml"))}
    if path.suffix == ".toml" or len(path.parts) > 1:
        raise UserError(
            f"study file {path} {no_file(path)}; these ship with the package and can be named: "
            f"{', '.join(known)}"
        )
    return known[check_one_of("study", str(name), known)]


@checked
def read_study(path: str | Path) -> Study:
    """Read and check a study file, or the shipped study of a name.

    Raises:
        UserError: The file is absent or not TOML; a key is unknown (with the nearest), missing or
            has a wrong value; a metric, rule or dataset is unknown; the rule of its table
            `[select]` reads a metric that it does not score, or has resamples and reads none.
    """
    source = study_file(path)
    content = read_toml(source)
    if "layout" in content and "models" not in content:
        raise UserError(
            f"{source} is the manifest of a dataset, not a study; name it in a study's `datasets`, "
            "or give it to `vlmlayers extract`"
        )
    return check_study(content, str(source))


@checked
def check_study(content: dict[str, Any], where: str = "the study") -> Study:
    """Return the study that a dictionary describes, with its names checked."""
    study = validated(Study, content, where)
    _check_names(study, where)
    return study


def _check_names(study: Study, where: str) -> None:
    from vlmlayers.metrics import metric
    from vlmlayers.scores import ScoreOptions
    from vlmlayers.selection import make_rule

    packaged = [metric(name, where) for name in study.score.metrics if not is_user_code(name)]
    options = f"{where}, options of score"
    asked = validated(ScoreOptions, study.score.options, options)
    if len(packaged) == len(study.score.metrics):
        asked.refuse_unread(packaged, options)
    rule = study.select.rule
    try:
        check_resampling(rule, study.select.resamples)
        if not is_user_code(rule):
            made = make_rule(rule, study.select.options)
            # A study that names no rule may be meant for scores alone. What functions of the user's
            # own score is known once their file is looked for, before the first stage.
            named = "select" in study.model_fields_set and "select" in (study.stages or ["select"])
            if named and not any(map(is_user_code, study.score.metrics)):
                check_reads(study, made, study.score.metrics)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def check_reads(study: Study, rule: Any, scored: Collection[str]) -> None:
    """Raise a UserError where a study will not have a metric that its rule reads.

    Args:
        study: The study.
        rule: The rule, as `make_rule` gives it.
        scored: Names of the metrics that the study scores.
    """
    tower = study.extract.tower
    for name in rule.reads([tower] if tower else TOWERS):
        if name not in scored:
            what = "which the study does not score; add it to the metrics of [score]"
        elif needed := _out_of_reach(name, study):
            what = f"which needs {needed}"
        else:
            continue
        other = "" if tower or "cka_debiased" not in scored else (
            ', or choose by agreement: rule = "budget", options = { score = "agreement" }'
        )  # fmt: skip
        raise UserError(
            f"the rule {study.select.rule!r} reads {name}, {what}, or choose another in the "
            f"options of [select]{other}"
        )


def _out_of_reach(metric: str, study: Study) -> str:
    """Return what a metric needs and a study does not have, empty where it has it."""
    from vlmlayers.metrics import METRICS

    needs = METRICS[metric].needs if metric in METRICS else ""
    splits = [study.part(dataset)["split"] for dataset in study.datasets]
    if needs in OF_DATASETS and len(set(splits)) == len(splits):  # others are scored apart
        have = "one" if len(splits) == 1 else f"one of each of {', '.join(splits)}"
        return f"at least two datasets of one split, where the study has {have}; add one"
    if needs in OF_TOWERS and study.extract.tower:
        return f"both towers, where the study records the {study.extract.tower} tower; record both"
    return ""
