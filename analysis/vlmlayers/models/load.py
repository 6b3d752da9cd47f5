"""Load an open_clip model with its preprocessing, tokenizer, towers and a hash of its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import Tensor, nn

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.models.build import build_clip, one_line, read_config
from vlmlayers.models.checkpoints import load_checkpoint
from vlmlayers.models.tokenizers import make_tokenizer
from vlmlayers.models.towers import Tower, find_towers, unwrap_compiled

MINI = "mini-clip"
LOCAL = "local"
CONFIG_FILE = "open_clip_config.json"
MINI_FOLDER = Path(__file__).parent / "mini_clip"
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(eq=False)
class VLM:
    """A loaded model and what is needed to feed it.

    Attributes:
        clip: The open_clip model, in eval mode, without gradients.
        preprocess: Evaluation transform, PIL image → (3, height, width).
        preprocess_train: Training transform.
        tokenizer: Texts → (text, context) token ids.
        name: Architecture, as asked for.
        weights: Pretrained tag, checkpoint file name, or `random`.
        random_weights: Whether nothing was loaded.
        precision: Data type of the weights.
        preprocess_config: What the evaluation transform does; part of the cache's identity.
        towers: `{"vision": Tower, "text": Tower}`.
        adapter_hash: Hash of an adapter that is attached for good; part of `weights_hash`.
    """

    clip: nn.Module
    preprocess: Callable[[Any], Tensor]
    preprocess_train: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    name: str
    weights: str
    random_weights: bool = False
    precision: str = "fp32"
    preprocess_config: Mapping[str, Any] = field(default_factory=dict)
    towers: dict[str, Tower] = field(init=False)
    adapter_hash: str = field(default="", init=False)
    _hash: tuple[Any, str] | None = field(default=None, init=False, repr=False)
    _held: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.clip = unwrap_compiled(self.clip).eval().requires_grad_(False)
        self.towers = find_towers(self.clip)

    @property
    def device(self) -> torch.device:
        """Device that the weights are on."""
        return next(self.clip.parameters()).device

    @property
    def image_size(self) -> int:
        """Longer side of the input image in pixels."""
        size: Any = self.clip.visual.image_size  # type: ignore[union-attr]
        return int(size if isinstance(size, int) else max(size))

    @property
    def weights_hash(self) -> str:
        """SHA-256 over names, types, shapes and bytes of all weights.

        Computed once, and again after weights were changed in place or replaced.
        """
        state = self.clip.state_dict()
        stamp = tuple(
            (key, value.data_ptr(), 0 if value.is_inference() else value._version)
            for key, value in state.items()
        )
        if self._hash is None or self._hash[0] != stamp:
            self._hash = (stamp, hash_weights(state))
        if self.adapter_hash:
            return sha256(f"{self._hash[1]} {self.adapter_hash}".encode()).hexdigest()
        return self._hash[1]

    def adapt(self, attached: AbstractContextManager[Any], words: str, digest: str) -> None:
        """Attach an adapter for as long as this object lives, and say so in weights and hash.

        Args:
            attached: Context in which the adapter is attached.
            words: What it is, for the name of the weights; untrained weights keep theirs.
            digest: Hash of its parameters.
        """
        held = ExitStack()
        held.enter_context(attached)  # fails where an adapter is attached already
        self._held = held
        self.adapter_hash = digest
        self.weights = self.weights if self.random_weights else f"{self.weights} + {words}"

    def __repr__(self) -> str:
        vision, text = self.towers["vision"], self.towers["text"]
        return (
            f"VLM({self.name}, weights={self.weights}, vision: {vision.depth} {vision.kind} of "
            f"width {vision.width}, text: {text.depth} of width {text.width}, {self.device})"
        )


def list_models() -> list[str]:
    """Return the architecture names that `load_model` knows."""
    return [*open_clip.list_models(), MINI]


def load_model(
    name: str,
    pretrained: str | None = None,
    *,
    config: str | Path | None = None,
    checkpoint: str | Path | None = None,
    random_weights: bool = False,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> VLM:
    """Load a model by architecture and tag, from a local checkpoint, or with random weights.

    Args:
        name: open_clip architecture; "mini-clip" (ships with the package); "local" with `config`
            and `checkpoint`; or a folder that holds `open_clip_config.json` and
            `model.safetensors`.
        pretrained: Tag of the hub, or path of a checkpoint file.
        config: open_clip configuration file for `name="local"`.
        checkpoint: safetensors or `weights_only` file with the weights.
        random_weights: Build an untrained model; has to be asked for. Same values every time,
            global random state is left alone.
        device: Where the model goes.
        precision: Data type of the weights; `fp32` also when extraction uses autocast.

    Raises:
        UserError: Unknown name or tag (with the nearest), QuickGELU mismatch, no weights, a
            checkpoint that does not fit or is a pickle, or no network.
    """
    check_one_of("precision", precision, PRECISIONS)
    folder = Path(name)
    if name not in (MINI, LOCAL) and (folder / CONFIG_FILE).is_file():
        return _load_local(
            folder.name,
            folder / CONFIG_FILE,
            checkpoint or _weights_in(folder, random_weights),
            random_weights,
            device,
            precision,
        )
    if name == MINI:
        if not (MINI_FOLDER / CONFIG_FILE).is_file():
            raise UserError(f"{MINI} is not part of this installation: {MINI_FOLDER} is missing")
        return _load_local(
            MINI,
            MINI_FOLDER / CONFIG_FILE,
            checkpoint or _weights_in(MINI_FOLDER, random_weights),
            random_weights,
            device,
            precision,
        )
    if name == LOCAL:
        if config is None:
            raise UserError("model 'local' needs config=, the path of an open_clip_config.json")
        return _load_local(
            Path(config).parent.name, Path(config), checkpoint, random_weights, device, precision
        )
    known = [*list_models(), LOCAL]
    if name not in known and ("/" in str(name) or folder.exists()):
        raise UserError(
            f"{name} is not a folder with {CONFIG_FILE} and model.safetensors; give such a folder, "
            "or the name of an open_clip architecture (`vlmlayers models` lists them)"
        )
    check_one_of("model", name, known)
    return _load_known(name, pretrained, checkpoint, random_weights, device, precision)


def wrap_model(
    clip: nn.Module,
    preprocess: Any,
    tokenizer: Any,
    *,
    name: str,
    weights: str,
    preprocess_train: Any = None,
    random_weights: bool = False,
) -> VLM:
    """Make a `VLM` of a model that is already in memory.

    Args:
        clip: An open_clip model; one wrapped by `torch.compile` is unwrapped.
        preprocess: Its evaluation transform.
        tokenizer: Texts → token ids.
        name: Architecture, for tables.
        weights: Where the weights came from, for tables.
        preprocess_train: Its training transform; `preprocess` where absent.
        random_weights: Whether the model is untrained.
    """
    return VLM(
        clip,
        preprocess,
        preprocess_train or preprocess,
        tokenizer,
        name,
        weights,
        random_weights,
        preprocess_config={"transform": re.sub(" at 0x[0-9a-f]+", "", str(preprocess))},
    )


def _load_known(
    name: str,
    pretrained: str | None,
    checkpoint: str | Path | None,
    random_weights: bool,
    device: str | torch.device,
    precision: str,
) -> VLM:
    config = open_clip.get_model_config(name)
    tag: dict[str, Any] = {}
    if pretrained is not None and Path(pretrained).is_file():
        checkpoint, pretrained = pretrained, None
    if pretrained is not None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            check_one_of("pretrained tag", pretrained, tags, where=f"model {name}")
        tag = dict(open_clip.get_pretrained_cfg(name, pretrained))
        refuse_quickgelu_mismatch(name, pretrained, config, tag)
    if sum((pretrained is not None, checkpoint is not None, random_weights)) != 1:
        raise UserError(
            f"model {name} needs exactly one of a pretrained tag, a checkpoint file, or "
            "random_weights=True (--random-weights)"
        )
    path = _download(name, pretrained, tag) if pretrained is not None else checkpoint
    clip = build_clip(config, precision=precision, device=device)
    if path is not None:
        load_checkpoint(clip, Path(path))
    weights = pretrained or (Path(path).name if path is not None else "random")
    return _assemble(clip, config, tag, name, weights, random_weights, precision)


def _load_local(
    name: str,
    config_path: Path,
    checkpoint: str | Path | None,
    random_weights: bool,
    device: str | torch.device,
    precision: str,
) -> VLM:
    config, preprocess = read_config(config_path)
    if (checkpoint is not None) == random_weights:
        raise UserError(
            f"{config_path} needs either checkpoint=, a safetensors file, or random_weights=True"
        )
    clip = build_clip(config, precision=precision, device=device)
    if checkpoint is not None:
        load_checkpoint(clip, Path(checkpoint))
    weights = "random" if checkpoint is None else Path(checkpoint).name
    return _assemble(
        clip,
        config,
        preprocess,
        name,
        weights,
        random_weights,
        precision,
        folder=config_path.parent,
    )


def _assemble(
    clip: nn.Module,
    config: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    name: str,
    weights: str,
    random_weights: bool,
    precision: str,
    folder: Path | None = None,
) -> VLM:
    settings = merge_preprocess_dict(asdict(PreprocessCfg()), dict(preprocess))
    settings["size"] = clip.visual.image_size  # type: ignore[union-attr]
    transform = PreprocessCfg(**settings)
    return VLM(
        clip,
        image_transform_v2(transform, is_train=False),
        image_transform_v2(transform, is_train=True),
        make_tokenizer(config.get("text_cfg", {}), folder),
        name,
        weights,
        random_weights,
        precision,
        preprocess_config=json.loads(json.dumps(asdict(transform))),
    )


def refuse_quickgelu_mismatch(
    name: str, tag: str, config: Mapping[str, Any], tag_config: Mapping[str, Any]
) -> None:
    """Refuse weights trained with the other activation; open_clip only warns.

    Raises:
        UserError: Names the architecture that fits the tag.

    Reference:
        ImageNet zero-shot of OpenAI's ViT-B/16 falls from 68.3 to 64.4 with plain GELU.
    """
    model, trained = bool(config.get("quick_gelu")), bool(tag_config.get("quick_gelu"))
    if model == trained:
        return
    right = name.removesuffix("-quickgelu") if model else f"{name}-quickgelu"
    hint = f"use {right!r}" if right in open_clip.list_models() else "use another architecture"
    raise UserError(
        f"QuickGELU mismatch: weights {tag!r} were trained with "
        f"{'QuickGELU' if trained else 'GELU'}, model {name!r} has "
        f"{'QuickGELU' if model else 'GELU'}; {hint}"
    )


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over names, types, shapes and bytes of a state dict."""
    digest = sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights_in(folder: Path, random_weights: bool) -> Path | None:
    if random_weights:
        return None
    for file in ("model.safetensors", "open_clip_model.safetensors"):
        if (folder / file).is_file():
            return folder / file
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    raise UserError(f"{folder} holds no model.safetensors; name the file with checkpoint=")


def _download(name: str, tag: str | None, config: dict[str, Any]) -> str:
    try:
        return str(open_clip.download_pretrained(config))
    except Exception as error:
        raise UserError(
            f"weights {tag!r} of {name} are not on this machine and cannot be downloaded "
            f"({one_line(error)}); give checkpoint= a local file, or random_weights=True"
        ) from error
