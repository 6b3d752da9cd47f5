"""Load an open_clip model with its preprocessing, tokenizer, towers and a hash of its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import nn

from vlmlayers.arguments import PRECISIONS, Count, checked
from vlmlayers.errors import UserError, check_one_of, one_line
from vlmlayers.files import WEIGHT_SUFFIXES, find_weights
from vlmlayers.models.build import ImageSize, build_clip, read_config
from vlmlayers.models.checkpoints import Checkpoint, load_checkpoint, read_checkpoint
from vlmlayers.models.preprocessing import (
    check_settings,
    of_file,
    of_tag,
    refuse_quickgelu_mismatch,
    tags_of,
)
from vlmlayers.models.recording import probe
from vlmlayers.models.tokenizers import make_tokenizer
from vlmlayers.models.vlm import VLM

MINI = "mini-clip"
LOCAL = "local"
CONFIG_FILE = "open_clip_config.json"
MINI_FOLDER = Path(__file__).parent / "mini_clip"


def list_models() -> list[str]:
    """Return the architecture names that `load_model` knows."""
    return [*open_clip.list_models(), MINI]


@checked
def load_model(
    name: str | Path,
    pretrained: str | Path | None = None,
    *,
    config: str | Path | None = None,
    checkpoint: str | Path | None = None,
    random_weights: bool = False,
    like: str | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    interpolation: str | None = None,
    resize_mode: str | None = None,
    image_size: Count | Sequence[Count] | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> VLM:
    """Load a model by architecture and tag, from a local checkpoint, or with random weights.

    Where weights are given as a file, preprocessing and activation are those that all tags of the
    architecture agree on; where they differ, `like` or explicit values have to say.

    Args:
        name: open_clip architecture; "mini-clip" (ships with the package); "local" with `config`
            and a file of weights; or a folder that holds `open_clip_config.json` and weights.
        pretrained: Tag of the hub, or a file of weights: safetensors, a torch file of tensors
            alone, or a TorchScript archive as OpenAI ships it.
        config: open_clip configuration file for `name="local"`.
        checkpoint: A file of weights; the same as `pretrained`, where that is a file.
        random_weights: Build an untrained model; has to be asked for. Same values every time,
            global random state is left alone.
        like: Tag of the architecture that a file of weights was trained like.
        mean: Of the images' channels, one number or three; goes before what is known.
        std: Their standard deviations, likewise.
        interpolation: `bicubic` or `bilinear`, likewise.
        resize_mode: `shortest` (and crop), `longest` (and pad) or `squash`, likewise.
        image_size: Side, or height and width, of the images in place of the configuration's;
            position embeddings are resized.
        device: Where the model goes; `auto` takes a GPU where there is one.
        precision: Data type of the weights; `fp32` also when extraction uses autocast.

    Raises:
        UserError: Unknown name or tag (with the nearest), QuickGELU mismatch, no weights, weights
            that do not fit or would have to run code, an option that does not apply, or no network.
    """
    check_one_of("precision", precision, PRECISIONS[1:])
    source = _source(str(name), config)
    given = check_settings(
        {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": resize_mode},
        "the model",
    )
    tag, file = _weights(source, pretrained, checkpoint, random_weights)
    if like is not None and (file is None or not source.tags):
        raise UserError(
            f"like={like!r} (--like) says what a file of weights of an architecture with tags was "
            f"trained like; {'this is no file' if file is None else f'{source.name} has no tags'}"
        )
    weights = None if file is None else read_checkpoint(file)
    known = _known(source, tag, weights, like, set(given))
    if tag is not None:
        weights = read_checkpoint(Path(_download(source.name, tag)))
    size = _sides(image_size)
    clip = build_clip(source.config, precision=precision, device=device, image_size=size)
    if weights is not None:
        load_checkpoint(clip, weights)
    model = _assemble(
        clip.requires_grad_(False),
        source,
        {**known, **given},
        tag or ("random" if file is None else file.name),
        random_weights,
        precision,
    )
    if precision != "fp32" or size is not None:
        _refuse_impossible(model, size)
    return model


@checked
def wrap_model(
    clip: nn.Module,
    preprocess: Callable[..., Any],
    tokenizer: Callable[..., Any],
    *,
    name: str,
    weights: str,
    preprocess_train: Callable[..., Any] | None = None,
    random_weights: bool = False,
) -> VLM:
    """Make a `VLM` of a model that is already in memory; the model stays as it is.

    Args:
        clip: An open_clip model; one wrapped by `torch.compile` is unwrapped.
        preprocess: Its evaluation transform.
        tokenizer: Texts → token ids.
        name: Architecture, for tables.
        weights: Where the weights came from, for tables.
        preprocess_train: Its training transform; `preprocess` where absent.
        random_weights: Whether the model is untrained.
    """
    model = VLM(
        clip,
        preprocess,
        preprocess_train or preprocess,
        tokenizer,
        name,
        weights,
        random_weights,
        preprocess_config={"transform": re.sub(" at 0x[0-9a-f]+", "", str(preprocess))},
    )
    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    model.precision = kinds.get(model.input_dtype, "fp32")
    return model


@dataclass(frozen=True)
class _Source:
    """An architecture, by name or by the configuration in a file.

    Attributes:
        name: Name for tables and messages.
        config: open_clip's configuration.
        preprocess: What a configuration file states of preprocessing; empty for a name.
        folder: Folder of the configuration file, where its tokenizer lies; None for a name.
        shipped: Whether weights lie in the folder.
    """

    name: str
    config: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    folder: Path | None = None
    shipped: bool = False

    @property
    def tags(self) -> list[str]:
        """Tags of a named architecture."""
        return [] if self.folder is not None else tags_of(self.name)


def _source(name: str, config: str | Path | None) -> _Source:
    if config is not None and name != LOCAL:
        raise UserError(
            f"config={str(config)!r} goes with model 'local' only; {name} has a configuration of "
            "its own"
        )
    folder = Path(name).expanduser()
    if name == LOCAL:
        if config is None:
            raise UserError("model 'local' needs config=, the path of an open_clip_config.json")
        path = Path(config).expanduser()
        return _Source(path.absolute().parent.name, *_read(path), path.parent)
    if name == MINI:
        if not (MINI_FOLDER / CONFIG_FILE).is_file():
            raise UserError(f"{MINI} is not part of this installation: {MINI_FOLDER} is missing")
        return _Source(MINI, *_read(MINI_FOLDER / CONFIG_FILE), MINI_FOLDER, shipped=True)
    if (folder / CONFIG_FILE).is_file():
        return _Source(folder.name, *_read(folder / CONFIG_FILE), folder, shipped=True)
    known = [*list_models(), LOCAL]
    if name not in known and ("/" in name or folder.exists()):
        raise UserError(
            f"{name} is not a folder with {CONFIG_FILE} and model.safetensors; give such a folder, "
            "or the name of an open_clip architecture (`vlmlayers models` lists them)"
        )
    check_one_of("model", name, known)
    return _Source(name, open_clip.get_model_config(name), {})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config, preprocess = read_config(path)
    return config, check_settings(preprocess, str(path))


def _weights(
    source: _Source,
    pretrained: str | Path | None,
    checkpoint: str | Path | None,
    random_weights: bool,
) -> tuple[str | None, Path | None]:
    """Return tag or file of the weights; neither for random ones."""
    tags = source.tags
    if pretrained is not None and checkpoint is not None:
        raise UserError(
            f"both pretrained={str(pretrained)!r} and checkpoint={str(checkpoint)!r} name the "
            "weights; give one"
        )
    asked = pretrained if checkpoint is None else checkpoint
    if asked is None and not random_weights and source.shipped and source.folder is not None:
        return None, find_weights(source.folder)
    if (asked is not None) == random_weights:
        which = "a pretrained tag, a file of weights," if tags else "a file of weights"
        raise UserError(
            f"model {source.name} needs {which} or random_weights=True (--random-weights), and "
            "not both"
        )
    if asked is None:
        return None, None
    if asked == pretrained and str(asked) in tags:
        return str(asked), None
    file = Path(asked).expanduser()
    if file.is_file():
        return None, file
    if checkpoint is None and tags and file.suffix not in WEIGHT_SUFFIXES and len(file.parts) == 1:
        check_one_of("pretrained tag", str(asked), tags, where=f"model {source.name}")
    hint = "" if tags else f"; {source.name} has no tags, its weights are named by a file"
    raise UserError(f"checkpoint {asked} does not exist{hint}")


def _sides(image_size: int | Sequence[int] | None) -> ImageSize | None:
    if not isinstance(image_size, Sequence):
        return image_size
    if len(image_size) != 2:
        raise UserError(f"image_size {image_size} is not one side, or height and width")
    return image_size[0], image_size[1]


def _known(
    source: _Source,
    tag: str | None,
    weights: Checkpoint | None,
    like: str | None,
    stated: set[str],
) -> Mapping[str, Any]:
    """Return what is known of preprocessing, after the activation was compared."""
    if tag is not None:
        found = of_tag(source.name, tag)
        refuse_quickgelu_mismatch(source.name, tag, source.config, found)
        return found
    if weights is not None and weights.openai:
        openai = {"quick_gelu": True}
        refuse_quickgelu_mismatch(source.name, weights.path.name, source.config, openai)
    if weights is None or source.folder is not None:
        return source.preprocess
    return of_file(source.name, source.config, weights, like, stated)


def _assemble(
    clip: nn.Module,
    source: _Source,
    preprocess: Mapping[str, Any],
    weights: str,
    random_weights: bool,
    precision: str,
) -> VLM:
    settings = merge_preprocess_dict(asdict(PreprocessCfg()), dict(preprocess))
    settings["size"] = clip.visual.image_size  # type: ignore[union-attr]
    transform = PreprocessCfg(**settings)
    return VLM(
        clip,
        image_transform_v2(transform, is_train=False),
        image_transform_v2(transform, is_train=True),
        make_tokenizer(source.config.get("text_cfg", {}), source.folder),
        source.name,
        weights,
        random_weights,
        precision,
        preprocess_config=json.loads(json.dumps(asdict(transform))),
    )


def _refuse_impossible(model: VLM, image_size: ImageSize | None) -> None:
    """Refuse a precision or an image size that the model cannot compute with on its device."""
    try:
        for tower in model.towers.values():
            probe(tower)
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "" if image_size is None else f" with image_size={image_size}"
        raise UserError(
            f"{model.name} cannot compute in {model.precision} on {model.device}{size} "
            f"({one_line(error)}); " + ("take another size" if size else "load it in fp32")
        ) from error


def _download(name: str, tag: str) -> str:
    try:
        return str(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag)))
    except Exception as error:
        raise UserError(
            f"weights {tag!r} of {name} are not on this machine and cannot be downloaded "
            f"({one_line(error)}); give a local file (--pretrained FILE, checkpoint=), or "
            "random_weights=True"
        ) from error
