"""What goes with a model in memory: preprocessing, tokenizer and name, as far as is known."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from vlmlayers.architectures import title_of
from vlmlayers.errors import UserError, one_line
from vlmlayers.files import hub_folder
from vlmlayers.models.folders import LOCALLY
from vlmlayers.models.tokenizers import HubTokenizer
from vlmlayers.models.transformers_towers import pack
from vlmlayers.models.vlm import made_by

LOG = logging.getLogger(__name__)
_OPENAI_TOKENS = 49408
_DRAWS = 8  # of a random transform: one that flips makes them all alike once in 128 times
# Processors of families whose settings follow from the model's where it came without its own.
_PROCESSORS = {"clip": "CLIP", "metaclip_2": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}


@dataclass(frozen=True)
class Companions:
    """What goes with a model.

    Attributes:
        preprocess: Evaluation transform, PIL image → what the model takes of one image.
        preprocess_train: Training transform, or None where none is known.
        tokenizer: Texts → token ids; None for an image model alone.
        settings: What the evaluation transform does, as JSON values.
        name: Name of the model for tables.
    """

    preprocess: Callable[[Any], Tensor]
    preprocess_train: Callable[[Any], Tensor] | None
    tokenizer: Callable[[list[str]], Tensor] | None
    settings: Mapping[str, Any]
    name: str


@dataclass(frozen=True)
class Processed:
    """An image processor of transformers as a transform of one image."""

    processor: Any

    def __call__(self, image: Any) -> Tensor:
        """Return the model's input for one image, without the axis of the batch."""
        found = self.processor(images=image, return_tensors="pt")
        packed: Tensor = pack(found) if "spatial_shapes" in found else found["pixel_values"]
        return packed[0]

    @property
    def settings(self) -> dict[str, Any]:
        """What it does, as JSON values."""
        return dict(json.loads(json.dumps(self.processor.to_dict(), default=str)))


@dataclass(frozen=True)
class Tokens:
    """A tokenizer of transformers that pads to the length that the model was trained with."""

    tokenizer: Any
    length: int

    def __call__(self, texts: list[str]) -> Tensor:
        """Return token ids, (text, context)."""
        found = self.tokenizer(
            list(texts),
            # SigLIP pools the last token, mostly padding: shorter padding gives other embeddings.
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return found["input_ids"]


@dataclass(frozen=True)
class Unknown:
    """A tokenizer that nobody named; a model without one can still be asked for its images."""

    name: str

    def __call__(self, texts: list[str]) -> Tensor:
        """Refuse.

        Raises:
            UserError: Says how to name one.
        """
        raise UserError(
            f"no tokenizer is known for {self.name}; put its files into the model's folder, give "
            "wrap_model(…, tokenizer=…), or look at its images alone: tower='vision'"
        )


def companions_of(
    model: nn.Module,
    preprocess: Callable[..., Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
    folder: Path | None = None,
) -> Companions:
    """Return what goes with a model.

    Args:
        model: Of open_clip, transformers, timm, or another image model.
        preprocess: Its evaluation transform, where it is known.
        tokenizer: Its tokenizer, where it is known.
        folder: Where its files are; a model of transformers says itself where it came from.

    Raises:
        UserError: No preprocessing is known.
    """
    kind = type(model).__name__
    if hasattr(model, "config") and hasattr(model, "name_or_path"):
        return _of_transformers(model, preprocess, tokenizer, folder)
    if preprocess is None and getattr(model, "pretrained_cfg", None):
        return _of_timm(model, tokenizer)
    if preprocess is None:
        raise UserError(
            f"how images are prepared for this {kind} is not known; give preprocess=, or what "
            "open_clip.create_model_and_transforms returns"
        )
    if tokenizer is None and hasattr(model, "encode_text"):
        tokenizer = _of_open_clip(model)
    return Companions(preprocess, None, tokenizer, described(preprocess), kind)


def described(transform: Callable[..., Any]) -> dict[str, Any]:
    """Return what a transform does, as JSON values: its text, and a hash of what it makes.

    The text is without where it lies in memory. It says nothing of what is inside a function, as
    the hash does: of what the transform makes of one image, which is drawn by code.

    Raises:
        UserError: It makes another one each time.
    """
    made, *again = (made_by(transform, seed) for seed in range(_DRAWS))
    if set(again) != {made}:
        raise UserError(
            "preprocess makes something else of the same image each time, as a training transform "
            "does; give the evaluation transform: of what open_clip.create_model_and_transforms "
            "returns, the last"
        )
    return {"transform": re.sub(" at 0x[0-9a-f]+", "", str(transform)), "makes": made}


def _of_open_clip(clip: Any) -> Callable[[list[str]], Tensor]:
    text = getattr(clip, "text", clip)
    if isinstance(text, HFTextEncoder):
        length = getattr(clip, "context_length", None) or open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH
        return HubTokenizer(text.config.name_or_path, length, None, {})
    # A model does not name its tokenizer; the size of OpenAI's vocabulary tells it.
    if getattr(text, "vocab_size", 0) == _OPENAI_TOKENS:
        return open_clip.SimpleTokenizer(context_length=text.context_length)
    return Unknown(type(clip).__name__)


def _of_timm(model: Any, tokenizer: Callable[..., Any] | None) -> Companions:
    from timm.data import create_transform, resolve_model_data_config

    settings = resolve_model_data_config(model)
    # The configuration is of the weights; a model that was built for another size takes that alone.
    side = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if side is not None:
        settings["input_size"] = (*settings["input_size"][:-2], *side)
    plain = {key: str(value) for key, value in settings.items()}
    name = model.pretrained_cfg.get("architecture") or type(model).__name__
    made = [create_transform(**settings, is_training=training) for training in (False, True)]
    return Companions(made[0], made[1], tokenizer, plain, name)


def _of_transformers(
    model: Any,
    preprocess: Callable[..., Any] | None,
    tokenizer: Callable[..., Any] | None,
    folder: Path | None,
) -> Companions:
    from transformers import AutoImageProcessor, AutoTokenizer

    source = folder or _source(model)
    name = source.name if source is not None and folder is not None else _name(model)
    if preprocess is None:
        processor = _read(AutoImageProcessor, source) or _processor(model, name)
        preprocess = Processed(processor)
    elif hasattr(preprocess, "to_dict") and hasattr(preprocess, "preprocess"):
        preprocess = Processed(preprocess)  # one of transformers
    settings = preprocess.settings if isinstance(preprocess, Processed) else described(preprocess)
    if tokenizer is None and hasattr(model, "text_model"):
        found = _read(AutoTokenizer, source)
        # transformers makes one of a few special tokens where the folder holds no vocabulary.
        files = () if found is None else found.vocab_files_names.values()
        bare = files and source and not any((source / file).is_file() for file in files)
        tokenizer = Unknown(name) if found is None or bare else _tokens(found, model, name)
    elif hasattr(tokenizer, "model_max_length") and hasattr(model, "text_model"):
        tokenizer = _tokens(tokenizer, model, name)  # one of transformers, too
    return Companions(preprocess, None, tokenizer, settings, name)


def _tokens(tokenizer: Any, model: Any, name: str) -> Tokens:
    text = model.text_model.config
    # Ids beyond the embedding fail deep inside the model, and on a GPU without a clear message.
    if len(tokenizer) > text.vocab_size:
        raise UserError(
            f"the tokenizer of {name} has {len(tokenizer)} words, the model {text.vocab_size}; "
            "give wrap_model(…, tokenizer=…)"
        )
    return Tokens(tokenizer, text.max_position_embeddings)


def _name(model: Any) -> str:
    return title_of(Path(str(model.name_or_path or type(model).__name__)))


def _source(model: Any) -> Path | None:
    """Return the folder that a model of transformers was loaded from, where it is still there."""
    named = str(model.name_or_path or "")
    if not named:
        return None
    if Path(named).is_dir():
        return Path(named)
    try:
        return hub_folder(named)
    except UserError:
        return None


def _read(kind: Any, folder: Path | None) -> Any:
    """Return a processor or tokenizer of a folder, None where it holds none."""
    if folder is None:
        return None
    try:
        return kind.from_pretrained(folder, **LOCALLY)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        LOG.info("%s: no %s (%s)", folder, kind.__name__, one_line(error))
        return None


def _processor(model: Any, name: str) -> Any:
    """Return the image processor of a model's family at the size that its configuration names.

    Raises:
        UserError: The family is none whose processor is known.
    """
    import transformers

    family = _PROCESSORS.get(model.config.model_type)
    if family is None:
        raise UserError(
            f"no image processor came with {name} and none is known for {model.config.model_type}; "
            "give wrap_model(…, preprocess=…)"
        )
    settings = model.config.vision_config
    side = getattr(settings, "image_size", 0)
    square = {"height": side, "width": side}
    options: dict[str, dict[str, Any]] = {
        "CLIP": {"size": {"shortest_edge": side}, "crop_size": square},
        "Siglip": {"size": square},
        "Siglip2": {
            "patch_size": settings.patch_size,
            "max_num_patches": getattr(settings, "num_patches", 0),
        },
    }
    LOG.warning("%s came without an image processor: prepared as %s does", name, family)
    return getattr(transformers, f"{family}ImageProcessor")(**options[family])
