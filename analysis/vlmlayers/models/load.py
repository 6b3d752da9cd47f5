"""Load a model with its preprocessing, tokenizer, towers and a hash of its weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import nn

from vlmlayers.architectures import (
    CONFIG_FILE,
    LOCAL,
    MINIATURES,
    check_architecture,
    miniature_of,
    refuse_quickgelu_mismatch,
    tags_of,
    title_of,
    weights_of,
)
from vlmlayers.arguments import Count, Takes, checked
from vlmlayers.errors import UserError, check_one_of, first_cause, one_line
from vlmlayers.files import HUB, hub_folder
from vlmlayers.models.build import ImageSize, build_clip, quiet, read_config
from vlmlayers.models.checkpoints import Checkpoint, load_checkpoint, read_checkpoint
from vlmlayers.models.companions import companions_of
from vlmlayers.models.devices import memory_errors, resolve_device
from vlmlayers.models.folders import is_model_folder, load_folder
from vlmlayers.models.modes import on_cpu
from vlmlayers.models.preprocessing import check_settings, of_file, of_tag
from vlmlayers.models.recording import probe
from vlmlayers.models.tokenizers import make_tokenizer
from vlmlayers.models.vlm import VLM, untrained
from vlmlayers.models.wrappers import unwrapped
from vlmlayers.progress import say

LOG = logging.getLogger(__name__)
WEIGHT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MINI_FOLDER = MINIATURES["mini-clip"]  # by this name scripts know it


def list_models() -> list[str]:
    """Return the architecture names that `load_model` knows."""
    return [*open_clip.list_models(), *MINIATURES]


AnyModel = Annotated[
    str | Path | nn.Module | tuple[Any, ...],
    Takes("a model's name, folder, or a model itself", "models"),
]


@torch.inference_mode(False)  # weights made in it can never be trained, nor changed outside it
@on_cpu()
@checked
def load_model(
    name: AnyModel,
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
    """Load a model by architecture and tag, from files or the hub's cache, or with random weights.

    Where weights are given as a file, preprocessing and activation are those that all tags of the
    architecture agree on; where they differ, `like` or explicit values have to say.

    Args:
        name: open_clip architecture; "mini-clip" or "mini-clip-taught", which ship with the
            package; "local" with `config` and a file of weights; a folder that holds weights and
            `open_clip_config.json`, or the `config.json` of transformers or timm;
            "hf-hub:organisation/name" for such a folder of the hub, read from its cache; or what
            `wrap_model` takes, by itself.
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
    check_one_of("precision", precision, WEIGHT_TYPES)
    how = {
        "pretrained": pretrained, "config": config, "checkpoint": checkpoint, "like": like,
        "mean": mean, "std": std, "interpolation": interpolation, "resize_mode": resize_mode,
        "image_size": image_size,
    }  # fmt: skip
    if not isinstance(name, str | Path):
        placed = {"random_weights": random_weights or None,
                  "device": None if device == "cpu" else device,
                  "precision": None if precision == "fp32" else precision}  # fmt: skip
        _refuse_options({**how, **placed}, "a model in memory is taken as it is; see wrap_model")
        return wrap_model(name)
    folder, title = _folder(str(name))
    if folder is not None and not (folder / CONFIG_FILE).is_file() and is_model_folder(folder):
        _refuse_options(how, f"{title} says itself how it is built and its images are prepared")
        return _load_folder(folder, title, random_weights, device, precision)
    source = _source(str(name), config, folder, title)
    given = check_settings(
        {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": resize_mode},
        "the model",
    )
    shipped = source.folder if source.shipped else None
    tag, file = weights_of(
        source.name, source.tags, shipped, pretrained, checkpoint, random_weights
    )
    if like is not None and (file is None or not source.tags):
        raise UserError(
            f"like={like!r} (--like) says what a file of weights of an architecture with tags was "
            f"trained like; {f'{source.name} has no tags' if file else 'this is not a file'}"
        )
    # Before the model is built: a file that cannot be read shows at once.
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
    if file is not None:
        _tell_untrained(model)
    # A model as published computes; one that was changed may fail in its first pass only.
    if precision != "fp32" or size is not None:
        _refuse_impossible(model, size)
    return model


@on_cpu()
@checked
def wrap_model(
    clip: nn.Module | tuple[Any, ...],
    preprocess: Callable[..., Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    weights: str = "in memory",
    preprocess_train: Callable[..., Any] | None = None,
    random_weights: bool = False,
) -> VLM:
    """Make a `VLM` of a model that is already in memory; the model stays as it is.

    Args:
        clip: A model of open_clip, a `CLIPModel`, `SiglipModel`, `Siglip2Model` or their like of
            transformers, an image model of timm, transformers or DINO; or what
            `open_clip.create_model_and_transforms` returns, the model and its transforms; or
            (model, evaluation transform, tokenizer). One inside `DataParallel`,
            `DistributedDataParallel`, `torch.compile` or a peft wrapper is taken out, which the
            log says.
        preprocess: Its evaluation transform, or an image processor of transformers for a model of
            transformers; that of its files or its family where None.
        tokenizer: Texts → token ids, (text, context), or a tokenizer of transformers; likewise.
        name: Architecture, for tables; what the model says of itself where None.
        weights: Where the weights came from, for tables.
        preprocess_train: Its training transform; `preprocess` where absent.
        random_weights: Whether the model is untrained. Where `weights` are not named, one
            counts as such of which a tower has all its norms as they were initialised.

    Raises:
        UserError: The module tree is unknown, or how its images are prepared.
    """
    if random_weights and weights not in ("in memory", "random"):
        # Tables tell untrained models by the name of their weights.
        raise UserError(
            f"weights={weights!r} says where weights came from, and random_weights=True that they "
            "are untrained; give one of them"
        )
    if isinstance(clip, tuple):
        parts = _triple(clip)
        clip, preprocess = parts[0], preprocess or parts[1]
        tokenizer, preprocess_train = tokenizer or parts[2], preprocess_train or parts[3]
    module = unwrapped(clip)
    found = companions_of(module, preprocess, tokenizer)
    model = VLM(
        module,
        found.preprocess,
        preprocess_train or found.preprocess_train or found.preprocess,
        found.tokenizer,
        name or found.name,
        "random" if random_weights and weights == "in memory" else weights,
        random_weights,
        preprocess_config=found.settings,
    )
    if model.weights == "in memory" and (fresh := _fresh_towers(model)):
        LOG.warning(
            "%s counts as untrained: all norms in the blocks of its %s tower are as they were "
            "initialised; if it is trained, give wrap_model(…, weights='where from')",
            model.name, fresh,
        )  # fmt: skip
        model.weights, model.random_weights = "random", True
    kinds = {kind: name for name, kind in WEIGHT_TYPES.items()}
    model.precision = kinds.get(model.input_dtype, "fp32")
    return model


def _triple(given: tuple[Any, ...]) -> tuple[nn.Module, Any, Any, Any]:
    """Return model, evaluation transform, tokenizer and training transform of a tuple of some."""
    if len(given) not in (2, 3) or not isinstance(given[0], nn.Module):
        raise UserError(
            "wrap_model takes a model, what open_clip.create_model_and_transforms returns, (model, "
            "training transform, evaluation transform), or (model, evaluation transform, "
            f"tokenizer); this is ({', '.join(type(part).__name__ for part in given)})"
        )
    # Those of open_clip have the one, those of transformers the other; no transform has either.
    if len(given) == 3 and (hasattr(given[2], "context_length") or hasattr(given[2], "encode")):
        return (*given, None)
    return given[0], given[-1], None, given[1] if len(given) == 3 else None


def _refuse_options(given: Mapping[str, Any], reason: str) -> None:
    for key, value in given.items():
        if value is not None:
            raise UserError(f"load_model: {key} does not apply, {reason}")


def _load_folder(
    folder: Path, title: str, random_weights: bool, device: str | torch.device, precision: str
) -> VLM:
    """Return the model of a folder of transformers or timm."""
    module, weights = load_folder(folder, random_weights)
    place = resolve_device(device)
    with memory_errors(place, "the weights do not fit; use another device or a smaller model"):
        module = module.to(place, WEIGHT_TYPES[precision]).requires_grad_(False)
    found = companions_of(module, folder=folder)
    model = VLM(
        module,
        found.preprocess,
        found.preprocess_train or found.preprocess,
        found.tokenizer,
        title,
        weights,
        random_weights,
        precision,
        preprocess_config=found.settings,
    )
    if not random_weights:
        _tell_untrained(model)
    _refuse_impossible(model, None)
    return model


def _fresh_towers(model: VLM) -> str:
    return " and its ".join(name for name, tower in model.towers.items() if untrained(tower.blocks))


def _tell_untrained(model: VLM) -> None:
    """Warn of a file of weights that was saved before training."""
    if fresh := _fresh_towers(model):
        LOG.warning(
            "%s: all norms in the blocks of its %s tower are as they were initialised, so %s seems "
            "to hold weights that nobody trained",
            model.name, fresh, model.weights,
        )  # fmt: skip


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


def _folder(name: str) -> tuple[Path | None, str]:
    """Return the folder that a name stands for, and its title; None where it stands for another."""
    if name.startswith(HUB):
        return hub_folder(name.removeprefix(HUB)), name.removeprefix(HUB)
    if name in MINIATURES:
        return None, name  # also where a folder of that name is here: ./mini-clip says that
    folder = Path(name).expanduser()
    there = (folder / CONFIG_FILE).is_file() or is_model_folder(folder)
    return (folder, miniature_of(name) or title_of(folder)) if there else (None, name)


def _source(name: str, config: str | Path | None, folder: Path | None, title: str) -> _Source:
    if config is not None and name != LOCAL:
        raise UserError(
            f"config={str(config)!r} goes with model 'local' only; {name} has a configuration of "
            "its own"
        )
    if folder is not None:
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(
                f"{title} holds neither {CONFIG_FILE} nor config.json: it is not a model"
            )
        return _Source(title, *_read(folder / CONFIG_FILE), folder, shipped=True)
    if name == LOCAL:
        if config is None:
            raise UserError("model 'local' needs config=, the path of an open_clip_config.json")
        path = Path(config).expanduser()
        return _Source(title_of(path.parent), *_read(path), path.parent)
    if name in MINIATURES:
        folder = MINIATURES[name]
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(f"{name} is not part of this installation: {folder} is missing")
        return _Source(name, *_read(folder / CONFIG_FILE), folder, shipped=True)
    check_architecture(name)
    return _Source(name, open_clip.get_model_config(name), {})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config, preprocess = read_config(path)
    return config, check_settings(preprocess, str(path))


def _sides(image_size: int | Sequence[int] | None) -> ImageSize | None:
    if not isinstance(image_size, Sequence):
        return image_size
    if len(image_size) != 2:
        raise UserError(f"image_size {image_size} is not one side, or height and width")
    return image_size[0], image_size[1]


def _known(
    source: _Source, tag: str | None, weights: Checkpoint | None, like: str | None, stated: set[str]
) -> Mapping[str, Any]:
    """Return what is known of preprocessing, after the activation was compared."""
    if tag is not None:
        found = of_tag(source.name, tag)
        refuse_quickgelu_mismatch(source.name, tag, source.config, found)
        return found
    # OpenAI trained with QuickGELU, and its files are the ones that show who made them.
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
        # Tuples become the lists that a stored identity is read back with.
        preprocess_config=json.loads(json.dumps(asdict(transform))),
    )


def _refuse_impossible(model: VLM, image_size: ImageSize | None) -> None:
    """Refuse a precision or an image size that the model cannot compute with on its device."""
    advice = "the model leaves too little; use another device or a smaller model"
    try:
        with memory_errors(model.device, advice):
            for tower in model.towers.values():
                probe(tower)
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "" if image_size is None else f" with image_size={image_size}"
        raise UserError(
            f"{model.name} cannot compute in {model.precision} on {model.device}{size} "
            f"({one_line(error)}); " + ("take another size" if size else "load it in fp32")
        ) from error


def _download(name: str, tag: str) -> str:
    # Offline the hub is tried for most of a minute, for what its cache holds too.
    say(f"fetching weights {tag!r} of {name} from the cache or the hub")
    try:
        with quiet("huggingface_hub"):  # it warns of each retry, a dozen lines before what counts
            return str(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag)))
    # The hub's client and its network libraries share no base of their errors.
    except Exception as error:
        raise UserError(
            f"weights {tag!r} of {name} are not on this machine and cannot be downloaded "
            f"({one_line(first_cause(error))}); give a local file (--pretrained FILE, "
            "checkpoint=), or random_weights=True"
        ) from error
