"""The training loop of the miniature CLIP: resumable to the step, seeded, logged."""

from __future__ import annotations

import copy
import csv
import gzip
import itertools
import json
import math
import os
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from mini_clip.data import Source, Views, draw_template, load_source, sample_batch
from mini_clip.muon import Muon
from mini_clip.teacher import (
    CONCEPTS,
    SIDE,
    WIDTH,
    Teacher,
    caption_loss,
    draw_kinds,
    draw_text,
    with_own,
)
from vlmlayers.data import builtin
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.progress import bar

RECIPE = Path(__file__).with_name("recipe.toml")
TOKENIZER = "merges.txt.gz"
LOGGED = 25  # steps between rows of the log; the device is not waited for in between
SAVED = 120  # seconds between checkpoints
SLOWER = 1.2  # mean step to come over the last ones: the last eighth of the run drops no patches
Recipe = dict[str, Any]


def load_recipe(path: Path = RECIPE, device: str = "cpu", **changes: Any) -> Recipe:
    """Read the recipe; a GPU takes its own section, `changes` win over both.

    Raises:
        UserError: A change names no setting of the recipe.
    """
    recipe: Recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    special = recipe.pop("gpu", {})
    if device != "cpu":
        recipe |= special
    for key, value in changes.items():
        check_one_of("recipe setting", key, recipe)
        if value is not None:
            recipe[key] = value
    return recipe


def write_tokenizer(path: Path, merges: int) -> None:
    """Write the first `merges` byte-pair merges of open_clip's vocabulary as one of our own."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as handle:
        lines = [handle.readline().rstrip("\n") for _ in range(merges + 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    # mtime=0 keeps the file the same from run to run
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def build(recipe: Recipe, folder: Path) -> tuple[CLIP, SimpleTokenizer]:
    """Build the seeded model, with patch dropout, and its tokenizer."""
    path = folder / TOKENIZER
    if not path.exists():
        write_tokenizer(path, recipe["merges"])
    text = dict(recipe["model"]["text_cfg"])
    tokenizer = SimpleTokenizer(str(path), context_length=text["context_length"])
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = CLIP(
            embed_dim=recipe["model"]["embed_dim"],
            quick_gelu=recipe["model"]["quick_gelu"],
            vision_cfg=recipe["model"]["vision_cfg"],
            text_cfg=text | {"vocab_size": tokenizer.vocab_size},
        )
    model.visual.patch_dropout = PatchDropout()
    return model, tokenizer


class PatchDropout(nn.Module):
    """Passes the class token and the patches that were kept: (item, patch) `kept`, None for all.

    open_clip's own draws them on the CPU, which a GPU would wait for.
    """

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return (item, 1 + kept, width) of (item, 1 + patch, width)."""
        if self.kept is None:
            return x
        return torch.cat([x[:, :1], x[:, 1:].take_along_dim(self.kept[..., None], 1)], 1)


def rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a step: warm-up, constant, then linear to zero."""
    decay_steps = max(1, round(recipe["decay"] * recipe["steps"]))
    left = (recipe["steps"] - step) / decay_steps
    return float(recipe["learning_rate"] * min(1.0, (step + 1) / recipe["warmup"], left))


def dropped(step: int, recipe: Recipe) -> float:
    """Return the share of patches dropped at a step; none in the last eighth of the run."""
    return float(recipe["patch_dropout"]) if step / recipe["steps"] < 0.875 else 0.0


def contrastive_loss(image: Tensor, text: Tensor, groups: Tensor, scale: Tensor) -> Tensor:
    """Return the symmetric cross-entropy in which members of one group are positives.

    Args:
        image: (item, joint) unit rows.
        text: (item, joint) unit rows.
        groups: (item,) number of each pair's group.
        scale: Factor on the cosines.
    """
    target = (groups[:, None] == groups[None, :]).float()
    target = target / target.sum(1, keepdim=True)  # symmetric: rows and columns alike
    logits = scale * image.float() @ text.float().t()  # (item, item)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


class Inputs(NamedTuple):
    """What a step needs beside the images, ready for the device.

    Attributes:
        rows: (item,) places among the images, photographs first.
        photographs: Number of photographs.
        groups: (item,) number of each item's group.
        own: (item,) the teacher's concept that an item's class names; -1 for none.
        tokens: Distinct texts in pieces of like length, each (text, token).
        places: Rows of the texts: of the items, then, with a teacher, of its concepts and kinds.
        kinds: (concept,) place of each concept's kind among the kinds.
    """

    rows: Tensor
    photographs: int
    groups: Tensor
    own: Tensor
    tokens: Sequence[Tensor]
    places: Tensor
    kinds: Tensor

    def to(self, device: torch.device) -> Inputs:
        """Copy to a device, without waiting for it."""

        def moved(part: Any) -> Any:
            if isinstance(part, Tensor):
                return part.to(device, non_blocking=True)
            return part if isinstance(part, int) else [moved(piece) for piece in part]

        return Inputs(*map(moved, self))


class Feed(Dataset[Inputs]):
    """The inputs of a run: `feed[step]` is a function of seed and step alone.

    Args:
        sources: Training sets.
        recipe: Settings of the run.
        tokenizer: Of the model.
    """

    def __init__(
        self, sources: Sequence[Source], recipe: Recipe, tokenizer: SimpleTokenizer
    ) -> None:
        self.sources, self.recipe, self.tokenizer = sources, recipe, tokenizer
        self._known: dict[str, NDArray[np.int32]] = {}

    def __getitem__(self, step: int) -> Inputs:
        recipe = self.recipe
        templates, seed = recipe["templates"], recipe["seed"]
        batch = sample_batch(
            self.sources, recipe["batch_size"], templates, seed, step, recipe["sources_per_batch"]
        )
        texts, kinds = list(batch.texts), np.empty(0, np.int64)
        if recipe["teacher"]["taught"]:
            generator = np.random.default_rng((seed, step, 1))
            template = draw_template(templates, generator)
            texts += [draw_text(concept, template, generator) for concept in range(CONCEPTS)]
            names, kinds = draw_kinds(template, generator)
            texts += names
        order = {group: i for i, group in enumerate(dict.fromkeys(batch.groups))}
        tokens, places = self.tokens(texts)
        return Inputs(
            torch.from_numpy(batch.rows),
            batch.photographs,
            torch.tensor([order[group] for group in batch.groups]),
            torch.from_numpy(batch.own),
            tokens,
            places,
            torch.from_numpy(kinds),
        )

    def tokens(self, texts: Sequence[str]) -> tuple[list[Tensor], Tensor]:
        """Return the tokens of the distinct texts in two pieces, and the row of each text in them.

        The texts are sorted by length and cut where the two pieces, each as long as its longest
        text, hold the fewest tokens: most are prompts of ten beside a few captions of forty.
        """
        distinct = dict.fromkeys(texts)
        for text in distinct:
            if text not in self._known:
                self._known[text] = self.tokenizer(text)[0].numpy().astype(np.int32)
        tokens = np.stack([self._known[text] for text in distinct])  # (text, token)
        lengths = tokens.argmax(1) + 1  # end-of-text has the highest id
        order = lengths.argsort(kind="stable")
        lengths, count = lengths[order], np.arange(1, len(order) + 1)
        cut = int((count * lengths + count[::-1] * lengths[-1]).argmin()) + 1
        pieces = [tokens[order[:cut], : lengths[cut - 1]], tokens[order[cut:], : lengths[-1]]]
        row = dict(zip(np.array(list(distinct), dtype=object)[order], itertools.count()))
        places = torch.tensor([row[text] for text in texts])
        return [torch.from_numpy(piece) for piece in pieces if len(piece)], places


def encode_tokens(model: CLIP, pieces: Sequence[Tensor]) -> Tensor:
    """Return the unit embeddings of texts, (text, joint), piece after piece.

    The mask is causal, so what was cut off after the end of a text changes nothing.
    """
    return F.normalize(torch.cat([_encode_piece(model, piece) for piece in pieces]), dim=-1)


def _encode_piece(model: CLIP, tokens: Tensor) -> Tensor:
    longest = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:longest]
    assert model.attn_mask is not None
    x = model.transformer(x, attn_mask=model.attn_mask[:longest, :longest])  # (text, token, width)
    last = model.ln_final(x[torch.arange(len(tokens), device=tokens.device), tokens.argmax(1)])
    embedding: Tensor = last @ model.text_projection
    return embedding


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for all else.

    Muon takes steps whose root mean square is that of AdamW, so one schedule serves both; norms,
    biases and embeddings do not decay.
    """
    named = dict(model.named_parameters())
    hidden = {n for n, p in named.items() if "resblocks" in n and p.ndim == 2}
    plain = {n for n, p in named.items() if p.ndim < 2 or "embedding" in n}
    decay = recipe["weight_decay"]
    rest: list[dict[str, Any]] = [
        {"params": [p for n, p in named.items() if n not in hidden | plain]},
        {"params": [named[n] for n in sorted(plain)], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay, fused=True)
    muon = Muon([named[n] for n in sorted(hidden)], weight_decay=decay)
    for optimizer, factor in ((adam, 1.0), (muon, recipe["muon_factor"])):
        for group in optimizer.param_groups:
            group["factor"] = factor
    return [adam, muon]


class Training:
    """One training run in a folder: model, average, optimizer, step.

    Args:
        recipe: Settings from `load_recipe`.
        folder: Checkpoint, log, tokenizer, image cache and export go here.
        device: Where to train.
    """

    def __init__(self, recipe: Recipe, folder: Path, device: str = "cpu") -> None:
        self.recipe, self.folder, self.device = recipe, folder, torch.device(device)
        self.model, self.tokenizer = build(recipe, folder)
        self.model.to(self.device)
        self.teacher = Teacher(self.device) if recipe["teacher"]["taught"] else None
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        with torch.random.fork_rng():
            torch.manual_seed(recipe["seed"])
            self.matcher = nn.Linear(recipe["model"]["embed_dim"], WIDTH).to(self.device)
        self.optimizers = optimizers(nn.ModuleList([self.model, self.matcher]), recipe)
        self.step, self.seconds = 0, 0.0

    @property
    def checkpoint(self) -> Path:
        """Where the state lies."""
        return self.folder / "checkpoint.pt"

    def start_from(self, folder: Path) -> None:
        """Take the weights of an open_clip folder of this architecture, such as an export.

        Raises:
            UserError: The folder has no weights, or they do not fit.
        """
        path = folder / "model.safetensors"
        try:
            state = {name: tensor.float() for name, tensor in load_file(path).items()}
            for model in (self.model, self.average):
                model.load_state_dict(state)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{path} cannot be started from: {error}") from error

    def save(self) -> None:
        """Write the whole state; an interruption leaves the one before."""
        partial = self.checkpoint.with_suffix(".partial")
        state: dict[str, Any] = {
            name: getattr(self, name).state_dict() for name in ("model", "average", "matcher")
        }
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        state["step"] = self.step
        torch.save(state | {"seconds": self.seconds, "recipe": json.dumps(self.recipe)}, partial)
        partial.replace(self.checkpoint)

    def resume(self) -> bool:
        """Continue from the folder's checkpoint, if there is one.

        Raises:
            UserError: The checkpoint was made by a recipe that differs in more than its length, or
                the decay had begun and its length differs.
        """
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        before = json.loads(state["recipe"])
        free = {"steps"} if state["step"] < (1 - before["decay"]) * before["steps"] else set()
        for key, value in before.items():
            if key not in free and self.recipe.get(key) != value:
                raise UserError(
                    f"{self.checkpoint} was trained with {key} = {value!r}, the recipe says "
                    f"{self.recipe.get(key)!r}; name another --out or restore the setting"
                )
        for name in ("model", "average", "matcher"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        return True

    def feed(self, sources: Sequence[Source]) -> Feed:
        """Return the inputs of the run's steps."""
        return Feed(sources, self.recipe, self.tokenizer)

    def train_step(self, images: Tensor, inputs: Inputs) -> Tensor:
        """Take one step, a function of seed and step number alone.

        Args:
            images: (image, 3, SIDE, SIDE) uint8 of all sources, on the device of the run.
            inputs: Of this step.

        Returns:
            The loss, on the device: reading it waits for the step.
        """
        recipe, inputs = self.recipe, inputs.to(self.device)
        generator = torch.Generator(self.device)
        generator.manual_seed(recipe["seed"] * 1_000_003 + self.step)
        views = Views(images[inputs.rows], inputs.photographs, generator)
        vision = recipe["model"]["vision_cfg"]
        pixels = views.augmented(vision["image_size"], recipe["mixed_textures"])
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        share = dropped(self.step, recipe)
        drawn = torch.rand(len(pixels), patches, generator=generator, device=self.device)
        kept = drawn.topk(max(1, round(patches * (1 - share)))).indices if share else None
        self.model.visual.patch_dropout.kept = kept
        answers = None
        if self.teacher is not None and inputs.photographs:
            answers = self.teacher(views.crops(SIDE, slice(inputs.photographs)))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * rate(self.step, recipe)
        loss = self._loss(pixels, inputs, answers)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
            keep = min(recipe["averaging"], (1 + self.step) / (10 + self.step))
            fast = list(self.model.parameters())
            torch._foreach_lerp_(list(self.average.parameters()), fast, 1 - keep)
        self.step += 1
        return loss.detach()

    def _loss(
        self, pixels: Tensor, inputs: Inputs, answers: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Return the contrastive loss and, with a teacher, how far the student is from it."""
        kind, half = self.device.type, bool(self.recipe["mixed_precision"])
        # on a CPU the flash kernel's backward pass alone takes a third of a step
        attention = sdpa_kernel(SDPBackend.MATH) if kind == "cpu" else nullcontext()
        with torch.autocast(kind, torch.bfloat16, enabled=half), attention:
            embedding = self.model.encode_image(pixels)
            text = encode_tokens(self.model, inputs.tokens)
        embedding, text = embedding.float(), text.float()[inputs.places]
        image, scale = F.normalize(embedding, dim=-1), self.model.logit_scale.exp()
        n, p = len(pixels), inputs.photographs
        loss = contrastive_loss(image, text[:n], inputs.groups, scale)
        if answers is None:
            return loss
        weights = self.recipe["teacher"]
        shares = with_own(answers[0], inputs.own[:p])
        concepts, kinds = text[n : n + CONCEPTS], text[n + CONCEPTS :]
        coarse = shares.new_zeros(p, len(kinds)).index_add_(1, inputs.kinds, shares)
        said = caption_loss(image[:p], concepts, shares, scale)
        said = said + caption_loss(image[:p], kinds, coarse, scale)
        matched = F.mse_loss(self.matcher(embedding[:p]), answers[1])
        return loss + weights["captions"] * said + weights["features"] * matched

    def export(self, folder: Path) -> None:
        """Write the averaged weights as an open_clip folder: config, weights, tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        text = self.recipe["model"]["text_cfg"] | {
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer_kwargs": {"bpe_path": TOKENIZER},
        }
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        config = {
            "model_cfg": self.recipe["model"] | {"text_cfg": text},
            "preprocess_cfg": {
                "mean": list(mean),
                "std": list(std),
                "interpolation": "bicubic",
                "resize_mode": "shortest",
            },
        }
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
        weights = {n: t.half().contiguous() for n, t in self.average.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        (folder / TOKENIZER).write_bytes((self.folder / TOKENIZER).read_bytes())


def load_sources(
    recipe: Recipe, folder: Path, root: Path | None, show: bool = True
) -> list[Source]:
    """Decode the training splits of every share and of every built-in set but unseen ones."""
    real = [load_source(n, w, folder, root, None, show) for n, w in recipe["shares"].items()]
    names = [name for name in builtin.names() if not builtin.get(name).unseen]
    share = recipe["drawn_share"] / max(1, len(names))
    return real + [load_source(n, share, folder, root, recipe["drawn_items"], show) for n in names]


def inputs_from(feed: Feed, step: int, workers: int) -> Iterator[Inputs]:
    """Yield the inputs of a step and all after it, prepared ahead by worker processes."""
    many: dict[str, Any] = {}
    if workers:
        many = {"prefetch_factor": 4, "multiprocessing_context": "fork", "pin_memory": True}
    return iter(
        DataLoader(
            feed,
            batch_size=None,
            sampler=itertools.count(step),
            num_workers=workers,
            generator=torch.Generator(),  # the global one is no part of the run
            **many,
        )
    )


def train(
    run: Training, sources: Sequence[Source], *, minutes: float | None = None, show: bool = True
) -> None:
    """Train to the last step of the recipe; writes `log.csv`, checkpoints and the export.

    Ctrl-C saves and stops; the next start continues at the same step.

    Args:
        run: The run.
        sources: Its training sets.
        minutes: Set the recipe's number of steps to what fits in this time, by the speed measured
            until the rate begins to fall; the log and the checkpoint tell it.
        show: Whether to show progress.

    Raises:
        UserError: The loss is not finite.
    """
    log, recipe = run.folder / "log.csv", run.recipe
    started = log.exists()
    images = torch.from_numpy(np.concatenate([source.images for source in sources])).to(run.device)
    workers = min(12, os.cpu_count() or 1) if run.device.type == "cuda" else 0
    feed = inputs_from(run.feed(sources), run.step, workers)
    shown = bar(None, "pretrain", total=recipe["steps"], initial=run.step, unit="step", show=show)
    with log.open("a", newline="") as handle, shown as progress:
        writer = csv.writer(handle)
        if not started:
            writer.writerow(
                ["step", "steps", "loss", "rate", "dropped", "images_per_second", "seconds"]
            )
        losses: list[Tensor] = []
        begun = saved = time.perf_counter()
        sound = True
        try:
            while run.step < recipe["steps"]:
                losses.append(run.train_step(images, next(feed)))
                progress.update()
                if run.step % LOGGED and run.step < recipe["steps"]:
                    continue
                loss = float(torch.stack(losses).mean())
                if not (sound := math.isfinite(loss)):
                    raise UserError(f"the loss is {loss} at step {run.step}; lower the rate")
                spent, begun = time.perf_counter() - begun, time.perf_counter()
                run.seconds += spent
                if minutes is not None and run.step < (1 - recipe["decay"]) * recipe["steps"]:
                    left = (60 * minutes - run.seconds) / (spent / len(losses))
                    recipe["steps"] = run.step + max(1, int(left / SLOWER))
                    progress.total = recipe["steps"]
                writer.writerow(
                    [
                        run.step,
                        recipe["steps"],
                        f"{loss:.4f}",
                        f"{rate(run.step, recipe):.2e}",
                        dropped(run.step, recipe),
                        f"{len(losses) * recipe['batch_size'] / spent:.1f}",
                        f"{run.seconds:.0f}",
                    ]
                )
                handle.flush()
                losses = []
                if begun - saved > SAVED:
                    run.save()
                    saved = time.perf_counter()
        finally:
            if sound:  # else the last checkpoint is worth more
                run.save()
    run.export(run.folder / "export")
