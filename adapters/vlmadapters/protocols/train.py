"""Training by a protocol in one call, as Python and notebooks start it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd

from vlmadapters.clip.towers import backbone_depths
from vlmadapters.methods.config import MethodConfig
from vlmadapters.protocols.experiment import Experiment
from vlmadapters.protocols.options import TrainOptions
from vlmadapters.training.recipes import (
    DEFAULT_METHOD,
    IN_RECIPE,
    Recipe,
    check_methods,
    default_recipe,
    load_recipe,
    settings_at,
)
from vlmlayers.arguments import Takes, checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.manifests import Manifest
from vlmlayers.models.load import VLM
from vlmlayers.options import takes, validated
from vlmlayers.placement import Placement
from vlmlayers.selection import LayerChoice

LOG = logging.getLogger(__name__)
Model = Annotated[VLM, Takes("a model, as `load_model` returns it")]


def _several(placements: Any) -> Any:
    """Return placements as several; one of both towers could pass for two things."""
    return [placements] if isinstance(placements, (Placement, Mapping)) else placements


Placements = Annotated[
    Sequence[Any] | None,
    Takes(
        "a placement such as '5-12' or 'v5-12,t7-12', or a choice", "placements", convert=_several
    ),
]
Datasets = Annotated[
    Sequence[str | Path | Manifest],
    Takes("a dataset's name, path or manifest", "datasets by name, path or manifest"),
]


Recipes = Annotated[
    Recipe | str | Path | Sequence[Recipe | str | Path],
    Takes("a recipe, its name or its path, or one of each method", "recipes"),
]


@takes(TrainOptions, IN_RECIPE)
@checked
def train(
    model: Model,
    datasets: Datasets,
    recipe: Recipes | None = None,
    out: str | Path | None = None,
    *,
    method: Sequence[str] = ("mma",),
    placement: Placements = None,
    configs: Sequence[MethodConfig | Recipe] | None = None,
    targets: Datasets = (),
    root: str | Path | None = None,
    split: str = "test",
    save_adapters: bool = False,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Train methods by a protocol and test them, beside zero-shot CLIP.

    Args:
        model: The model, as `load_model` returns it.
        datasets: Datasets trained on, each by itself.
        recipe: Recipe, or one of each method; or its name or TOML file, the same for every method;
            values are changed as in `load_recipe("mini").changed({"shots": 4})`;
            `default_recipe` where None.
        out: Folder of cells, adapters and tables; None keeps everything in memory. A stopped run
            resumes there.
        method: Name of the method, or several; `METHODS` lists them.
        placement: Blocks where it acts, such as `5-12` or `v5-12,t7-12`, with an amount as in
            `5-12@scale=0.3,epochs=15`, or `maple:1-9` for one of several methods, or a layer
            choice; several train side by side. The recipe's own where None.
        configs: Settings of each method to train, or recipes with them, in place of `method` and
            `placement`.
        targets: Datasets tested by transfer.
        root: The data root.
        split: Split that is tested, `test` or `val`; the others hold what is trained on.
        save_adapters: Write what was trained beside the cells of `out`.
        progress: Show bars.
        **options: Those of `TrainOptions`.

    Returns:
        The results table: one row per method, placement, dataset, half and seed.

    Raises:
        UserError: A name is unknown, an argument does not apply, or the data are not there.
    """
    asked = validated(TrainOptions, options, "train")
    if isinstance(recipe, Recipe | str | Path):
        recipe = [recipe]
    if split in ("train", "all"):
        raise UserError(
            f"split {split!r} holds the images that are trained on; test on 'test' or 'val'"
        )
    check_one_of("split", split, ("test", "val"))
    given = {
        "dataset": datasets, "seed": asked.seeds, "method": method, "placement": placement,
        "setting in configs": configs, "recipe": recipe,
    }  # fmt: skip
    for what, several in given.items():
        if several is not None and not several:
            raise UserError(f"there is no {what} to train; name one")
    if save_adapters and out is None:
        raise UserError("train saves adapters beside the cells in out; name it, or leave both out")
    recipes, depths = recipes_for(model, method, recipe or ()), backbone_depths(model.clip)
    settings: Sequence[MethodConfig | Recipe] | None = configs and [
        one.fitted(depths) if isinstance(one, Recipe) else one for one in configs
    ]
    if configs is None and placement is not None:
        settings = settings_at(recipes, placement)
    elif placement is not None:
        raise UserError("train takes either configs or placement, not both")
    if configs is not None and list(method) != [DEFAULT_METHOD]:
        raise UserError("train takes either configs or method, not both")
    for one in placement or ():
        tell_of_choice(one, model, [*datasets, *targets], split)
    experiment = Experiment(
        asked.protocol,
        model,
        recipes,
        out,
        root=root,
        targets=targets,
        split=split,
        options=asked,
        save_adapters=save_adapters,
        progress=progress,
    )
    return experiment.run(datasets, settings, asked.seeds, together=asked.together)


def tell_of_choice(
    choice: Any, model: VLM, datasets: Sequence[str | Path | Manifest], split: str = "test"
) -> str:
    """Warn where what is trained at is a choice, or its path, of another model or of test images.

    Returns:
        The warning of images that chose the layers and test them; empty where there are none.

    Raises:
        UserError: The choice was made in towers of another depth.
    """
    if isinstance(choice, Path):
        choice = LayerChoice.load(choice)
    if not isinstance(choice, LayerChoice):
        return ""
    choice.placed(backbone_depths(model.clip))
    if other := choice.of_another(model.name, model.weights, model.weights_hash):
        LOG.warning("the choice was made from scores %s, which is trained", other)
    given = (one if isinstance(one, Manifest) else Manifest.load(one) for one in datasets)
    seen = dict.fromkeys(one.name for one in given if choice.chosen_on(one.name, split))
    if not seen:
        return ""
    told = (
        f"the layers were chosen on {split} images of {', '.join(seen)}, which they are tested "
        "on here; choose them on others"
    )
    LOG.warning("%s", told)
    return told


def recipes_for(
    model: VLM, methods: Sequence[str], given: Sequence[Recipe | str | Path]
) -> list[Recipe]:
    """Return one recipe per method at a model's blocks: those given, or what a name stands for.

    Raises:
        UserError: A name is unknown, several are given, or recipes are of other methods.
    """
    depths = backbone_depths(model.clip)
    recipes = [one.fitted(depths) for one in given if isinstance(one, Recipe)]
    if given and len(recipes) == len(given):
        check_methods(recipes, methods)
        return recipes
    if len(given) > 1:
        raise UserError(
            "train takes one name of a recipe, or recipes as `load_recipe` returns them"
        )
    name = next((one for one in given if not isinstance(one, Recipe)), None)
    return [load_recipe(name or default_recipe(model.name, one), one, depths) for one in methods]


def base_to_novel(*args: Any, **options: Any) -> pd.DataFrame:
    """Train on half of the classes, test on both: `train` by that protocol.

    Scripts written for 0.1.0 call it, and `limit` what is called `items` now.
    """
    if "limit" in options and "items" not in options:
        options["items"] = options.pop("limit")
    return train(*args, protocol="base-to-novel", **options)
