"""Record every position of a tower in one pass, by hooks that pool tokens and are removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmlayers.errors import UserError
from vlmlayers.models.attention import MEASURES, AttentionWatch, refuse_unseen
from vlmlayers.models.devices import copied
from vlmlayers.models.modes import eval_mode
from vlmlayers.models.towers import Tower, refuse_compiled
from vlmlayers.positions import (
    ATTENTION,
    EMBED,
    FINAL,
    JOINT,
    PROJ,
    TOKENS,
    check_space,
    is_block,
    sort_key,
)

_AGREE = 0.02  # of the largest value; half precision stays below, a wrong head does not
Features = dict[str, dict[str, NDArray[np.float32]]]


class HookDidNotFire(UserError):
    """A block's hook was not called during a forward pass."""


@contextmanager
def block_outputs(tower: Tower, look: Any) -> Iterator[None]:
    """Call `look(position, tensor)` for the input of block 1 and each block's output.

    The hooks return nothing, so the forward pass is that of the model in eval mode. They are
    removed, and modes restored, on every way out, also on Ctrl-C.
    """

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(EMBED, args[0] if args else next(v for v in kwargs.values() if _is_activation(v)))

    def after(position: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            look(position, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = []
    try:
        first = tower.blocks[0]
        # With keywords: some families pass the activation to their blocks by name.
        handles.append(first.register_forward_pre_hook(before, with_kwargs=True))
        for number, block in enumerate(tower.blocks, start=1):
            handles.append(block.register_forward_hook(after(str(number))))
        with eval_mode(tower.model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 3


def probe(tower: Tower) -> None:
    """Find batch axis and widths by a small forward pass; done once per tower.

    The batch axis is the one axis whose size is that of the batch. Where a second axis happens to
    have the same size, a batch of another size decides.

    Raises:
        HookDidNotFire: A block was not called as a module.
        UserError: Two blocks are one module, or no single axis follows the batch.
    """
    if tower.widths:
        return
    first: dict[nn.Module, int] = {}
    for number, block in enumerate(tower.blocks, start=1):
        if (same := first.setdefault(block, number)) != number:
            # Its hook is called for both, and the later output would stand at both.
            raise UserError(
                f"blocks {same} and {number} of the {tower.name} tower ({tower.family}) are one "
                "module, whose outputs are not told apart; give each block a copy of its own "
                "(copy.deepcopy)"
            )
    axes: set[int] = set()
    for batch in (2, 3, 5):
        seen: dict[str, Tensor] = {}
        with torch.inference_mode(), block_outputs(tower, seen.__setitem__):
            tower.run(tower.example(batch))
        _require_all(tower, seen)
        for position, x in seen.items():
            if not isinstance(x, Tensor):
                raise UserError(
                    f"block {position} of the {tower.name} tower ({tower.family}) gives out "
                    f"{type(x).__name__}, not one tensor; such towers are not known"
                )
            # A batch axis has the size of the batch at every position and for every size.
            fits = {axis for axis, size in enumerate(x.shape) if size == batch}
            axes = axes & fits if axes else fits
        if len(axes) == 1:
            tower.batch_axis = axes.pop()
            tower.widths = {position: tower.channels(x) for position, x in seen.items()}
            return
    raise UserError(f"the {tower.name} tower ({tower.family}) mixes items in its activations")


def _require_all(tower: Tower, seen: Any) -> None:
    expected = [EMBED, *(str(block) for block in range(1, tower.depth + 1))]
    silent = [position for position in expected if position not in seen]
    if silent:
        raise HookDidNotFire(
            f"hooks of the {tower.name} tower ({tower.family}) did not fire at "
            f"{', '.join(silent[:6])}: the model does not call these modules in its forward pass"
        )


class Recorder:
    """Context manager that records pooled features at every position of one tower.

    Tokens are pooled on the device inside the hook, so what is kept is (item, width) per position;
    each batch makes one copy per width and space to the host.

        with Recorder(tower, spaces=("native", "joint")) as recorder:
            for batch in batches:
                features = recorder(batch)          # space → position → (item, width) float32

    Args:
        tower: Tower to record.
        spaces: Among `native`, `normed`, `joint`, which is left out where a tower has none, and
            `attention_entropy`, `attention_distance`: (item, head) in each block; see `attention`.
        pooling: Pooling of tokens. None or `model` for the tower's own: where that is an attention
            pool, `joint` goes through it, and `native`, which it was not trained on, is averaged.
            `tokens` keeps every token by itself, (item, token, width), NaN behind those of an item;
            final norm and projection are applied to each, and `proj` is no token's.

    Raises:
        UserError: Unknown space, a pooling that the tower does not have, or `joint` alone where
            there is no joint embedding; attention or tokens of a tower that has no blocks; `normed`
            or `joint` of another pooling than the tower's own, where norm or projection are part
            of that.
    """

    def __init__(
        self, tower: Tower, spaces: Sequence[str] = ("native", "joint"), pooling: str | None = None
    ) -> None:
        for space in spaces:
            check_space(space)
        for block in tower.blocks:
            refuse_compiled(block)
        self.tower = tower
        self.spaces = tuple(s for s in dict.fromkeys(spaces) if s != JOINT or tower.joint)
        if not self.spaces:
            raise UserError(f"{tower.refusal(JOINT)}; ask for native or normed")
        self.pooling = tower.resolve_pooling(pooling)
        if pooling not in (None, "model", tower.pooling):
            self._refuse_parted_pool()
        self._measures = {space: MEASURES[space] for space in self.spaces if space in ATTENTION}
        if self._measures:
            self._refuse_attention()
        probe(tower)
        own = tower.attend is not None and pooling in (None, "model")
        self._attends = own and "joint" in self.spaces
        self.joint_pooling = "model" if own else self.pooling
        self._normed_at = self._where_normed()
        self._seen: dict[str, dict[str, Tensor]] = {}
        self._heads: list[dict[str, Tensor]] = []  # of the attentions since the last block
        self._ids: Tensor | None = None
        self._output: Tensor | None = None
        self._hooks: Any = None

    def shapes(self, example: Tensor | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return space → position → shape of an item's row, in order along the tower.

        Args:
            example: Input that has as many tokens as those to come; the tower's own where None.

        Raises:
            UserError: The head that was found does not reproduce the model's own embedding.
        """
        with self:
            found = self(self.tower.example(2) if example is None else example)
            self._require_agreement(found)
        self._require_own_forward()
        return {
            space: {p: by_position[p].shape[1:] for p in sorted(by_position, key=sort_key)}
            for space, by_position in found.items()
        }

    def token_names(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> tuple[str, ...]:
        """Return the names of the tokens that are kept by themselves.

        Args:
            shapes: What `shapes` returns.

        Raises:
            UserError: Positions differ in their number of tokens.
        """
        counts = {
            shape[0] for space in set(shapes) - set(ATTENTION) for shape in shapes[space].values()
        }
        if len(counts) > 1:
            raise UserError(
                f"the positions of the {self.tower.name} tower ({self.tower.family}) have "
                f"{' or '.join(map(str, sorted(counts)))} tokens; record it pooled"
            )
        return self.tower.token_names(counts.pop())

    def _refuse_parted_pool(self) -> None:
        """Refuse tokens or another pooling where norm or projection are part of the model's own."""
        tower, spaces = self.tower, {"normed", JOINT} & set(self.spaces)
        part = "final norm" if tower.attend_norms else "projection" if tower.attend_raw else ""
        if part and spaces:
            what = "its tokens have" if self.pooling == TOKENS else f"{self.pooling!r} pooling has"
            raise UserError(
                f"the {part} of the {tower.name} tower ({tower.family}) is part of its attention "
                f"pool, so that {what} native space only; ask for native"
            )

    def _refuse_attention(self) -> None:
        """Refuse attention where blocks have none of all tokens, and distance without a grid."""
        tower = self.tower
        if tower.kind != "blocks":
            raise UserError(
                f"the {tower.name} tower ({tower.family}) has stages, not blocks with attention "
                "over all tokens; leave out the attention spaces"
            )
        if "attention_distance" in self.spaces and tower.name == "vision" and tower.image_size:
            raise UserError(
                f"images of the vision tower ({tower.family}) have grids of their own, so that "
                "attention_distance is not measured; leave it out"
            )

    def _require_agreement(self, found: Features) -> None:
        """Compare the last block through the head with what the model gives out."""
        tower = self.tower
        # Of another pooling the model gives out nothing to compare with.
        if not (self._attends or self.pooling == tower.pooling):
            return
        if tower.joint and JOINT in found:
            last, own, what = found[JOINT][str(tower.depth)], found[JOINT][PROJ], "embedding"
        elif not tower.joint and "native" in found and self._output is not None:
            last, own = found["native"][FINAL], self._output.float().cpu().numpy()
            what = "pooled feature"
        else:
            return
        if np.abs(last - own).max() > _AGREE * max(float(np.abs(own).max()), 1e-6):
            raise UserError(
                f"the last block of the {tower.name} tower ({tower.family}), taken through its "
                f"final norm and head, is not the model's own {what}; this variant of the family "
                "is not known"
            )

    def _require_own_forward(self) -> None:
        """Compare a forward pass that stands in for the model's own with that."""
        tower = self.tower
        if tower.whole is None:
            return
        batch = tower.example(2)
        with torch.inference_mode(), eval_mode(tower.model):
            ours, own = (run(batch).float() for run in (tower.run, tower.whole))
        if (ours - own).abs().max() > _AGREE * own.abs().max().clamp_min(1e-6):
            raise UserError(
                f"encode_text of {type(tower.model).__name__} is not open_clip's: what its blocks "
                "give, taken through norm and projection, is not what it returns; look at its "
                "images alone: tower='vision'"
            )

    def __enter__(self) -> Recorder:
        self._hooks = block_outputs(self.tower, self._look)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        hooks, self._hooks = self._hooks, None
        # Else the last batch would hold device memory for as long as the recorder lives.
        self._seen, self._output = {}, None
        hooks.__exit__(*error)

    def __call__(self, batch: Tensor) -> Features:
        """Run the tower on one batch and return features by space and position.

        Raises:
            HookDidNotFire: A block was not called.
            RuntimeError: Called outside the `with` block.
        """
        return self.start(batch)()

    def start(self, batch: Tensor, *, keep_casts: bool = False) -> Callable[[], Features]:
        """Run the tower on one batch; return a function that gives its features.

        A GPU may still be computing: the function waits for the copy to the host, from any thread,
        also when the next batch has been started. Autocast may be let keep casts of weights where
        nothing changes these: see `casts_kept`.

        Raises:
            HookDidNotFire: A block was not called.
            RuntimeError: Called outside the `with` block.
        """
        if self._hooks is None:
            raise RuntimeError("a Recorder records inside its `with` block only")
        self._seen, self._ids = {}, None
        with torch.no_grad() if keep_casts else torch.inference_mode():
            if self.tower.valid is not None:
                # All texts keep the same number of tokens where every token is stored.
                batch = batch if self.pooling == TOKENS else self.tower.cut(batch)
                self._ids = batch
            with AttentionWatch(self._measure) if self._measures else nullcontext():
                self._output = self.tower.run(batch)
            _require_all(self.tower, self._seen)
            return _to_host(self._assemble(self._output))

    def _where_normed(self) -> frozenset[str]:
        """Return where tokens are normed inside the hook; elsewhere norm follows pooling."""
        if self.tower.picks_token(self.pooling):
            return frozenset()
        if "normed" in self.spaces or ("joint" in self.spaces and not self._attends):
            return frozenset(self.tower.positions("normed"))
        # `final` is the last block after its norm, whatever the spaces asked for.
        return frozenset({str(self.tower.depth)})

    def _look(self, position: str, x: Tensor) -> None:
        """Pool one activation in every way that the chosen spaces need."""
        tower = self.tower
        found: dict[str, Tensor] = {}
        tokens = tower.tokens(x)
        found["native"] = self._pool(tokens, self.pooling)
        if position in self._normed_at:
            found["normed"] = self._normed(x, tokens)
        if self._attends and position in tower.positions("joint"):
            found["joint"] = self._attend(x, tokens)
        if self._measures and is_block(position):
            refuse_unseen(self._heads, tower, position)
            found |= self._heads[0]
        self._heads = []
        self._seen[position] = found

    def _measure(self, weights: Tensor, seen: Tensor) -> None:
        """Take what is asked for of one attention, (item, head, query, key)."""
        if weights.shape[-2] != weights.shape[-1]:
            return  # a pool asks with queries of its own
        counted = self._counted(weights.shape[-1])
        self._heads.append(
            {name: of(weights, seen, self.tower, counted) for name, of in self._measures.items()}
        )

    def _counted(self, tokens: int, batch: Tensor | None = None) -> Tensor | None:
        """Return which tokens an item has, (item, token); all of them where None."""
        batch = self._ids if batch is None else batch
        if self.tower.valid is None or batch is None:
            return None
        mask = self.tower.valid(batch)
        return torch.nn.functional.pad(mask, (0, tokens - mask.shape[1]), value=True)

    def without_padding(self, features: Features, batch: Tensor | None = None) -> Features:
        """Return the features of a batch, the last one where None, with NaN for what pads items."""
        if self.pooling != TOKENS:
            return features
        for space in set(features) - set(ATTENTION):
            for values in features[space].values():
                counted = self._counted(values.shape[1], batch)
                if counted is not None:
                    values[~counted.cpu().numpy()] = np.nan
        return features

    def _normed(self, x: Tensor, tokens: Tensor) -> Tensor:
        tower = self.tower
        if tower.attend_norms:  # the final norm is part of the model's own pool
            return self._attend(x, tokens)
        return tower.norm_after(self._pool(tower.norm(tokens), self.pooling))

    def _attend(self, x: Tensor, tokens: Tensor) -> Tensor:
        tower = self.tower
        assert tower.attend is not None
        pooled = tower.attend(x if tower.attend_raw else tower.norm(tokens))
        return tower.norm_after(pooled)

    def _pool(self, tokens: Tensor, pooling: str) -> Tensor:
        """Return (item, width) from (item, token, width), in storage of its own."""
        # A view of one token would keep the whole activation until the pass ends: hence `clone`.
        tower = self.tower
        if pooling == TOKENS:
            return tokens.clone()
        if pooling == "mean":
            return self._mean(tokens)
        if pooling == "cls":
            return (tokens[:, -1] if tower.suffix else tokens[:, 0]).clone()
        if pooling == "eot":
            assert tower.ends is not None and self._ids is not None
            rows = torch.arange(len(tokens), device=tokens.device)
            # No clone: indexing by tensors copies.
            return tokens[rows, tower.ends(self._ids)]
        return tokens[:, -1].clone()  # the model's own last token

    def _mean(self, tokens: Tensor) -> Tensor:
        tower = self.tower
        if tower.valid is None or self._ids is None:
            return tokens[:, tower.prefix :].mean(1) if tower.prefix else tokens.mean(1)
        mask = tower.valid(self._ids).to(tokens.dtype)  # (item, token)
        kept = tokens[:, : mask.shape[1]]  # a class token after the text stays out
        # A product, since a masked copy would be as large as the activation.
        return torch.einsum("ntd,nt->nd", kept, mask) / mask.sum(1, keepdim=True)

    def _assemble(self, output: Tensor) -> dict[str, dict[str, Tensor]]:
        """Apply final norm and projection to all positions of equal width at once."""
        tower, last = self.tower, str(self.tower.depth)
        result: dict[str, dict[str, Tensor]] = {}
        native = {p: s["native"] for p, s in self._seen.items()}
        normed = {p: s["normed"] for p, s in self._seen.items() if "normed" in s}
        inside = [p for p in tower.positions("normed") if p in self._seen]
        if tower.picks_token(self.pooling):
            keep = inside if {"normed", "joint"} & set(self.spaces) else [last]
            # Picking a token and norming it commute: one token is normed in place of all.
            stack = tower.norm_after(tower.norm(torch.stack([native[p] for p in keep])))
            normed = dict(zip(keep, stack))
        embedding = {PROJ: output} if tower.joint and self.pooling != TOKENS else {}
        if "native" in self.spaces:
            result["native"] = {**native, FINAL: normed.get(last, native[last]), **embedding}
        if "normed" in self.spaces:
            result["normed"] = {**normed, FINAL: normed[last]}
        if JOINT in self.spaces:
            source = {p: self._seen[p]["joint"] for p in inside} if self._attends else normed
            stack = tower.project(torch.stack([source[p] for p in inside]))
            result["joint"] = {**dict(zip(inside, stack)), **embedding}
        for space in self._measures:
            result[space] = {p: self._seen[p][space] for p in tower.positions(space)}
        return result


def _to_host(features: dict[str, dict[str, Tensor]]) -> Callable[[], Features]:
    """Copy to the host as float32, one copy for all positions of one shape; return how to wait."""
    flat = [(s, p, x) for s, by in features.items() for p, x in by.items()]
    groups, copies = [], []
    for shape in dict.fromkeys(x.shape for _, _, x in flat):
        group = [entry for entry in flat if entry[2].shape == shape]
        groups.append([(space, position) for space, position, _ in group])
        # Widened on the device: numpy knows no bfloat16.
        copies.append(torch.stack([x.float() for _, _, x in group]))
    hosts, wait = copied(copies)

    def finished() -> Features:
        wait()
        result: Features = {space: {} for space in features}
        for names, host in zip(groups, hosts):
            for (space, position), array in zip(names, host.numpy()):
                result[space][position] = array
        return result

    return finished
