"""Names of models, their tags and weights, known without importing torch or open_clip.

A misspelt name is reported at once, not after the seconds that these libraries take to import.
"""

from __future__ import annotations

import ast
import copy
import json
import runpy
import sys
from collections.abc import Mapping, Sequence
from filecmp import cmp
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmlayers.errors import UserError, check_one_of, looked_for, no_file, one_line
from vlmlayers.files import HUB, WEIGHT_SUFFIXES, find_weights

LOCAL = "local"
LOCAL_DIR = "local-dir:"  # before a folder, in names of open_clip
CONFIG_FILE = "open_clip_config.json"
FOREIGN_CONFIG = "config.json"  # of transformers or timm
# Keys of transformers' configurations: one of the first has what takes images; one of the others
# has a language model that reads them among its words, and so no text tower.
IMAGES = {"image_size", "patch_size", "num_channels", "vision_config", "image_config"}
AS_WORDS = {"image_token_id", "image_token_index"}
OF_PEFT = (
    "holds what peft trained beside a model, not the model; merge them, as in "
    "torch.save(peft_model.merge_and_unload().state_dict(), 'merged.pt'), and give that file"
)
WANTED = "choose a CLIP, a SigLIP or one of their like"
UNLIKE = (OSError, SyntaxError, ImportError, NameError, AttributeError, LookupError, TypeError)
_MODELS = Path(__file__).parent / "models"
# The models that ship with the package, and where.
MINIATURES = {"mini-clip": _MODELS / "mini_clip", "mini-clip-taught": _MODELS / "mini_clip_taught"}


def miniature_of(name: str) -> str:
    """Return which shipped model a name or folder stands for; empty where for none.

    A copy is the same model, wherever it lies: its configuration and weights are.
    """
    folder = Path(name).expanduser()
    for title, shipped in MINIATURES.items():
        pairs = [(folder / file, shipped / file) for file in (CONFIG_FILE, "model.safetensors")]
        if name == title or all(one.is_file() and cmp(one, ours, False) for one, ours in pairs):
            return title
    return ""


def title_of(folder: Path) -> str:
    """Return the name of a folder's model: its own, after its parent's if a shipped model has it.

    Recipes and tables know those that ship by their names.
    """
    place = folder.absolute()
    return f"{place.parent.name}/{place.name}" if place.name in MINIATURES else place.name


def architectures() -> list[str]:
    """Return the architectures of open_clip, those that were added at run time included."""
    if "open_clip" in sys.modules:  # paid for already, and it knows what was added since
        return list(import_module("open_clip").list_models())
    return list(configuration_files())


def configuration_files() -> dict[str, Path]:
    """Return the configuration file of each architecture that open_clip ships."""
    return {path.stem: path for path in sorted((_open_clip() / "model_configs").glob("*.json"))}


def known_depths(name: str) -> dict[str, int]:
    """Return how many blocks the towers of a model have, as far as open_clip's configuration says.

    Towers that timm or transformers make are left out, and so are all of a hub's models: only the
    loaded model tells.
    """
    folder = MINIATURES.get(name, Path(name).expanduser())
    file = folder / CONFIG_FILE
    if not file.is_file():
        file = configuration_files().get(name, file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        parts = content.get("model_cfg", content)
        towers = {"vision": parts["vision_cfg"], "text": parts["text_cfg"]}
        made = [key for key in towers if {"timm_model_name", "hf_model_name"} & {*towers[key]}]
        # Absent where it is open_clip's own default.
        depths = {key: tower.get("layers", 12) for key, tower in towers.items() if key not in made}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # loading says what it is
        return {}
    return {key: depth for key, depth in depths.items() if isinstance(depth, int)}


def read_foreign(folder: Path) -> dict[str, Any]:
    """Return the configuration of a model of transformers or timm.

    Raises:
        UserError: It is none, or tells that the model takes no images, or takes them as words.
    """
    file = folder / FOREIGN_CONFIG
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = found["architecture" if "architecture" in found else "model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} is not a configuration of transformers or timm: {one_line(error)}"
        ) from error
    why = ""
    if "vocab_size" in found and not IMAGES & {*found}:
        why = "takes no images"
    elif AS_WORDS & {*found}:
        why = "is a language model that reads images among its words"
    if why:
        raise UserError(f"{folder} ({kind}) {why}; {WANTED}")
    return found


def refuse_image_model(name: str) -> None:
    """Refuse an image model alone where classes are told by a text tower.

    What its configuration does not tell is told once it is loaded.

    Raises:
        UserError: It is one of timm, or one of transformers that takes images and no texts.
    """
    folder = Path(name).expanduser()
    if is_foreign_model(name):
        found = read_foreign(folder)
        if "architecture" in found or ("image_size" in found and "text_config" not in found):
            kind = found.get("architecture", found.get("model_type"))
            raise UserError(f"{folder} ({kind}) has no text tower; {WANTED}")


def is_model_folder(name: str) -> bool:
    """Return whether a name stands for a folder that holds a model; a run may lie in one of it."""
    files = (Path(name).expanduser() / file for file in (CONFIG_FILE, FOREIGN_CONFIG))
    return name not in (LOCAL, *MINIATURES) and any(file.is_file() for file in files)


def is_foreign_model(name: str) -> bool:
    """Return whether a name stands for a folder of transformers or timm."""
    folder = Path(name).expanduser()
    if name in (LOCAL, *MINIATURES) or name.startswith(HUB) or (folder / CONFIG_FILE).is_file():
        return False
    return (folder / FOREIGN_CONFIG).is_file()


def tags_of(architecture: str) -> list[str]:
    """Return the tags of an architecture; none where it is no name of open_clip."""
    if "open_clip" in sys.modules:
        return list(import_module("open_clip").list_pretrained_tags_by_model(architecture))
    return list(_tags().get(architecture, ()))


@cache
def _tags() -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return the tags of each architecture, and what open_clip says of the weights of each.

    Of the module that lists them only the tables are run: its imports take seconds.
    """
    folder = _open_clip()
    try:
        return _tables_alone(folder / "pretrained.py", folder / "constants.py")
    except UNLIKE:  # another open_clip, which keeps its tables in another way: it is asked itself
        open_clip = import_module("open_clip")
        return {
            name: {
                tag: open_clip.get_pretrained_cfg(name, tag)
                for tag in open_clip.list_pretrained_tags_by_model(name)
            }
            for name in open_clip.list_models()
        }


def _tables_alone(file: Path, constants: Path) -> dict[str, dict[str, Mapping[str, Any]]]:
    # The tables are built by assignments, loops and small helpers; without the imports above them
    # nothing of torch is needed.
    source = ast.parse(file.read_text(encoding="utf-8"))
    source.body = [
        part
        for part in source.body
        if isinstance(part, ast.Assign | ast.For | ast.Expr)
        or (isinstance(part, ast.FunctionDef) and part.name.startswith("_"))
    ]
    names: dict[str, Any] = {**runpy.run_path(str(constants)), "copy": copy}
    exec(compile(source, str(file), "exec"), names)
    return {name: dict(tags) for name, tags in names["_PRETRAINED"].items()}


def _open_clip() -> Path:
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise UserError("open_clip is not installed; pip install open_clip_torch")
    return Path(spec.origin).parent


def check_architecture(name: str) -> str:
    """Return a name that is an architecture of open_clip.

    Raises:
        UserError: It is none; the nearest one is named, or what a folder has to hold.
    """
    if not name.strip():
        raise UserError("the model has no name; name an architecture, a folder or hf-hub:…")
    known = [*architectures(), *MINIATURES, LOCAL]
    if name.startswith(LOCAL_DIR):
        raise UserError(f"{name}: name the folder alone, {name.removeprefix(LOCAL_DIR)}")
    if Path(name).suffix in WEIGHT_SUFFIXES and Path(name).expanduser().is_file():
        raise UserError(
            f"{name} is a file of weights, which goes beside its model: name the architecture or "
            f"the folder that it is of, and pretrained={name} (--pretrained {name})"
        )
    # OpenAI's own name of it, ViT-B/16 or ViT-L/14@336px, looks like a path.
    theirs = name.partition("@")[0].replace("/", "-") in known
    if name not in known and not theirs and ("/" in name or Path(name).expanduser().exists()):
        of_hub = f"{HUB}{name if name.count('/') == 1 else 'organisation/name'}"
        raise UserError(
            f"{name}{looked_for(name)} is not a folder with {CONFIG_FILE} (or {FOREIGN_CONFIG}) "
            f"and model.safetensors; give such a folder, {of_hub} for a model of the hub, or the "
            "name of an open_clip architecture (`vlmlayers models` lists them)"
        )
    return check_one_of("model", name, known)


def weights_of(
    name: str,
    tags: Sequence[str],
    shipped: Path | None,
    pretrained: str | Path | None,
    checkpoint: str | Path | None,
    random_weights: bool,
) -> tuple[str | None, Path | None]:
    """Return tag or file of the weights that a model gets; neither for random ones.

    Args:
        name: The model, for messages.
        tags: Tags of its architecture.
        shipped: Folder whose weights it takes where none are named.
        pretrained: Tag, or a file.
        checkpoint: File.
        random_weights: Whether random ones are asked for.

    Raises:
        UserError: None are named, or more than one; a tag is unknown, or a file is not there.
    """
    if pretrained is not None and checkpoint is not None:
        raise UserError(
            f"both pretrained={str(pretrained)!r} and checkpoint={str(checkpoint)!r} name the "
            "weights; give one"
        )
    asked = pretrained if checkpoint is None else checkpoint
    if asked is None and not random_weights and shipped is not None:
        return None, find_weights(shipped)
    if (asked is not None) == random_weights:
        which = "a pretrained tag, a file of weights," if tags else "a file of weights"
        raise UserError(
            f"model {name} needs {which} or random_weights=True (--random-weights), and not both"
        )
    if asked is None:
        return None, None
    if asked == pretrained and str(asked) in tags:
        return str(asked), None
    file = Path(asked).expanduser()
    if file.is_file():
        return None, file
    if checkpoint is None and tags and file.suffix not in WEIGHT_SUFFIXES and len(file.parts) == 1:
        check_one_of("pretrained tag", str(asked), tags, where=f"model {name}")
    if (file / "adapter_config.json").is_file():
        raise UserError(f"checkpoint {asked} {OF_PEFT}")
    hint = "" if tags else f"; {name} has no tags, its weights are named by a file"
    raise UserError(f"checkpoint {asked} {no_file(file)}{hint}")


def check_model(
    name: str,
    *,
    pretrained: str | None = None,
    config: str | None = None,
    checkpoint: str | None = None,
    random_weights: bool = False,
    like: str | None = None,
    **_: Any,
) -> None:
    """Check the arguments of `load_model` as far as names and files go; a hub's are not looked at.

    Raises:
        UserError: Name, tag or file is unknown, no weights are named, a tag was trained with the
            other activation, or a configuration of transformers is of another kind of model.
    """
    folder, tags = Path(name).expanduser(), []
    shipped = folder if (folder / CONFIG_FILE).is_file() else None
    if name == LOCAL:
        if config is None:
            raise UserError(f"model 'local' needs config=, the path of an {CONFIG_FILE}")
        if not Path(config).expanduser().is_file():
            raise UserError(f"config {config} does not exist{looked_for(config)}")
    elif name in MINIATURES:
        shipped = MINIATURES[name]
    elif name.startswith(HUB):
        return
    elif is_foreign_model(name):
        read_foreign(folder)
        if not random_weights:
            find_weights(folder)
        return
    elif shipped is None:
        tags = tags_of(check_architecture(name))
    tag, _file = weights_of(name, tags, shipped, pretrained, checkpoint, random_weights)
    trained = _tags().get(name, {}).get(tag or like or "")
    file = configuration_files().get(name)
    if trained is not None and file is not None:
        built = json.loads(file.read_text(encoding="utf-8"))
        refuse_quickgelu_mismatch(name, tag or like or "", built, trained)


def refuse_quickgelu_mismatch(
    name: str, weights: str, config: Mapping[str, Any], trained: Mapping[str, Any]
) -> None:
    """Refuse weights trained with the other activation; open_clip only warns.

    Args:
        name: Architecture.
        weights: Tag or file.
        config: Configuration of the architecture.
        trained: What is known of the weights.

    Raises:
        UserError: Names the architecture that fits the weights.

    Reference:
        ImageNet zero-shot of OpenAI's ViT-B/16 falls from 68.3 to 64.4 with plain GELU.
    """
    model, right = bool(config.get("quick_gelu")), bool(trained.get("quick_gelu"))
    if model == right:
        return
    other = name.removesuffix("-quickgelu") if model else f"{name}-quickgelu"
    known = architectures()
    hint = "use another architecture"
    if other in known:
        hint = f"use {other!r}"
    # A configuration of the user's own: there is no other name to advise.
    elif name not in known:
        hint = f"set quick_gelu to {str(right).lower()} in its configuration"
    raise UserError(
        f"QuickGELU mismatch: weights {weights!r} were trained with "
        f"{'QuickGELU' if right else 'GELU'}, model {name!r} has "
        f"{'QuickGELU' if model else 'GELU'}; {hint}"
    )
