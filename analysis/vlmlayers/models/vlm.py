"""A loaded model: the open_clip module, its preprocessing, tokenizer, towers and hash."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from html import escape
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlmlayers.arguments import Takes
from vlmlayers.errors import UserError, one_line
from vlmlayers.files import checksum
from vlmlayers.models.modes import seeded
from vlmlayers.models.tokenizers import tokens_mark
from vlmlayers.models.tower import Towers
from vlmlayers.models.towers import find_towers
from vlmlayers.models.wrappers import unwrapped
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class VLM:
    """A loaded model and what is needed to feed it.

    Attributes:
        clip: The model, of open_clip, transformers or an image model alone. That of `load_model` is
            in eval mode and without gradients; one that was wrapped is as its owner left it, and
            every pass restores that.
        preprocess: Evaluation transform, PIL image → (3, height, width), or what the model takes.
        preprocess_train: Training transform.
        tokenizer: Texts → (text, context) token ids; None for an image model alone.
        name: Architecture, as asked for.
        weights: Pretrained tag, checkpoint file name, or `random`.
        random_weights: Whether nothing was loaded.
        precision: Data type of the weights.
        preprocess_config: What the evaluation transform does; part of the cache's identity.
        preprocess_makes: What this transform makes of one image, by its hash; looked at where None.
            Another transform put in its place is known by it.
        towers: `{"vision": Tower, "text": Tower}`; an image model alone has no text tower.
        adapter_hash: Hash of an adapter that is attached permanently; part of `weights_hash`.
        trained_on: The dataset that this adapter was trained on, as far as it says.
    """

    clip: nn.Module
    preprocess: Callable[[Any], Tensor]
    preprocess_train: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor] | None
    name: str
    weights: str
    random_weights: bool = False
    precision: str = "fp32"
    preprocess_config: Mapping[str, Any] = field(default_factory=dict)
    preprocess_makes: str | None = field(default=None, repr=False)
    towers: Towers = field(init=False)
    adapter_hash: str = field(default="", init=False)
    trained_on: str = field(default="", init=False)
    _hash: tuple[Any, str] | None = field(default=None, init=False, repr=False)
    _held: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.clip = unwrapped(self.clip)
        self.towers = Towers(find_towers(self.clip))
        if self.preprocess_makes is None:
            self.preprocess_makes = made_by(self.preprocess)

    @property
    def device(self) -> torch.device:
        """Device that the weights are on."""
        return next(self.clip.parameters()).device

    @property
    def input_dtype(self) -> torch.dtype:
        """Data type of the images that the model takes."""
        return self.towers["vision"].example(0).dtype

    @property
    def image_size(self) -> int:
        """Longer side of the input image in pixels."""
        tower = self.towers["vision"]
        return tower.image_size or max(tower.example(0).shape[2:])

    @property
    def weights_hash(self) -> str:
        """SHA-256 over names, types, shapes and bytes of all weights.

        Computed once, and again after weights were changed in place or replaced.
        """
        state = self.clip.state_dict()
        stamp = _stamp(state)
        if self._hash is None or self._hash[0] != stamp:
            self._hash = (stamp, hash_weights(state))
        if self.adapter_hash:
            return checksum(f"{self._hash[1]} {self.adapter_hash}")
        return self._hash[1]

    def identity(self) -> dict[str, Any]:
        """Return all of the model that values depend on, for keys and provenance, as JSON values.

        What a pass computes in, its precision, is added where the pass is made. Every pass is
        made in eval mode, however the model was left.
        """
        return {
            "model": self.name,
            "weights": self.weights,
            "weights_hash": self.weights_hash,
            "structure": structure_of(self.clip),
            "weights_precision": self.precision,
            "preprocessing": self.preprocessing,
            "device": self.device.type,
            "mode": "eval",
        }

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to images, and what that makes of one where `preprocess` was replaced."""
        made = made_by(self.preprocess)
        replaced = {} if made == self.preprocess_makes else {"makes": made}
        return {**self.preprocess_config, **replaced}

    def tokenize(self, texts: list[str]) -> Tensor:
        """Return the token ids of texts, (text, context).

        Raises:
            UserError: The model has no tokenizer, or that gives what the text tower does not take.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer; give wrap_model(…, tokenizer=…)")
        ids: Any = self.tokenizer(texts)
        whole = isinstance(ids, Tensor) and not ids.is_floating_point()
        if not whole or ids.ndim != 2 or len(ids) != len(texts):
            shape = f" of {ids.dtype}, {tuple(ids.shape)}," if isinstance(ids, Tensor) else ""
            raise UserError(
                f"the tokenizer of {self.name} makes a {type(ids).__name__}{shape} of "
                f"{counted(len(texts), 'text')}; it is to make a tensor of token ids, (text, "
                "context)" + (": its input_ids" if hasattr(ids, "input_ids") else "")
            )
        tower = self.towers["text"]
        tower.refuse_unknown_tokens(ids)
        if tower.causal and tower.ends is not None:
            # Of an empty text some tokenizers make nothing but its end.
            for text, end in zip(texts, tower.ends(ids).tolist()):
                if end == 0 and text.strip():
                    raise UserError(
                        f"no end of text is behind the first token of {text!r}, where {self.name} "
                        "would read it; give its own tokenizer, padding on the right"
                    )
        return ids

    def tokens_mark(self, texts: Sequence[str]) -> str:
        """Return what tells the token ids of texts from others; see the function of this name.

        The weights do not say by which vocabulary texts are read, and its files may be changed.

        Raises:
            UserError: The model has no tokenizer.
        """
        context = self.towers["text"].example(1).shape[1]
        return tokens_mark(self.tokenize, texts, context)

    def adapt(
        self, attached: AbstractContextManager[Any], words: str, digest: str, trained_on: str = ""
    ) -> None:
        """Attach an adapter for as long as this object lives, and say so in weights and hash.

        Args:
            attached: Context in which the adapter is attached.
            words: What it is, for the name of the weights; untrained weights keep theirs.
            digest: Hash of its parameters.
            trained_on: The dataset that it was trained on, as far as it says.
        """
        held = ExitStack()
        held.enter_context(attached)  # fails where an adapter is attached already
        self._held = held
        self.adapter_hash, self.trained_on = digest, trained_on
        self.weights = self.weights if self.random_weights else f"{self.weights} + {words}"

    def __repr__(self) -> str:
        parts = "; ".join(
            f"{name}: {tower.depth} {tower.kind} of width {tower.width}"
            for name, tower in self.towers.items()
        )
        return f"VLM({self.name}, weights={self.weights}, {parts}, {self.device})"

    def _repr_html_(self) -> str:
        title = escape(f"{self.name} [{self.weights}], {self.precision} on {self.device}")
        note = " <b>(random weights: untrained)</b>" if self.random_weights else ""
        return f"<p>{title}{note}</p>{self.towers._repr_html_()}"


LoadedModel = Annotated[VLM, Takes("a model, as `load_model` or `wrap_model` gives it", "models")]


# Settings of modules that change what equal weights compute.
_SETTINGS = (
    "num_heads", "heads", "eps", "approximate", "pool_type", "global_pool", "final_ln_after_pool",
    "text_pool_type", "eos_token_id",
)  # fmt: skip
# Not named, so that what was made before these were told stays good; OpenAI's end of text is 49407,
# which old files call 2.
_USUAL = {"text_pool_type": ("argmax",), "eos_token_id": (2, 49407)}
_IDLE = ("Identity", "Dropout", "PatchDropout", "DropPath")  # of no effect in eval mode
_NORMS = 3  # fewer say little
_PROBE = 96  # side of the image that a transform is known by
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


def structure_of(module: nn.Module) -> dict[str, list[str]]:
    """Return what a model computes with its weights, as far as modules tell, as JSON values.

    Activations, numbers of heads, the epsilon of norms, kinds of pooling, where a text ends,
    whether it sees what follows and the adapters of peft that act, by the first part of their
    modules' names. Models that differ in these alone have equal weights and other features.
    """
    found: dict[str, set[str]] = {}
    for path, part in module.named_modules():
        first, name = path.split(".")[0], type(part).__name__
        own = vars(part)
        told = {key: own[key] for key in _SETTINGS if key in own}
        told = {key: one for key, one in told.items() if one not in _USUAL.get(key, ())}
        if "eos" in (told.get("pool_type"), told.get("text_pool_type")):  # open_clip's
            told["end"] = own.get("eos_id", own.get("text_eos_id"))
        if "text_pool_type" in own and getattr(part, "attn_mask", 0) is None:  # of a plain CLIP
            told["causal"] = False
        if "pool_type" in own and hasattr(part, "attn_mask"):  # of a text tower of its own
            causal = part.attn_mask is not None
            if causal == (own["pool_type"] == "last"):  # where SigLIP, which sees all, ends
                told["causal"] = causal
        bare = not (any(True for _ in part.children()) or any(True for _ in part.parameters()))
        if bare and name not in _IDLE and not isinstance(part, _CONTAINERS):
            told["without weights"] = name
        if hasattr(part, "active_adapters") and hasattr(part, "disable_adapters"):
            told["adapters"] = _adapters(part)
        for key, value in told.items():
            if isinstance(value, str | int | float):
                found.setdefault(f"{first} {key}".strip(), set()).add(str(value))
    return {key: sorted(values) for key, values in sorted(found.items())}


def _adapters(part: Any) -> str:
    """Return which adapters of peft a layer adds, and by which factor: no weight tells of it."""
    if part.disable_adapters:
        return "none"
    scales = getattr(part, "scaling", {})
    return ", ".join(
        f"{name} merged" if name in getattr(part, "merged_adapters", ()) else
        f"{name} × {scales.get(name, 1)}"
        for name in part.active_adapters
    )  # fmt: skip


def shared_structure(*structures: Mapping[str, list[str]]) -> list[dict[str, list[str]]]:
    """Return structures as far as all of them name a setting, as versions of a library differ."""
    shared = set(structures[0]).intersection(*structures)
    return [{key: one[key] for key in sorted(shared)} for one in structures]


def untrained(blocks: Iterable[nn.Module]) -> bool:
    """Return whether all norms of a tower's blocks are as they were initialised.

    That is 1, or 0 as some last ones of a block, with biases of 0. Any training moves them, and a
    model of which nobody loaded the weights computes all the same.
    """
    own = (
        dict(part.named_parameters(recurse=False))
        for block in blocks
        for part in block.modules()
        if "Norm" in type(part).__name__
    )
    norms = [one for one in own if "weight" in one]
    return len(norms) >= _NORMS and not any(
        ((value != 0) & (value != float(name == "weight"))).any()
        for one in norms
        for name, value in one.items()
    )


def _stamp(state: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Return what changes with any value of a state dict, at a fraction of the cost of its hash.

    By values: tensors count their own changes in place, but not those through `.data`, by which
    weights are averaged and merged.
    """
    sums = [
        # The second sum tells rows that change places.
        torch.stack([bits.sum(), bits[::61].sum()]).cpu()
        for bits in map(_bits, state.values())
    ]
    shapes = tuple((key, value.dtype, tuple(value.shape)) for key, value in state.items())
    return shapes, tuple(torch.stack(sums).flatten().tolist()) if sums else ()


def _bits(value: Tensor) -> Tensor:
    """Return the bits of a tensor as whole numbers, the longest that its bytes make up."""
    flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = flat.nbytes, flat.storage_offset()
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return flat.view(next(kinds[n] for n in kinds if not any(size % n for size in whole)))


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over names, types, shapes and bytes of a state dict."""

    def parts() -> Iterator[str | memoryview]:
        # The order of a state dict says how a model was built, not what it computes.
        for key in sorted(state):
            value = state[key].detach().cpu().contiguous()
            yield f"{key} {value.dtype} {tuple(value.shape)}"
            # As bytes: numpy has no bfloat16, and a conversion would hash other values.
            yield value.reshape(-1).view(torch.uint8).numpy().data

    return checksum(parts())


def made_by(transform: Callable[..., Any], seed: int = 0) -> str:
    """Return a hash of what a transform makes of one image; empty where it takes none such."""
    pixels = np.random.default_rng(0).integers(0, 256, (_PROBE, _PROBE, 3), np.uint8)
    own = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        # A random one draws as the seed says, and moves no state of the caller's.
        with seeded(seed):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 from which transforms of others draw
            made = transform(Image.fromarray(pixels))
        if not isinstance(made, Tensor):
            return ""
        return hash_weights({"image": made})[:16]
    except Exception as error:  # noqa: BLE001 of the user's code, which may take other images
        LOG.info("what is made of an image is not part of the identity: %s", one_line(error))
        return ""
    finally:
        random.setstate(own[0])
        np.random.set_state(own[1])  # noqa: NPY002
