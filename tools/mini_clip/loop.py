"""The training loop of the miniature CLIP: resumable to the step, seeded, logged."""

from __future__ import annotations

import copy
import csv
import gzip
import itertools
import json
import math
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mini_clip.data import Batch, Source, augment, draw_template, load_source, sample_batch
from mini_clip.teacher import WIDTH, caption_loss, choose_concepts, draw_text
from vlmlayers.data import builtin
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.progress import bar

RECIPE = Path(__file__).with_name("recipe.toml")
TOKENIZER = "merges.txt.gz"
TEXT_CUTS = (0.4, 0.75, 0.95)  # shares of the texts, by length, at which a batch is cut
Recipe = dict[str, Any]


def load_recipe(path: Path = RECIPE, device: str = "cpu", **changes: Any) -> Recipe:
    """Read the recipe; a GPU takes its own section, `changes` win over both.

    Raises:
        UserError: A change names no setting of the recipe.
    """
    recipe: Recipe = tomllib.loads(path.read_text())
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
    vision = recipe["model"]["vision_cfg"] | {"patch_dropout": 0.01}
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = CLIP(
            embed_dim=recipe["model"]["embed_dim"],
            quick_gelu=recipe["model"]["quick_gelu"],
            vision_cfg=vision,
            text_cfg=text | {"vocab_size": tokenizer.vocab_size},
        )
    return model, tokenizer


def rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a step: warm-up, constant, then linear to zero."""
    decay_steps = max(1, round(recipe["decay"] * recipe["steps"]))
    left = (recipe["steps"] - step) / decay_steps
    return float(recipe["learning_rate"] * min(1.0, (step + 1) / recipe["warmup"], left))


def dropped(step: int, recipe: Recipe) -> float:
    """Return the share of patches dropped at a step; none in the last eighth of the run."""
    return float(recipe["patch_dropout"]) if step / recipe["steps"] < 0.875 else 0.0


def contrastive_loss(image: Tensor, text: Tensor, groups: Sequence[str], scale: Tensor) -> Tensor:
    """Return the symmetric cross-entropy in which members of one group are positives.

    Args:
        image: (item, joint) unit rows.
        text: (item, joint) unit rows.
        groups: (item,) group of each pair.
        scale: Factor on the cosines.
    """
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([order[group] for group in groups], device=image.device)
    target = (index[:, None] == index[None, :]).float()
    target = target / target.sum(1, keepdim=True)  # symmetric: rows and columns alike
    logits = scale * image.float() @ text.float().t()  # (item, item)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def encode_texts(model: CLIP, tokenizer: SimpleTokenizer, texts: Sequence[str]) -> Tensor:
    """Return unit text embeddings, each distinct text encoded once.

    Texts of like length go together, cut after the longest end-of-text among them: the mask is
    causal, so what follows it changes nothing. Most texts are prompts of ten tokens beside a few
    captions of forty.
    """
    distinct = list(dict.fromkeys(texts))
    device = model.logit_scale.device
    tokens = tokenizer(distinct)  # (text, token)
    order = tokens.argmax(1).argsort(stable=True)  # end-of-text has the highest id
    cuts = [0, *(round(share * len(order)) for share in TEXT_CUTS), len(order)]
    parts = [
        _encode_tokens(model, tokens[order[low:high]].to(device))
        for low, high in itertools.pairwise(cuts)
        if high > low
    ]
    place = {distinct[i]: row for row, i in enumerate(order.tolist())}
    return F.normalize(torch.cat(parts), dim=-1)[[place[text] for text in texts]]


def _encode_tokens(model: CLIP, tokens: Tensor) -> Tensor:
    ends = tokens.argmax(1)
    longest = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :longest]) + model.positional_embedding[:longest]
    assert model.attn_mask is not None
    mask = model.attn_mask[:longest, :longest].to(tokens.device)
    x = model.transformer(x, attn_mask=mask)  # (text, token, width)
    last = model.ln_final(x[torch.arange(len(tokens), device=tokens.device), ends])
    embedding: Tensor = last @ model.text_projection
    return embedding


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for all else.

    Muon takes steps whose root mean square is that of AdamW, so one schedule serves both; norms,
    biases and embeddings do not decay.

    Raises:
        UserError: This torch has no Muon.

    Reference:
        Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks; Liu et al.
        2025, Muon is scalable for LLM training (the size of a step).
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"torch {torch.__version__} has no Muon; pretraining needs torch >= 2.9")
    named = dict(model.named_parameters())
    hidden = {n for n, p in named.items() if "resblocks" in n and p.ndim == 2}
    plain = {n for n, p in named.items() if p.ndim < 2 or "embedding" in n}
    decay = recipe["weight_decay"]
    rest: list[dict[str, Any]] = [
        {"params": [p for n, p in named.items() if n not in hidden | plain]},
        {"params": [named[n] for n in sorted(plain)], "weight_decay": 0.0},
    ]
    matrices = [{"params": [named[n] for n in sorted(hidden)]}]
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay)
    muon = torch.optim.Muon(
        matrices, momentum=0.95, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
    )
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

    def train_step(self, sources: Sequence[Source], templates: Mapping[str, Any]) -> float:
        """Take one step, a function of seed and step number alone; return the loss."""
        recipe = self.recipe
        batch = sample_batch(
            sources,
            recipe["batch_size"],
            templates,
            recipe["seed"],
            self.step,
            recipe["sources_per_batch"],
        )
        generator = torch.Generator().manual_seed(recipe["seed"] * 1_000_003 + self.step)
        size = recipe["model"]["vision_cfg"]["image_size"]
        mixed = recipe["mixed_textures"]
        images = augment(batch, size, generator, mixed=mixed).to(self.device)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * rate(self.step, recipe)
        self.model.train()
        self.model.visual.patch_dropout.prob = dropped(self.step, recipe)
        half = bool(recipe["mixed_precision"])
        cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if cuda else []):
            torch.manual_seed(recipe["seed"] * 1_000_003 + self.step)  # patch dropout draws here
            # on a CPU the flash kernel's backward pass alone takes a third of a step
            attention = nullcontext() if cuda else sdpa_kernel(SDPBackend.MATH)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half), attention:
                loss = self._loss(images, batch)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
            keep = min(recipe["averaging"], (1 + self.step) / (10 + self.step))
            for slow, fast in zip(self.average.parameters(), self.model.parameters()):
                slow.lerp_(fast, 1 - keep)
        self.step += 1
        return float(loss.detach())

    def _loss(self, images: Tensor, batch: Batch) -> Tensor:
        """Return the contrastive loss and, with a teacher, how far the student is from it."""
        recipe, lesson = self.recipe["teacher"], batch.lesson
        if dropped(self.step, self.recipe) == 0:
            self.model.visual.patch_dropout.eval()  # a share of 0 would still reorder patches
        embedding = self.model.encode_image(images)
        image = F.normalize(embedding, dim=-1)
        scale = self.model.logit_scale.exp()
        captions, chosen = [], []
        if lesson is not None:
            generator = np.random.default_rng((self.recipe["seed"], self.step, 1))
            chosen = choose_concepts(lesson, recipe["concepts"], generator)
            template = draw_template(self.recipe["templates"], generator)
            captions = [draw_text(concept, template, generator) for concept in chosen]
        text = encode_texts(self.model, self.tokenizer, [*batch.texts, *captions])
        own, concepts = text.split([len(batch.texts), len(captions)])
        loss = contrastive_loss(image, own, batch.groups, scale)
        if lesson is None:
            return loss
        shares = torch.from_numpy(lesson.shares[:, chosen]).float().to(self.device)
        features = torch.from_numpy(lesson.features).float().to(self.device)
        rows = torch.tensor(batch.taught, device=self.device)
        matched = F.mse_loss(self.matcher(embedding[rows]).float(), features)
        said = caption_loss(image[rows], concepts, shares, scale)
        return loss + recipe["captions"] * said + recipe["features"] * matched

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
    taught = recipe["teacher"]["taught"]
    real = [
        load_source(n, w, folder, root, None, show, taught) for n, w in recipe["shares"].items()
    ]
    names = [name for name in builtin.names() if not builtin.get(name).unseen]
    share = recipe["drawn_share"] / max(1, len(names))
    return real + [load_source(n, share, folder, root, recipe["drawn_items"], show) for n in names]


def train(
    run: Training, sources: Sequence[Source], *, save_every: int = 50, show: bool = True
) -> None:
    """Train to the last step of the recipe; writes `log.csv`, checkpoints and the export.

    Ctrl-C saves and stops; the next start continues at the same step.

    Raises:
        UserError: The loss is not finite.
    """
    log = run.folder / "log.csv"
    started = log.exists()
    shown = bar(
        None, "pretrain", total=run.recipe["steps"], initial=run.step, unit="step", show=show
    )
    with log.open("a", newline="") as handle, shown as progress:
        writer = csv.writer(handle)
        if not started:
            writer.writerow(["step", "loss", "rate", "dropped", "images_per_second", "seconds"])
        mean, begun = 0.0, time.perf_counter()
        try:
            while run.step < run.recipe["steps"]:
                loss = run.train_step(sources, run.recipe["templates"])
                if not math.isfinite(loss):
                    raise UserError(f"the loss is {loss} at step {run.step}; lower the rate")
                mean += loss / 25
                progress.update()
                if run.step % 25 == 0:
                    spent, begun = time.perf_counter() - begun, time.perf_counter()
                    run.seconds += spent
                    writer.writerow(
                        [
                            run.step,
                            f"{mean:.4f}",
                            f"{rate(run.step, run.recipe):.2e}",
                            dropped(run.step, run.recipe),
                            f"{25 * run.recipe['batch_size'] / spent:.1f}",
                            f"{run.seconds:.0f}",
                        ]
                    )
                    handle.flush()
                    mean = 0.0
                if run.step % save_every == 0:
                    run.save()
        finally:
            run.save()
    run.export(run.folder / "export")
