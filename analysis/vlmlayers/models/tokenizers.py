"""The tokenizer of a text configuration: open_clip's own, or one of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor

from vlmlayers.errors import UserError, one_line
from vlmlayers.identity import short_digest

MARKED = 10_000  # texts whose tokens are looked at; of more, so many from all over


def make_tokenizer(text: Mapping[str, Any], folder: Path | None = None) -> Any:
    """Return the tokenizer of a text configuration.

    A tokenizer that has to come from the hub is fetched at its first use. Relative paths start at
    the folder of the configuration.

    Raises:
        UserError: Its vocabulary is missing, broken or larger than the model's.
    """
    length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    options = dict(text.get("tokenizer_kwargs", {}))
    hub = text.get("hf_tokenizer_name")
    if hub:
        local = folder / hub if folder is not None and (folder / hub).exists() else None
        return HubTokenizer(str(local or hub), length, text.get("tokenizer_mode"), options)
    if folder is not None and "bpe_path" in options:
        options["bpe_path"] = str(folder / options["bpe_path"])
    try:
        tokenizer = open_clip.SimpleTokenizer(context_length=length, **options)
    except (OSError, TypeError, ValueError, IndexError, EOFError) as error:
        raise UserError(f"tokenizer_kwargs {options} are wrong: {one_line(error)}") from error
    known = text.get("vocab_size", tokenizer.vocab_size)
    if known < tokenizer.vocab_size:
        raise UserError(
            f"text_cfg has vocab_size {known}, its tokenizer has {tokenizer.vocab_size} tokens; "
            "name the tokenizer's bpe_path in tokenizer_kwargs"
        )
    return tokenizer


def tokens_mark(
    tokenizer: Callable[[list[str]], Tensor], texts: Sequence[str], context: int
) -> str:
    """Return sixteen hexadecimal digits that change with the token ids of texts.

    Empty for the ids of OpenAI's vocabulary, which no file beside a model changes: what was made of
    them before ids were looked at stays good. Not where texts are cut off at another length than
    the model's, which nothing else tells.

    Args:
        tokenizer: Texts → (text, context) token ids.
        texts: The texts.
        context: Number of tokens that the text tower takes.
    """
    some = list(texts[:: 1 + len(texts) // MARKED])
    ids = tokenizer(some).long().cpu()  # of the user's own, maybe on the model's device
    usual = ids.shape[-1] == context or not ids[:, -1].any()
    if usual and ids.equal(_openais()(some, context_length=ids.shape[-1])):
        return ""
    return short_digest(str(ids.tolist()))


@cache
def _openais() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


@dataclass
class HubTokenizer:
    """A Hugging Face tokenizer, fetched at first use so that a model loads without it."""

    name: str
    context_length: int
    mode: str | None
    options: dict[str, Any]

    def __call__(self, texts: list[str]) -> Tensor:
        """Return token ids, (text, context)."""
        return self._inner(texts)

    @cached_property
    def _inner(self) -> Any:
        try:
            return open_clip.tokenizer.HFTokenizer(
                self.name,
                context_length=self.context_length,
                tokenizer_mode=self.mode,
                **self.options,
            )
        # transformers and the hub's client share no base of their errors.
        except Exception as error:
            raise UserError(
                f"tokenizer {self.name!r} cannot be loaded: {one_line(error)}; connect to the "
                "Hugging Face hub once, or put it in the local cache"
            ) from error
