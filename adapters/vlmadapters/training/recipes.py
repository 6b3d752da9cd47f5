"""Training recipes: every value in one frozen record, read from TOML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vlmadapters.clip.savings import Savings
from vlmadapters.data.augmentation import Augmentation
from vlmadapters.methods import METHODS
from vlmadapters.methods.config import VIT_B_16, MethodConfig, placements_of
from vlmlayers.architectures import miniature_of
from vlmlayers.arguments import PRECISIONS, Count, Natural, NotNegative, Positive, Share, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import files_beside, read_toml
from vlmlayers.placement import Amount, Placement
from vlmlayers.positions import TOWERS
from vlmlayers.prompts import TEMPLATE, Template
from vlmlayers.words import counted

DEFAULT_METHOD = "mma"  # where it is named, it may as well be nobody's choice
SHIPPED = Path(__file__).with_name("recipe_files")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("epoch", "step", "constant")
# What only training in steps reads.
OF_STEPS = (
    "optimizer", "lr", "momentum", "beta2", "eps", "weight_decay", "max_norm", "schedule",
    "warmup_epochs", "warmup_lr", "final_lr", "epochs", "steps_per_shot", "updates_per_batch",
    "batch_size", "drop_last", "cached_views", "cuda_graph", "save_every",
)  # fmt: skip


@checked
@dataclass(frozen=True)
class TrainConfig:
    """Training recipe of any method; the defaults are those of MMA.

    Attributes:
        optimizer: `sgd` or `adamw`.
        lr: Learning rate after the warm-up.
        momentum: Momentum of SGD; the first decay rate of AdamW.
        beta2: Second decay rate of AdamW.
        eps: Term in AdamW's denominator.
        weight_decay: Weight decay.
        max_norm: Norm to which gradients are clipped, over all parameters; 0 clips nothing.
        schedule: `epoch` and `step` let the rate fall by a cosine, once an epoch or at every step;
            `constant` keeps it.
        warmup_epochs: Epochs at `warmup_lr` before that.
        warmup_lr: Learning rate of the warm-up.
        final_lr: Where the cosine ends.
        epochs: Passes over the few-shot items.
        steps_per_shot: Steps in all, per shot, instead of epochs; 0 counts epochs.
        updates_per_batch: Updates made on each batch of images.
        batch_size: Items per update, over all processes.
        drop_last: Leave out an epoch's last batch where it is smaller than the others.
        shots: Items per class.
        template: Prompt around each class name.
        precision: `fp32`, `tf32` (its products in TF32, on GPUs that have it), autocast to `bf16`
            or `fp16` (with loss scaling), or `auto`: fp32 on a CPU and fp16 on a GPU. Residual
            stream, logits and loss stay in single precision.
        crop_scale: Range of the random crop's share of the area.
        crop_ratio: Range of its aspect ratio.
        flip: Probability of a horizontal flip.
        cached_views: 0 draws a fresh view at every epoch, as published. A positive number fixes
            that many views per image, whose frozen activations are then computed once.
        device_crops: Crop decoded images on the GPU. A CPU's crops differ, as it rounds between its
            two passes: by less than half a level of 255 on average, by some ten at sharp edges.
        cuda_graph: Record a step as a CUDA graph and replay it; it changes nothing but time. None
            records wherever it can be done: in one process on a GPU, of methods whose steps do not
            vary.
        save_every: Steps between checkpoints; 0 saves at ends of epochs, at most every 5 seconds.
        savings: What is skipped.
    """

    optimizer: str = "sgd"
    lr: Positive = 0.0015
    momentum: Share = 0.9
    beta2: Share = 0.999
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 5e-4
    max_norm: NotNegative = 0.0
    schedule: str = "epoch"
    warmup_epochs: Natural = 0
    warmup_lr: NotNegative = 1e-5
    final_lr: NotNegative = 0.0
    epochs: Count = 5
    steps_per_shot: Natural = 0
    updates_per_batch: Count = 1
    batch_size: Count = 16
    drop_last: bool = True
    shots: Count = 16
    template: Template = TEMPLATE
    precision: str = "auto"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Share = 0.5
    cached_views: Natural = 0
    device_crops: bool = False
    cuda_graph: bool | None = None
    save_every: Natural = 0
    savings: Savings = field(default_factory=Savings)

    def __post_init__(self) -> None:
        check_one_of("precision", self.precision, PRECISIONS)
        check_one_of("optimizer", self.optimizer, OPTIMIZERS)
        check_one_of("schedule", self.schedule, SCHEDULES)
        for name, limit in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            object.__setattr__(self, name, _range(name, getattr(self, name), limit))

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation these values describe."""
        return Augmentation(self.crop_scale, self.crop_ratio, self.flip)

    def of_share(self, share: float) -> TrainConfig:
        """Return the recipe for a share of the items: steps that are counted per shot shrink too.

        Epochs shrink by themselves.
        """
        if not self.steps_per_shot or share == 1:
            return self
        return replace(self, steps_per_shot=max(1, round(share * self.steps_per_shot)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        ranges = {name: list(getattr(self, name)) for name in ("crop_scale", "crop_ratio")}
        return {**asdict(self), **ranges}

    def identity(self) -> dict[str, Any]:
        """Return the values that a result depends on."""
        values = self.to_dict()
        # How a number is computed and kept does not change which number it is.
        for key in ("savings", "save_every", "cuda_graph"):
            values.pop(key)
        if not self.device_crops:  # what was trained before there was a choice stays valid
            values.pop("device_crops")
        if self.schedule == "step" and self.warmup_epochs:  # whose steps counted into it at first
            values["schedule"] = "step behind warm-up"
        return values


def _range(name: str, values: tuple[float, float], limit: float) -> tuple[float, float]:
    low, high = map(float, values)  # of whole numbers too: a cell's name is made of how they print
    if not 0 < low <= high <= limit:
        top = "" if limit == math.inf else f" and {limit:g} at most"
        raise UserError(f"{name} is {low:g} to {high:g}; it must rise, above 0{top}")
    return low, high


@dataclass(frozen=True)
class Recipe:
    """A named training configuration with the method it is for.

    Attributes:
        name: Name of the recipe.
        train: How it trains.
        method: The method's settings.
        source: Where the values come from.
        datasets: Values that differ by dataset: name of a dataset to fields of `train`, and under
            `settings` to those of `method`, but for its blocks.
        amount: The amount that `at` set, where it set one.
        loaded: Name or file, and method, that `load_recipe` was given without depths; None where
            blocks were named since.
    """

    name: str
    train: TrainConfig
    method: MethodConfig
    source: str = ""
    # A mapping has no hash, and recipes are keys of the cells that they train.
    datasets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    amount: Amount = field(default_factory=Amount)
    loaded: tuple[str, str] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        """Return one line for a notebook: method, placement, and what is not as by default."""
        usual, shown = TrainConfig(), {"optimizer", "lr", "epochs", "batch_size", "shots"}
        train = {one.name: getattr(self.train, one.name) for one in fields(self.train)}
        told = {k: v for k, v in train.items() if k in shown or v != getattr(usual, k)}
        values = ", ".join(f"{k}={v!r}" for k, v in {**self.method.settings(), **told}.items())
        return f"Recipe({self.name}, {f'{self.method.title} {self.label}'.strip()}: {values})"

    @property
    def placement(self) -> Placement:
        """Where the method acts, with the amount that `at` set."""
        return Placement(self.method.vision, self.method.text, self.amount)

    @property
    def label(self) -> str:
        """The placement as tables write it; empty where there is neither block nor amount."""
        return str(self.placement) if self.placement or self.amount else ""

    def described(self) -> dict[str, Any]:
        """Return what the files of a run say of the recipe, as JSON values."""
        return {
            "method": self.method.name,
            "recipe": {"name": self.name, **self.train.identity()},
            "settings": self.method.settings(),
        }

    def at(self, place: Any) -> Recipe:
        """Return the recipe with its method at other blocks, by the amount that they name.

        Args:
            place: A placement, as text or value, or a layer choice or its path, of which what lies
                in the method's towers counts. An amount without blocks keeps the recipe's own
                blocks; one in epochs replaces steps per shot.

        Raises:
            UserError: The method cannot act there, has no scale or reads neither rate nor epochs;
                or its epochs are all warm-up.
        """
        if isinstance(place, str):
            place = Placement.parse(place)
        if not isinstance(place, Placement):
            method = self.method.from_choice(place, **self.method.settings())
            amount = getattr(getattr(place, "placement", None), "amount", Amount())
            place = Placement(method.vision, method.text, amount)
        train = place.amount.given()
        scale = {key: train.pop(key) for key in ("scale",) if key in train}
        if scale and "scale" not in self.method.settings():
            raise UserError(f"{self.method.name} has no scale; name an amount by lr and epochs")
        if "epochs" in train:
            # Refused here, a search or sweep says so before it has trained other settings.
            if train["epochs"] <= self.train.warmup_epochs:
                raise UserError(
                    f"{place} is all warm-up: {self.method.name} warms up for "
                    f"{counted(self.train.warmup_epochs, 'epoch')}; name more or set "
                    "warmup_epochs=0"
                )
            train.setdefault("steps_per_shot", 0)
        kept = place.amount and not place
        method = self.method if kept else self.method.with_placement(*place)
        return replace(self.with_method(method).changed(train, scale), amount=place.amount)

    def fitted(self, depths: Mapping[str, int]) -> Recipe:
        """Return the recipe at the blocks that it has on a backbone of some depths.

        Blocks that were named since `load_recipe` stay.
        """
        if self.loaded is None:
            return self
        own = load_recipe(*self.loaded, depths).method
        # Not `with_placement`, which drops the pairs of MMA: those asked for stay, or are refused.
        return replace(self, method=replace(self.method, vision=own.vision, text=own.text))

    def with_method(self, method: MethodConfig) -> Recipe:
        """Return the recipe with other settings of its method.

        Settings that differ from the recipe's also replace values of single datasets.
        """
        asked, own = method.to_dict(), self.method.to_dict()
        new = {key: value for key, value in asked.items() if value != own[key]}
        kept = {name: _without(values, {}, new) for name, values in self.datasets.items()}
        loaded = self.loaded if method is self.method else None
        amount = _left(self.amount, new)
        return replace(self, method=method, datasets=kept, amount=amount, loaded=loaded)

    def changed(self, train: Mapping[str, Any], method: Mapping[str, Any] | None = None) -> Recipe:
        """Return the recipe with some values replaced, for every dataset; None keeps a value.

            va.train(model, "faces", recipe=va.load_recipe("mini").changed({"shots": 4}))

        Raises:
            UserError: The method has no such setting, with the nearest one, or nothing reads a
                value beside the others.
        """
        made = self.replaced(train, method or {})
        made.refuse_unread(key for key, value in train.items() if value is not None)
        return made

    def refuse_unread(self, keys: Iterable[str], of: str = "") -> None:
        """Raise a UserError where nothing reads one of some values of `train`.

        Args:
            keys: Names of the values.
            of: What they are of, for the message: " of faces".
        """
        unread = self.unread()
        for key in keys:
            if key in unread:
                raise UserError(f"{key}{of} is not read: {unread[key]}")

    def unread(self) -> dict[str, str]:
        """Return each value of `train` that nothing reads beside the others, and why."""
        train, found = self.train, {}
        if train.steps_per_shot:
            found["epochs"] = "steps_per_shot counts the steps; set that, or steps_per_shot=0 too"
        if train.optimizer != "adamw":
            found |= dict.fromkeys(("beta2", "eps"), "the optimizer is sgd; set optimizer=adamw")
        if train.schedule == "constant":
            found["final_lr"] = "the schedule is constant; set schedule=epoch or step"
        if not train.warmup_epochs:
            found["warmup_lr"] = "there is no warm-up; set warmup_epochs"
        if not self.method.in_steps:
            why = f"{self.method.name} is fitted in closed form, not trained in steps"
            found |= dict.fromkeys(OF_STEPS, why)
        return found

    def replaced(self, train: Mapping[str, Any], method: Mapping[str, Any]) -> Recipe:
        """Return the recipe with some values replaced as `changed` does, read or not."""
        new_train = {key: value for key, value in train.items() if value is not None}
        new_method = {key: value for key, value in method.items() if value is not None}
        for key in new_method:
            known = [f.name for f in fields(self.method)]
            check_one_of(f"{self.method.name} setting", key, known)
        kept = {
            name: _without(values, new_train, new_method) for name, values in self.datasets.items()
        }
        return replace(
            self,
            train=replace(self.train, **new_train),
            method=replace(self.method, **new_method),
            datasets=kept,
            amount=_left(self.amount, new_train | new_method),
            loaded=None if new_method.keys() & {*TOWERS} else self.loaded,
        )

    def train_for(self, dataset: str) -> TrainConfig:
        """Return how it trains on a dataset."""
        values = dict(self.datasets.get(dataset, {}))
        values.pop("settings", None)
        return replace(self.train, **values)

    def method_for(self, dataset: str) -> MethodConfig:
        """Return the method's settings on a dataset."""
        settings = self.datasets.get(dataset, {}).get("settings", {})
        return self.method.from_dict({**self.method.to_dict(), **settings})

    @property
    def files(self) -> list[Path]:
        """Files that the method's settings name, on any dataset."""
        configs = [self.method, *map(self.method_for, self.datasets)]
        return list(dict.fromkeys(file for config in configs for file in config.files))

    @property
    def varied(self) -> set[str]:
        """Which settings of the method follow the dataset."""
        return {key for values in self.datasets.values() for key in values.get("settings", {})}


def _left(amount: Amount, replaced: Iterable[str]) -> Amount:
    """Return an amount without values that are replaced, which tables would go on naming."""
    return replace(amount, **dict.fromkeys(amount.given().keys() & {*replaced}))


def _without(
    values: Mapping[str, Any], train: Mapping[str, Any], method: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a dataset's values without those of some names."""
    left = {key: value for key, value in values.items() if key not in train}
    if "settings" in left:
        left["settings"] = {k: v for k, v in left["settings"].items() if k not in method}
    return left


def settings_at(
    recipes: Sequence[Recipe], placements: Iterable[Any], known: Mapping[str, Any] | None = None
) -> list[Recipe]:
    """Return each recipe at the placements that are meant for its method, or else as it is.

    Args:
        recipes: One recipe per method.
        placements: What `Recipe.at` takes; text may name a method, as in `maple:1-9`.
        known: What stands for a placement's text, such as a choice.

    Raises:
        UserError: A placement names another method, cannot be read, or a method cannot act there.
    """
    named = placements_of([recipe.method.name for recipe in recipes], placements)
    stands = known or {}
    return [
        setting
        for recipe in recipes
        for setting in [
            recipe.at(stands.get(place, place) if isinstance(place, str) else place)
            for place in named[recipe.method.name]
        ]
        or [recipe]
    ]


IN_RECIPE = {
    one.name: "it is a value of the recipe, as in "
    f"recipe=load_recipe('published').changed({{'{one.name}': …}})"
    for one in fields(TrainConfig)
}


def default_recipe(model: str, method: str = "mma") -> str:
    """Return the recipe for a backbone, by name or folder: `mini` for the miniatures that ship.

    For others it is `published`.
    """
    return "mini" if "mini" in _shipped(method) and miniature_of(model) else "published"


def shipped_recipes(method: str) -> dict[str, Recipe]:
    """Return the recipes that ship for a method, by name, at the blocks of ViT-B/16."""
    return {name: load_recipe(name, method) for name in _shipped(method)}


def check_methods(recipes: Sequence[Recipe], methods: Sequence[str]) -> None:
    """Raise a UserError where methods are named beside recipes, which are of others."""
    own = [one.method.name for one in recipes]
    if list(methods) != [DEFAULT_METHOD] and [METHODS.config(one).name for one in methods] != own:
        raise UserError(
            f"the recipe is of {', '.join(own)}, not of {', '.join(methods)}; leave method out, or "
            "name a recipe"
        )


@checked
def load_recipe(
    name: str | Path = "published",
    method: str = DEFAULT_METHOD,
    depths: Mapping[str, int] | None = None,
) -> Recipe:
    """Return a recipe by name (`published`, `mini`, …) or from a TOML file.

    A file holds the keys of one recipe at its top level, and files that its settings name may lie
    beside it; `extends` names a shipped one of the same
    method, and `method` another method. A method without shipped recipes has `published` alone:
    its own settings with the default `TrainConfig`. A recipe acts at the blocks published for its
    method or for itself, scaled to the depth of the backbone; those that a file names stay.

    Args:
        name: Name of a shipped recipe, or a TOML file.
        method: Name of the method, for a recipe given by name.
        depths: Number of blocks of each tower of the backbone; those of ViT-B/16 where None, until
            `train` or `search` fits the recipe to the model that it is given.

    Raises:
        UserError: The name or a key is unknown (with the nearest), a value is wrong or not read
            beside the others, or the file is of another method than is asked for.
    """
    if depths is None:
        return replace(load_recipe(name, method, VIT_B_16), loaded=(str(name), method))
    if set(depths) != set(TOWERS):
        raise UserError("load_recipe: depths needs the blocks of vision and text, and of no other")
    path = Path(name)
    if path.suffix == ".toml":
        values = _files_beside(path.parent, read_toml(path, "the recipe"))
        own = METHODS.config(str(values.pop("method", method))).name
        if method != DEFAULT_METHOD and METHODS.config(method).name != own:
            raise UserError(f"{path} is a recipe of {own}, not of {method}; name one of the two")
        start = METHODS.config(own).published(depths)
        return _recipe(path.stem, start, values, _shipped(own, depths), str(path))
    shipped = _shipped(method, depths)
    check_one_of(f"recipe of {method}", str(name), shipped)
    start = METHODS.config(method).published(depths)
    return _recipe(str(name), start, shipped[str(name)], shipped, f"{method}.toml")


def _files_beside(base: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe whose settings name files from the recipe's folder where they lie there."""
    found = dict(values)
    if isinstance(own := values.get("settings"), Mapping):
        found["settings"] = files_beside(base, own)
    if isinstance(datasets := values.get("datasets"), Mapping):
        found["datasets"] = {
            name: _files_beside(base, one) if isinstance(one, Mapping) else one
            for name, one in datasets.items()
        }
    return found


def _shipped(method: str, depths: Mapping[str, int] = VIT_B_16) -> dict[str, Any]:
    """Return the shipped recipes of a method, their blocks scaled to a backbone's depths."""
    config = METHODS.config(method)
    path = SHIPPED / f"{config.name}.toml"
    recipes = read_toml(path, "the recipe") if path.exists() else {"published": {}}
    for settings in (one.get("settings", {}) for one in recipes.values()):
        for tower in settings.keys() & TOWERS:
            settings[tower] = config.scaled(settings[tower], tower, depths)
    return recipes


def _recipe(
    name: str,
    start: MethodConfig,
    values: Mapping[str, Any],
    shipped: Mapping[str, Any],
    where: str,
) -> Recipe:
    """Return a recipe whose method has the settings of `start` where it says nothing else."""
    values = dict(values)
    datasets = values.get("datasets", {})
    tables = {name: values.get(name, {}) for name in ("settings", "savings")}
    tables["datasets"] = datasets
    if isinstance(datasets, Mapping):
        tables |= {f"datasets.{key}": one for key, one in datasets.items()}
    for key, one in tables.items():
        if not isinstance(one, Mapping):
            raise UserError(f"{where}: {key} holds keys with values, as a table, not {one!r}")
    base = values.pop("extends", None)
    if base is not None:
        check_one_of(f"recipe of {start.name}", base, shipped, where=where)
        parent = _recipe(base, start, shipped[base], shipped, where)
    else:
        parent = Recipe(name, TrainConfig(), start)
    settings = {**parent.method.to_dict(), **values.pop("settings", {})}
    savings, datasets = values.pop("savings", {}), values.pop("datasets", parent.datasets)
    source = values.pop("source", parent.source)
    known = [f.name for f in fields(TrainConfig) if f.name != "savings"]
    for key in values:
        check_one_of("key", key, known, where=where)
    for key in (key for one in datasets.values() for key in one):
        check_one_of("key", key, [*known, "settings"], where=where)
    for key in savings:
        check_one_of("saving", key, [f.name for f in fields(Savings)], where=where)
    try:
        train = replace(parent.train, **values, savings=replace(parent.train.savings, **savings))
        config = start.from_dict(settings)
        made = Recipe(name, train, config, source, datasets)
        made.refuse_unread(values)
        # Tried at once: a wrong value of one dataset would else show after others have trained.
        for dataset, own in datasets.items():
            theirs = Recipe(name, made.train_for(dataset), made.method_for(dataset))
            if datasets is not parent.datasets:  # what is inherited is nobody's mistake
                theirs.refuse_unread(own, f" of {dataset}")
            # One placement for all: tables name it, and what is averaged over datasets shares it.
            if blocks := [tower for tower in own.get("settings", {}) if tower in TOWERS]:
                raise UserError(
                    f"the settings of {dataset} name {blocks[0]} blocks, and a recipe acts at the "
                    f"same ones on every dataset; train {dataset} by a recipe of its own"
                )
        return made
    except TypeError as error:
        raise UserError(f"{where}: a value has the wrong type: {error}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
