"""Plain transcriptions of the public training steps of other methods than MMA, to measure against.

Each does what its public code does and no more: prompts of 77 tokens through the whole text tower
at every step, activations laid out (token, item, width), images through the whole vision tower,
nothing cached but what that code keeps itself. They are written from the descriptions of the
methods, in float32, with parameters under the authors' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from public_recipe import Block, ScaleGradient
from torch import Tensor, nn
from torch.nn import functional as F

Prompts = dict[int, Tensor]
TEMPLATE = "a photo of a {}."


class Public:
    """Plain CLIP and the parameters of a method; subclasses say what a step minimises.

    Args:
        clip: A built-in open_clip `CLIP` with a vision transformer.
        parameters: Trainable values under the authors' names.
        names: Class names.
        others: Names of the dataset's other classes.
    """

    def __init__(
        self, clip: Any, parameters: dict[str, Tensor], names: Sequence[str], others: Sequence[str]
    ) -> None:
        self.clip, self.names, self.others = clip.requires_grad_(False), list(names), list(others)
        self.device = clip.logit_scale.device
        self.p = {
            name.removeprefix("prompt_learner."): nn.Parameter(value.clone())
            for name, value in parameters.items()
        }
        self.vision: list[Any] = [Block(b, None) for b in clip.visual.transformer.resblocks]
        self.text: list[Any] = [Block(b, clip.attn_mask) for b in clip.transformer.resblocks]
        for block in (*self.vision, *self.text):
            block.requires_grad_(False).to(self.device)
        self.tokens = self.tokenize(self.names)
        self.keep()

    def keep(self) -> None:
        """Compute what the public code computes once, before the first step."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a step."""
        raise NotImplementedError

    def tokenize(self, names: Sequence[str], template: str = TEMPLATE) -> Tensor:
        """Return token ids, (class, 77)."""
        words = [template.replace("{}", name.replace("_", " ")) for name in names]
        return open_clip.tokenize(words).to(self.device)

    def encode_images(self, images: Tensor, prompts: Prompts | None = None) -> Tensor:
        """Return joint features of unit length, deep prompts behind the patches."""
        visual, prompts = self.clip.visual, prompts or {}
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        x = x + visual.positional_embedding
        if 1 in prompts:
            x = torch.cat([x, prompts[1].expand(len(x), -1, -1)], 1)
        x = visual.ln_pre(x).transpose(0, 1)
        for number, block in enumerate(self.vision, 1):
            if number > 1 and number in prompts:
                new = prompts[number]
                x = torch.cat([x[: -len(new)], new[:, None].expand(-1, x.shape[1], -1)])
            x = block(x)
        return F.normalize(visual.ln_post(x[0]) @ visual.proj, dim=-1)

    def encode_texts(
        self, x: Tensor, tokens: Tensor, prompts: Prompts | None = None, unit: bool = True
    ) -> Tensor:
        """Return joint features of embedded prompts, deep prompts in place of the first words."""
        clip, prompts = self.clip, prompts or {}
        x = (x + clip.positional_embedding).transpose(0, 1)
        for number, block in enumerate(self.text, 1):
            if number > 1 and number in prompts:
                new = prompts[number]
                new = new[:, None].expand(-1, x.shape[1], -1)
                x = torch.cat([x[:1], new, x[1 + len(new) :]])
            x = block(x)
        x = clip.ln_final(x.transpose(0, 1))
        found = x[torch.arange(len(x)), tokens.argmax(-1)] @ clip.text_projection
        return F.normalize(found, dim=-1) if unit else found

    def with_context(self, context: Tensor, tokens: Tensor) -> Tensor:
        """Return embedded prompts whose first words are the context."""
        x, count = self.clip.token_embedding(tokens), context.shape[-2]
        return torch.cat([x[:, :1], context.expand(len(x), -1, -1), x[:, 1 + count :]], 1)

    @torch.no_grad()
    def plain_texts(self, names: Sequence[str], template: str, unit: bool = True) -> Tensor:
        """Return features of hand-made prompts."""
        tokens = self.tokenize(names, template)
        return self.encode_texts(self.clip.token_embedding(tokens), tokens, unit=unit)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return scaled products of unit features."""
        return self.clip.logit_scale.exp() * images @ texts.t()


class CoOp(Public):
    """One context for all classes."""

    def texts(self) -> Tensor:
        """Return features of the class prompts with context."""
        return self.encode_texts(self.with_context(self.p["ctx"], self.tokens), self.tokens)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self.logits(self.encode_images(images), self.texts()), labels)


class KgCoOp(CoOp):
    """CoOp near hand-made features, which are kept."""

    def keep(self) -> None:
        """Compute the hand-made features."""
        self.hand_made = self.plain_texts(self.names, TEMPLATE)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return cross-entropy and distance."""
        texts = self.texts()
        apart = 1 - F.cosine_similarity(texts, self.hand_made, eps=1e-7).mean()
        return F.cross_entropy(self.logits(self.encode_images(images), texts), labels) + 8 * apart


class CoCoOp(Public):
    """Context shifted by the image; the texts of each image one after another."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy."""
        p, features = self.p, self.encode_images(images)
        hidden = F.linear(features, p["meta_net.linear1.weight"], p["meta_net.linear1.bias"])
        shifts = F.linear(hidden.relu(), p["meta_net.linear2.weight"], p["meta_net.linear2.bias"])
        rows = []
        for feature, shift in zip(features, shifts):
            x = self.with_context(p["ctx"] + shift, self.tokens)
            rows.append(self.logits(feature, self.encode_texts(x, self.tokens)))
        return F.cross_entropy(torch.stack(rows), labels)


class ProDA(Public):
    """A group of contexts in front of, around and behind each class name."""

    GROUP = (0, 8, 16, 24)  # fixed here, so that both sides take the same

    def keep(self) -> None:
        """Count the tokens of each name."""
        length = self.p["ctx"].shape[1]
        words = " ".join(["X"] * length)
        self.tokens = self.tokenize(self.names, words + " {}.")
        self.bare = self.tokenize([""], words + ".")
        self.lengths = (self.tokens.argmax(-1) - length - 2).tolist()

    def prompts(self, number: int) -> Tensor:
        """Return embedded prompts of all classes with one context."""
        context, count = self.p["ctx"][number], len(self.p["ctx"])
        quarter, half = count // 4, len(context) // 2
        made = []
        for x, own in zip(self.clip.token_embedding(self.tokens), self.lengths):
            end = 1 + len(context) + own
            start, name, rest = x[:1], x[1 + len(context) : end], x[end:]
            if number < quarter:
                parts = [start, name, context, rest]
            elif number < 2 * quarter:
                parts = [start, context[:half], name, context[half:], rest]
            else:
                parts = [start, context, name, rest]
            made.append(torch.cat(parts))
        return torch.stack(made)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the bound of the cross-entropy and the overlap of bare prompts."""
        scale, f = self.clip.logit_scale.exp(), self.encode_images(images)
        x = torch.cat([self.prompts(number) for number in self.GROUP])
        texts = self.encode_texts(x, self.tokens.repeat(len(self.GROUP), 1))
        texts = texts.view(len(self.GROUP), len(self.names), -1)
        mean = texts.mean(0)
        apart = (texts - mean).permute(2, 1, 0)  # (joint, class, prompt)
        spread = apart @ apart.transpose(1, 2) / (len(texts) + 1)  # (joint, class, class)
        q = torch.einsum("bd,dij->bij", f.square(), spread)
        rows = torch.arange(len(f))
        own = q[rows, labels, labels][:, None]
        added = own + q.diagonal(dim1=1, dim2=2) - 2 * q[rows, labels]
        logits = scale * f @ mean.t() + scale.square() / 2 * added
        tokens = self.bare.expand(len(self.p["ctx"]), -1)
        bare = self.encode_texts(self.with_context(self.p["ctx"], tokens), tokens)
        overlap = (bare @ bare.t()).abs()
        pairs = len(bare) * (len(bare) - 1)
        overlap = (overlap.sum() - overlap.trace()) / pairs
        return F.cross_entropy(logits, labels) + 0.1 * overlap


class MaPLe(Public):
    """Deep text prompts, and vision prompts projected from them."""

    def deep(self) -> tuple[Prompts, Prompts]:
        """Return prompts of the vision and of the text tower by block."""
        p = self.p
        text: Prompts = {1: p["ctx"]}
        vision: Prompts = {1: F.linear(p["ctx"], p["proj.weight"], p["proj.bias"])}
        later = (name for name in p if name.startswith("compound_prompts_text."))
        for number in sorted(int(name.rpartition(".")[2]) for name in later):
            text[number + 2] = p[f"compound_prompts_text.{number}"]
            projection = f"compound_prompt_projections.{number}"
            vision[number + 2] = F.linear(
                text[number + 2], p[f"{projection}.weight"], p[f"{projection}.bias"]
            )
        return vision, text

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features of images and classes."""
        vision, text = self.deep()
        x = self.with_context(text[1], self.tokens)
        return self.encode_images(images, vision), self.encode_texts(x, self.tokens, text)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self.logits(*self.features(images)), labels)


class IVLP(MaPLe):
    """Deep prompts in both towers, free of each other."""

    def deep(self) -> tuple[Prompts, Prompts]:
        """Return prompts of the vision and of the text tower by block."""
        vision: Prompts = {1: self.p["image_encoder.VPT"]}
        text: Prompts = {1: self.p["ctx"]}
        for name, value in self.p.items():
            if name.endswith("VPT_shallow"):
                tower = vision if name.startswith("image") else text
                tower[int(name.split(".")[-2]) + 1] = value
        return vision, text


class PromptSRC(IVLP):
    """IVLP with three losses against forgetting; the frozen text features are kept."""

    templates: tuple[str, ...] = ()

    def keep(self) -> None:
        """Average the features of many templates."""
        each = [self.plain_texts(self.names, one, unit=False) for one in self.templates]
        self.frozen = F.normalize(torch.stack(each).mean(0), dim=-1)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return cross-entropy and the distances of texts, images and logits."""
        f, t = self.features(images)
        with torch.no_grad():
            f0 = self.encode_images(images)
            plain = self.logits(f0, self.frozen).softmax(-1)
        logits = self.logits(f, t)
        apart = 25 * (t - self.frozen).abs().mean() + 10 * (f - f0).abs().mean()
        divergence = (plain * (plain.log() - logits.log_softmax(-1))).mean()
        return F.cross_entropy(logits, labels) + apart + divergence


class RPO(Public):
    """Prompts that nothing attends to, by masks over all tokens of both towers."""

    def keep(self) -> None:
        """Make the masks, one for each class and head, and embed the class prompts."""
        count, length = len(self.p["text_prompt"]), self.tokens.shape[1]
        self.ends = self.tokens.argmax(-1) + 1
        masked = torch.arange(length, device=self.device) >= self.ends[:, None, None]
        mask = self.clip.attn_mask.expand(len(self.tokens), -1, -1).masked_fill(masked, -torch.inf)
        rows = torch.arange(length, device=self.device)
        prompt = (rows >= self.ends[:, None]) & (rows < self.ends[:, None] + count)
        heads = self.text[0].attn.num_heads
        self.places = prompt
        self.text_mask = mask.repeat_interleave(heads, 0)
        with torch.no_grad():
            self.embedded = self.clip.token_embedding(self.tokens) + self.clip.positional_embedding

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of the mean cosine of the pairs."""
        clip, count = self.clip, len(self.p["text_prompt"])
        visual = clip.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        x = x + visual.positional_embedding
        x = visual.ln_pre(torch.cat([x, self.p["img_prompt"].expand(len(x), -1, -1)], 1))
        mask = torch.zeros(x.shape[1], x.shape[1], device=self.device)
        mask[:, -count:] = -torch.inf
        x = _through(self.vision, x, mask)[:, -count:]
        f = F.normalize(visual.ln_post(x) @ visual.proj, dim=-1)
        prompts = self.p["text_prompt"].repeat(len(self.tokens), 1)
        x = self.embedded.masked_scatter(self.places[..., None], prompts)
        x = clip.ln_final(_through(self.text, x, self.text_mask))
        t = F.normalize(x[self.places].view(len(x), count, -1) @ clip.text_projection, dim=-1)
        logits = clip.logit_scale.exp() * torch.einsum("ikd,ckd->ic", f, t) / count
        return F.cross_entropy(logits, labels)


def _through(blocks: Sequence[Any], x: Tensor, mask: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    for block in blocks:
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        x = x + block.mlp(block.ln_2(x))
    return x.transpose(0, 1)


class LASP(Public):
    """CoOp with tuned vision norms and a text-to-text loss over all names, without noise here."""

    templates: tuple[str, ...] = ()

    def keep(self) -> None:
        """Put the tuned norms into the blocks and compute the references."""
        for number, block in enumerate(self.vision):
            for norm in ("ln_1", "ln_2"):
                key = f"image_encoder.transformer.resblocks.{number}.{norm}."
                like = getattr(block, norm)
                tuned = nn.LayerNorm(like.normalized_shape, eps=like.eps)
                tuned.weight, tuned.bias = self.p[f"{key}weight"], self.p[f"{key}bias"]
                setattr(block, norm, tuned)
        every = self.names + self.others
        self.tokens = self.tokenize(every)
        self.references = torch.stack([self.plain_texts(every, one) for one in self.templates])

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return cross-entropy and the text-to-text loss."""
        x = self.with_context(self.p["ctx"], self.tokens)
        texts = F.normalize(self.encode_texts(x, self.tokens, unit=False) + self.p["w"], dim=-1)
        logits = self.logits(self.encode_images(images), texts[: len(self.names)])
        between = self.logits(self.references.flatten(0, 1), texts)
        own = torch.arange(len(texts), device=self.device).repeat(len(self.references))
        return F.cross_entropy(logits, labels) + 5 * F.cross_entropy(between, own)


class CLIPAdapter(Public):
    """A perceptron on image features; the texts are encoded again at every step."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy."""
        visual = self.clip.visual
        with torch.no_grad():
            found = visual(images)
        v = found[0] if isinstance(found, tuple) else found
        a = F.linear(F.linear(v, self.p["fc.0.weight"]).relu(), self.p["fc.2.weight"]).relu()
        texts = self.plain_texts(self.names, TEMPLATE)
        return F.cross_entropy(self.logits(F.normalize(0.2 * a + 0.8 * v, dim=-1), texts), labels)


class CLIPLoRA(Public):
    """Low-rank terms of queries, keys and values in every block of both towers, no dropout here."""

    RANK_SCALE = 2**-0.5  # alpha 1 over the root of rank 2

    def keep(self) -> None:
        """Give the blocks of both towers their terms."""
        for blocks, tower in ((self.vision, "visual.transformer"), (self.text, "transformer")):
            for number, block in enumerate(blocks):
                start = f"{tower}.resblocks.{number}.attn."
                block.attn = _LowRank(block.attn, self.p, start, self.RANK_SCALE)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy at a scale of 100."""
        x = self.clip.token_embedding(self.tokens)
        logits = 100 * self.encode_images(images) @ self.encode_texts(x, self.tokens).t()
        return F.cross_entropy(logits, labels)


class _LowRank(nn.Module):
    """Attention over (token, item, width) whose projections stand apart, with low-rank terms."""

    def __init__(self, attn: Any, p: dict[str, nn.Parameter], start: str, scale: float) -> None:
        super().__init__()
        self.frozen, self.terms, self.scale = attn, p, scale
        self.start = start

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, need_weights: bool, attn_mask: Tensor | None
    ) -> tuple[Tensor, None]:
        """Return the attention's output, as torch's own does."""
        attn = self.frozen
        made: list[Any] = []
        weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
        for name, x, weight, bias in zip("qkv", (q, k, v), weights, biases):
            down, up = (self.terms[f"{self.start}{name}_proj.w_lora_{one}"] for one in "AB")
            y = F.linear(x, weight, bias) + F.linear(F.linear(x, down), up) * self.scale
            made.append(y.unflatten(-1, (attn.num_heads, -1)).permute(1, 2, 0, 3))
        q, k, v = made
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return attn.out_proj(out.permute(2, 0, 1, 3).flatten(2)), None


class LwEIB(Public):
    """Depthwise convolutions in every block of both towers; here slow, one description a class."""

    ALPHA, DESCRIPTION = 0.025, "{}, Seen from close by."

    def keep(self) -> None:
        """Tokenize the described prompts and give the blocks of both towers their convolutions."""
        self.tokens = self.tokenize(self.names, self.DESCRIPTION.format(TEMPLATE[:-1]))
        self.vision, self.text = (
            [_Convolving(block, self.p, f"{tower}_adapter.{number}.", self.ALPHA)
             for number, block in enumerate(blocks, 1)]
            for tower, blocks in (("visual", self.vision), ("text", self.text))
        )  # fmt: skip

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy among the classes of the step."""
        texts = self.encode_texts(self.clip.token_embedding(self.tokens), self.tokens)
        return F.cross_entropy(self.logits(self.encode_images(images), texts), labels)


class _Convolving(nn.Module):
    """A block over (token, item, width) with a convolution before attention and in the MLP."""

    def __init__(self, block: Any, p: dict[str, nn.Parameter], start: str, alpha: float) -> None:
        super().__init__()
        self.block, self.alpha = block, alpha
        self.kernels = [p[f"{start}{place}_conv.conv.weight"] for place in ("att", "mlp")]

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        block: Any = self.block
        first, second = self.kernels
        y = self.convolved(block.ln_1(x), first)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=block.mask)[0]
        mlp = block.mlp
        hidden = self.convolved(mlp.c_fc(block.ln_2(x)), second)
        return x + mlp.c_proj(mlp.gelu(hidden))

    def convolved(self, u: Tensor, kernel: Tensor) -> Tensor:
        """Return u + alpha · conv(u); the kernel's gradient is that of an alpha of 1."""
        u = u.permute(1, 2, 0)  # (item, width, token)
        passed = ScaleGradient.apply(u, self.alpha)
        if kernel.ndim == 3:
            y = F.conv1d(passed, kernel, padding=1, groups=len(kernel))
        else:
            side = round((u.shape[-1] - 1) ** 0.5)
            patches = passed[..., 1:].unflatten(-1, (side, side))
            y = F.conv2d(patches, kernel, padding=1, groups=len(kernel)).flatten(2)
            y = torch.cat([torch.zeros_like(u[..., :1]), y], -1)
        return (u + ScaleGradient.apply(y * self.alpha, 1 / self.alpha)).permute(2, 0, 1)


class TipF(Public):
    """The keys of a cache; texts and values are made once, images encoded at every step."""

    ALPHA, BETA = 1.17, 1.0
    cached: Tensor  # classes of the cache's items, (item,)

    def keep(self) -> None:
        """Compute the text features and the values."""
        self.texts = self.plain_texts(self.names, TEMPLATE)
        self.values = F.one_hot(self.cached, len(self.names)).float()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of text and cache together."""
        with torch.no_grad():
            f = self.encode_images(images)
        votes = (-1 * (self.BETA - self.BETA * F.linear(f, self.p["keys"]))).exp() @ self.values
        return F.cross_entropy(100 * f @ self.texts.t() + self.ALPHA * votes, labels)


PUBLIC: dict[str, type[Public]] = {
    "coop": CoOp,
    "cocoop": CoCoOp,
    "kgcoop": KgCoOp,
    "proda": ProDA,
    "maple": MaPLe,
    "ivlp": IVLP,
    "promptsrc": PromptSRC,
    "rpo": RPO,
    "lasp": LASP,
    "clipadapter": CLIPAdapter,
    "cliplora": CLIPLoRA,
    "lweib": LwEIB,
    "tip-f": TipF,
}
