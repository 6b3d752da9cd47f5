"""What the stages of a study share: paths, options, and the model once it is needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmlayers.architectures import MINIATURES, is_model_folder
from vlmlayers.errors import UserError
from vlmlayers.extraction import RecordOptions
from vlmlayers.features import LayerFeatures
from vlmlayers.files import HUB, files_beside, find_weights, hub_folder
from vlmlayers.identity import DataIdentity
from vlmlayers.manifests import Item, Manifest, distinct
from vlmlayers.progress import is_hidden, timed
from vlmlayers.runs import Run, device_kind, file_mark, versions
from vlmlayers.selection import LayerChoice
from vlmlayers.study.schema import DatasetPart, ModelPart, Study
from vlmlayers.user_code import is_user_code, packaged

LOG = logging.getLogger(__name__)
ADAPTERS = "vlmlayers.adapters"
# Of a model's folder: configurations, and vocabularies of tokenizers of open_clip and transformers.
BESIDE = ("*.json", "*.txt", "*.model", "*.gz", "*/tokenizer*", "*/vocab*", "*/merges*")


def silent(message: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class StudyDataset:
    """One dataset of a study, ready to extract, as it was when it was listed."""

    manifest: Manifest
    items: list[Item]
    options: dict[str, Any]
    identity: DataIdentity

    @property
    def folder(self) -> str:
        """Name of its feature store."""
        return store_name(self.manifest, self.options["split"])


def store_name(manifest: Manifest, split: str) -> str:
    """Return the name of the folder with the features of one split."""
    return f"{manifest.name}-{split}"


@dataclass
class StageContext:
    """One model of a study and its run folder; what a stage gets.

    Attributes:
        run: The run folder.
        study: The study.
        part: The model's table of the study.
        base: Folder that relative paths of the study start from.
        data_root: Data root, or None for the environment variable and the default.
        echo: Says one line to the user.
        progress: Whether to show progress bars.
        device: Device asked for on the command line; None takes the study's.
        force: Whether stages run again even where nothing changed.
    """

    run: Run
    study: Study
    part: ModelPart
    base: Path
    data_root: Path | None = None
    echo: Callable[[str], None] = silent
    progress: bool = True
    device: str | None = None
    force: bool = False
    _model: Any = field(default=None, repr=False)

    def table(self, name: str) -> dict[str, Any]:
        """Return the table `search` or `validate` of the study, for the stage that reads it."""
        tables = {"search": self.study.search, "validate": self.study.validate_}
        return tables[name] or {}

    def doing(self, line: str) -> None:
        """Say what is being done, where progress is shown."""
        if not is_hidden():
            self.echo(line)

    @property
    def seed(self) -> int:
        """Seed of the study."""
        return self.study.seed

    @cached_property
    def datasets(self) -> list[StudyDataset]:
        """The datasets with their items, drawn but not opened.

        Raises:
            UserError: A dataset is unknown, lacks the split, or has no image on disk.
        """
        return [self._dataset(*pair) for pair in zip(self.manifests, self.study.datasets)]

    @cached_property
    def manifests(self) -> list[Manifest]:
        """The manifest of each dataset, in the order of the study.

        Raises:
            UserError: A dataset is unknown, or two of them would be one in tables and stores.
        """
        found = [Manifest.load(self.dataset_name(part.name)) for part in self.study.datasets]
        distinct(found, self.data_root)
        splits = (self.study.part(part)["split"] for part in self.study.datasets)
        named = [f"{manifest.name} ({split})" for manifest, split in zip(found, splits)]
        twice = next((name for name in named if named.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"dataset {twice} is named twice; name it once")
        return found

    @property
    def left_out(self) -> dict[str, str]:
        """Feature folders of the datasets that could not be extracted, and why not."""
        return self.run.left_out

    @property
    def extracted_manifests(self) -> list[Manifest]:
        """The manifests without those of datasets that could not be extracted."""
        splits = [self.study.part(part)["split"] for part in self.study.datasets]
        return [manifest for manifest, split in zip(self.manifests, splits)
                if store_name(manifest, split) not in self.left_out]  # fmt: skip

    def _dataset(self, manifest: Manifest, part: DatasetPart) -> StudyDataset:
        options = self.study.part(part)
        split, present = options["split"], options["present_only"]
        items = (
            manifest.sample(
                split, options["items"], seed=self.seed, root=self.data_root, present_only=present
            )
            if options["items"]
            else manifest.items(split, root=self.data_root, present_only=present)
        )
        if not items:
            raise UserError(
                f"{manifest.name} has no item on disk in split {split!r}; "
                f"run `vlmlayers data check {manifest.name}`"
            )
        return StudyDataset(manifest, items, options, manifest.identity(items, self.data_root))

    def whole_identity(self, manifest: Manifest) -> DataIdentity:
        """Return the identity of all splits of a dataset, which training draws and tests on."""
        return manifest.identity(manifest.items("all", root=self.data_root), self.data_root)

    def extract_options(self, data: StudyDataset) -> dict[str, Any]:
        """Return the keyword arguments of `extract` and `stream` for one dataset, but `out`."""
        options = self.study.extract
        common = {name: getattr(options, name) for name in RecordOptions.model_fields}
        prompts = data.options["text"] == "prompts" and options.tower != "vision"
        own = {
            "items": data.items,
            "root": self.data_root,
            "text": data.options["text"],
            "template": data.options["template"] if prompts else None,
            "present_only": False,  # those that are not there are not among the items
            "progress": self.progress,
        }
        return common | own

    @property
    def leaving_out(self) -> dict[str, bool]:
        """Which images training leaves out where its own table does not say: as extraction does."""
        return {
            "present_only": any(self.study.part(d)["present_only"] for d in self.study.datasets),
            "skip_unreadable": self.study.extract.skip_unreadable,
        }

    def dataset_name(self, name: str) -> str:
        """Return a known name as it is; else the place of a manifest or folder of that name."""
        places = () if name in Manifest.names() else self._places(name)
        return next((str(place) for place in places if place.exists()), name)

    @property
    def rule_options(self) -> dict[str, Any]:
        """The options of the rule; a file may lie beside the study.

        The rule `search` reads what the stage of that name wrote where no other file is named.
        """
        own = {"file": str(self.run.search)} if self.study.select.rule == "search" else {}
        return own | files_beside(self.base, self.study.select.options)

    @property
    def rule(self) -> str:
        """The rule's name, or its file and function with the file looked up beside the study."""
        return self._own_code(self.study.select.rule)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics; files of the user's own are looked up beside the study."""
        return [self._own_code(name) for name in self.study.score.metrics]

    def adapter_arguments(self) -> dict[str, str]:
        """Return adapter and method of the model where it has one, with paths resolved."""
        if not self.part.adapter:
            return {}
        found = {"adapter": str(self._path(self.part.adapter, what="adapter"))}
        return found | ({"method": self._own_code(self.part.method)} if self.part.method else {})

    def _own_code(self, name: str) -> str:
        return str(self.base / name) if is_user_code(name) else name

    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments of `load_model`, with paths resolved."""
        part = self.part
        name = str(self._path(part.path)) if part.path else part.name
        found = part.model_dump(
            exclude={"name", "path", "adapter", "method", "label"}, exclude_none=True
        )
        files = {key: str(path) for key, path in self._model_files().items()}
        return {"name": name, **found, **files}

    def _model_files(self) -> dict[str, Path]:
        """Return the files that the model's table names, by key; they need not exist.

        `pretrained` is a file where there is one of that name, else a tag.
        """
        named = {key: getattr(self.part, key) for key in ("config", "checkpoint", "pretrained")}
        found = {key: self._path(text, required=False) for key, text in named.items() if text}
        # The key takes a tag as well, and tags are not looked up on the disk.
        if "pretrained" in found and not found["pretrained"].is_file():
            del found["pretrained"]
        return found

    def _path(self, text: str, required: bool = True, what: str = "model folder") -> Path:
        places = self._places(text)
        for place in places:
            if place.exists():
                return place.resolve()
        if required:
            tried = ", ".join(str(place) for place in places)
            more = f"; tried {tried}" if tried != text else ""
            raise UserError(f"{what} {text} does not exist{more}")
        return Path(text).expanduser()

    def _places(self, text: str) -> list[Path]:
        """Return where a path may lie: beside the study, under the data root, or here."""
        from vlmlayers.manifests.place import data_root

        path = Path(text).expanduser()
        if path.is_absolute():
            return [path]
        return list(dict.fromkeys([self.base / path, data_root(self.data_root) / path, path]))

    def model_fingerprint(self) -> dict[str, Any]:
        """Return what identifies the weights without loading them."""
        arguments, files = self.model_arguments(), self._model_files()
        name = arguments["name"]
        hub = hub_folder(name.removeprefix(HUB)) if name.startswith(HUB) else None
        folder = hub or Path(name).expanduser()
        inside = folder if self.part.path or hub or is_model_folder(name) else None
        # Its files lie in the package; a new version of it has new weights under the same name.
        if name in MINIATURES:
            inside = MINIATURES[name]
        if inside is not None and inside.is_dir():
            # Configurations and tokenizers change values as much as weights do.
            found = [path for kind in BESIDE for path in sorted(inside.glob(kind))]
            files |= {path.relative_to(inside).as_posix(): path for path in found}
            if not {"pretrained", "checkpoint"} & set(arguments) and not self.part.random_weights:
                files["weights"] = find_weights(inside)
        adapted = self.adapter_arguments()
        if adapted:
            files["adapter"] = Path(adapted["adapter"])
            method = adapted.get("method", "")
            if is_user_code(method):
                files["method"] = Path(method.rpartition(":")[0])
        # Files count by content, not by path: a moved folder is the same model.
        names = {key: value for key, value in arguments.items() if key not in files}
        if self.part.method:
            names["adapter_method"] = self.part.method
        names["name"] = name if hub else folder.name
        known = versions()
        return {
            **names,
            "files": {key: file_mark(path) for key, path in files.items()},
            "open_clip": known.get("open_clip_torch"),
            "torch": known.get("torch"),
        }

    def load_model(self) -> Any:
        """Return the model (`vlmlayers.models.VLM`), loaded once."""
        if self._model is None:
            from vlmlayers.models import load_model

            self.doing(f"loading {self.part.title}")
            device = self.device or self.study.extract.device
            with timed(LOG, f"loading {self.part.title}"):
                self._model = load_model(**self.model_arguments(), device=device)
            if adapted := self.adapter_arguments():
                attach = attacher(self.part.adapter)
                self._model = attach(self._model, Path(adapted["adapter"]), adapted.get("method"))
        return self._model

    @property
    def device_kind(self) -> str:
        """Kind of device that values are computed on: `cpu` or `cuda`."""
        return device_kind(self.device or self.study.extract.device)

    def features(self) -> Iterator[LayerFeatures]:
        """Yield the stored features, dataset by dataset; needs no torch.

        Raises:
            UserError: A store is missing or incomplete.
        """
        from vlmlayers.features.store import open_features

        for dataset in self.datasets:
            if dataset.folder in self.left_out:
                continue
            yield open_features(self.run.features / dataset.folder)

    @property
    def scores(self) -> Any:
        """The score table of the run."""
        from vlmlayers.scores import read_scores

        return read_scores(self.run.scores)

    @property
    def choice(self) -> LayerChoice:
        """The layers chosen in this run."""
        return LayerChoice.load(self.run.choice)

    def ledger(self) -> dict[str, Any]:
        """Return which stages are done and on what inputs."""
        return self.run.read("stages.json")


def attacher(adapter: str) -> Any:
    """Return what attaches an adapter's file to a model permanently, and checks a method's name."""
    # By entry point: this package must not import the one that is built on it.
    found = packaged(ADAPTERS)
    if "attach" not in found:
        raise UserError(
            f"no package offers to attach the adapter {adapter}; install vlmadapters again"
        )
    return found["attach"].load()
