"""From a choice to fine-tuning: the chosen blocks as modules, for peft, freezing and optimisers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlmlayers.arguments import taken
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.models.towers import find_towers
from vlmlayers.models.vlm import VLM
from vlmlayers.models.wrappers import unwrapped
from vlmlayers.placement import Placement, module_pattern
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)
_STATED = ("layers_to_transform", "layers_pattern")  # what the choice says by itself


def module_names(model: Any, placement: Placement) -> dict[str, tuple[str, ...]]:
    """Return the names of the chosen blocks in `model.named_modules()`, by tower.

    Errors are those of `LayerChoice.module_names`.
    """
    names = block_names(model)
    placement.check({tower: len(own) for tower, own in names.items()}, "the choice")
    return {t: tuple(own[b - 1] for b in placement.blocks(t)) for t, own in names.items()}


def block_names(model: Any) -> dict[str, tuple[str, ...]]:
    """Return the names of all blocks in `model.named_modules()`, by tower."""
    module = _module(model)
    # By identity: towers are found inside a wrapper, and names are those seen from outside. A block
    # that stands in several places has its first name, by which peft knows it too.
    names = {id(part): name for name, part in module.named_modules()}
    towers = find_towers(unwrapped(module, say=False))
    return {name: tuple(names[id(b)] for b in tower.blocks) for name, tower in towers.items()}


def lora_config(model: Any, placement: Placement, options: Mapping[str, Any]) -> Any:
    """Return peft's `LoraConfig` that reaches the chosen blocks; see `LayerChoice.to_peft`."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("to_peft needs peft: pip install 'vlm-layers[peft]'") from error
    known = [name for name in signature(LoraConfig).parameters if name not in _STATED]
    for name in options:
        check_one_of("option", name, known, where="LoraConfig with the layers of a choice")
    rank = options.get("r", 8)
    # peft looks at it later, and writes none of numpy's to its file.
    if not isinstance(rank, Integral) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"r is {rank!r}; the rank of LoRA is a whole number from 1")
    if options.get("bias") == "all":
        LOG.warning(
            "to_peft: bias='all' trains the biases of every block, those not chosen as well; "
            "'lora_only' keeps to the layers that LoRA acts on"
        )
    module = _module(model)
    chosen = {tower: blocks for tower, blocks in _chosen(module, placement).items() if blocks}
    _refuse_lora(chosen)
    special = _beyond_fused(options)
    layers = {tower: layers_of(blocks, bool(special)) for tower, blocks in chosen.items()}
    for tower, inside in layers.items():
        if not inside:
            raise UserError(
                f"the chosen {tower} blocks hold no linear layer and no attention, which LoRA acts "
                "on; train them whole by choice.freeze, or choose the other tower alone"
            )
    if options.get("target_modules") is not None:
        layers = _wanted(layers, options["target_modules"])
    _tell_fused(chosen, layers, special)
    acting = {name for inside in layers.values() for name in inside}
    _tell_shared(
        "to_peft", module, placement, lambda b: (p for n, p in b.named_modules() if n in acting)
    )
    # LoRA trains no norm, in the chosen blocks neither.
    _tell_averaging("to_peft", module, [])
    # A second adapter is added by names inside of what the first was put into.
    base: Any = getattr(module, "get_base_model", None) if hasattr(module, "peft_config") else None
    names = module_names(base() if base else module, placement)
    pattern = "|".join(module_pattern(names[tower], layers[tower]) for tower in chosen)
    if base:
        pattern = rf"(?:base_model\.model\.)?(?:{pattern})"
    try:
        return LoraConfig(**{**options, "r": int(rank), "target_modules": pattern})
    except (TypeError, ValueError) as error:
        raise UserError(f"peft refuses these options of LoraConfig: {error}") from error


def freeze(model: Any, placement: Placement) -> dict[str, int]:
    """Leave the chosen blocks alone trainable; see `LayerChoice.freeze`."""
    module = _module(model)
    chosen = _chosen(module, placement)
    # It would train what is under LoRA as well, and peft replaces that of fused attention by new
    # parameters whenever the model is looked through: an optimiser would keep the old ones.
    _refuse_lora(chosen)
    module.requires_grad_(False)
    weights = _weights(chosen)
    for own in weights.values():
        for weight in own:
            weight.requires_grad_(True)
    _tell_shared("freeze", module, placement, nn.Module.parameters)
    _tell_averaging("freeze", module, [block for blocks in chosen.values() for block in blocks])
    return {tower: sum(weight.numel() for weight in own) for tower, own in weights.items()}


def parameter_groups(
    model: Any, placement: Placement, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the trainable parameters of the chosen blocks; see `LayerChoice.parameter_groups`."""
    for name in ("name", "params"):
        if name in options:
            raise UserError(f"parameter_groups gives each group its {name}; leave {name} out")
    groups = []
    module = _module(model)
    for tower, own in _weights(_chosen(module, placement)).items():
        weights = [weight for weight in own if weight.requires_grad]
        matrices = [weight for weight in weights if weight.ndim > 1]
        rest = [weight for weight in weights if weight.ndim <= 1]
        # Norms and biases: decay would pull scales to 0 and does not regularise a product.
        plain = {**options, "weight_decay": 0.0}
        for name, params, given in ((tower, matrices, options), (f"{tower} 1d", rest, plain)):
            if params:
                groups.append({"name": name, "params": params, **given})
    if not groups:
        raise UserError(
            "no parameter of the chosen blocks is trainable; call choice.freeze(model) first, "
            "which leaves them alone trainable"
        )
    _tell_ungrouped(module, groups)
    return groups


def _weights(chosen: Mapping[str, Sequence[nn.Module]]) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each tower's blocks; one that blocks share stands once."""
    seen: set[int] = set()
    found: dict[str, list[nn.Parameter]] = {}
    for tower, blocks in chosen.items():
        own = {id(weight): weight for block in blocks for weight in block.parameters()}
        found[tower] = [weight for key, weight in own.items() if key not in seen]
        seen |= own.keys()
    return found


def _refuse_lora(chosen: Mapping[str, Sequence[nn.Module]]) -> None:
    for tower, blocks in chosen.items():
        if any("lora_A" in n.split(".") for block in blocks for n, _ in block.named_modules()):
            raise UserError(
                f"the chosen {tower} blocks have LoRA already, which is what trains in them; load "
                "the model afresh, or take it out by peft_model.unload()"
            )


def _tell_shared(
    by: str, module: nn.Module, placement: Placement, parts: Callable[[nn.Module], Iterable[Any]]
) -> None:
    """Warn of blocks that are not chosen and share parts, or weights, with those that are."""
    towers = find_towers(unwrapped(module, say=False))
    numbered = [(t, n, b) for t, tower in towers.items() for n, b in enumerate(tower.blocks, 1)]
    held = [
        (n in placement.blocks(t), f"{t} block {n}", {*map(id, parts(b))}) for t, n, b in numbered
    ]
    trained = {key for chosen, _, keys in held if chosen for key in keys}
    if others := [name for chosen, name, keys in held if not chosen and keys & trained]:
        LOG.warning(
            "%s: the chosen blocks share weights with %s left out, as %s, which changes with them",
            by, counted(len(others), "block"), others[0],
        )  # fmt: skip


def _beyond_fused(options: Mapping[str, Any]) -> str:
    """Return which of peft's options it has for linear layers alone, not for fused attention."""
    start = options.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in ("gaussian", "eva"):
        return f"init_lora_weights={start!r}"
    return "use_dora" if options.get("use_dora") else ""


def _tell_fused(
    chosen: Mapping[str, Sequence[nn.Module]], layers: Mapping[str, Sequence[str]], special: str
) -> None:
    """Warn of attention that keeps its projections as one parameter, where peft falls short."""
    found = {
        (name in layers[tower], part.in_proj_weight.dtype)
        for tower, blocks in chosen.items()
        for block in blocks
        for name, part in block.named_modules()
        if isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None
    }
    if special and found:
        LOG.warning("to_peft: peft has no %s for fused attention, which is left out", special)
    half = {kind for acting, kind in found if acting and kind.itemsize < torch.float32.itemsize}
    if half:
        LOG.warning(
            "to_peft: peft adds LoRA to the weights of fused attention for each pass and takes it "
            "off again, and rounding to %s moves them each time; train in float32, under autocast "
            "if need be, or leave attention out of target_modules",
            str(half.pop()).removeprefix("torch."),
        )


def _tell_averaging(by: str, module: nn.Module, trained: Sequence[nn.Module]) -> None:
    """Warn of batch norms outside what is trained: running averages are no parameters."""
    inside = {id(part) for block in trained for part in block.modules()}
    if names := [
        name
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats and id(part) not in inside
    ]:
        LOG.warning(
            "%s: %s outside what is trained, such as %s, would go on averaging in training mode; "
            "call .eval() on them after .train() of the model",
            by,
            counted(len(names), "batch norm"),
            names[0],
        )


def _tell_ungrouped(module: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn of what is trainable outside the chosen blocks: no optimiser of the groups moves it."""
    grouped = {id(weight) for group in groups for weight in group["params"]}
    free = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    if others := [name for name, weight in free if id(weight) not in grouped]:
        LOG.warning(
            "parameter_groups: %s outside the chosen blocks trainable and in no group, as %s; "
            "freeze them by choice.freeze, or give them a group of their own",
            f"{counted(len(others), 'parameter')} {'is' if len(others) == 1 else 'are'}",
            others[0],
        )


def layers_of(blocks: Any, linear_alone: bool = False) -> list[str]:
    """Return the names, inside a block, of the layers that LoRA acts on.

    Attention that keeps its projections as one parameter is such a layer itself; LoRA on the linear
    layer inside it would not be called, nor on one whose weights alone are read, as of EVA in timm.
    """
    found: dict[str, None] = {}
    for block in blocks:
        fused: list[str] = []
        for name, part in block.named_modules():
            if getattr(part, "q_bias", None) is not None and not getattr(
                part, "qkv_bias_separate", False
            ):
                fused.append(f"{name}.qkv")
            if isinstance(part, nn.MultiheadAttention):
                fused.append(f"{name}.")
                if not linear_alone:
                    found[name] = None
            elif isinstance(part, nn.Linear) and not name.startswith(tuple(fused)):
                found[name] = None
    return list(found)


def _module(model: Any) -> nn.Module:
    """Return the module of a `VLM`, of what open_clip's factory returns, or the one given."""
    module = model[0] if isinstance(model, tuple) and model else model
    module = module.clip if isinstance(module, VLM) else module
    if not isinstance(module, nn.Module):
        raise UserError(
            "model takes what load_model gives, or a module of open_clip or transformers, not a "
            f"value of type {type(module).__name__}"
        )
    return module


def _chosen(module: nn.Module, placement: Placement) -> dict[str, list[nn.Module]]:
    if not placement:
        raise UserError("the choice names no block; there is nothing to adapt")
    towers = find_towers(unwrapped(module, say=False))
    placement.check({name: tower.depth for name, tower in towers.items()}, "the choice")
    return {
        name: [tower.blocks[block - 1] for block in placement.blocks(name)]
        for name, tower in towers.items()
    }


def _wanted(layers: Mapping[str, list[str]], wanted: Any) -> dict[str, list[str]]:
    """Return those of each tower's layers whose last names are wanted.

    Raises:
        UserError: One is in no block, or a tower's blocks have none of them.
    """
    several = taken("to_peft", "target_modules", Sequence[str], wanted)
    last = {name.rpartition(".")[2]: None for names in layers.values() for name in names}
    for name in several:
        if "." not in name:
            check_one_of("layer", name, list(last), where="the chosen blocks")
    ends = tuple(f".{name}" for name in several)
    found = {t: [n for n in names if f".{n}".endswith(ends)] for t, names in layers.items()}
    for tower, names in found.items():
        if not names:
            raise UserError(
                f"target_modules {', '.join(several)} name no layer of the chosen {tower} blocks; "
                f"they have {', '.join(layers[tower])}"
            )
    return found
