"""Prompts with learned context: token ids, slots, room, and what is written into them."""

from __future__ import annotations

import pytest
import torch
from backbones import backbone as new_model
from backbones import shared_backbone

from vlmadapters.clip.frozen import Backbone
from vlmadapters.methods.context import (
    context_prompts,
    context_state,
    random_vectors,
    word_vectors,
)
from vlmlayers.errors import UserError

NAMES = ("golden_retriever", "tabby cat", "Boeing 747-400", "Dr.")


def walks(family: str = "clip") -> Backbone:
    model = shared_backbone(family)
    return Backbone(model.clip, tokenizer=model.tokenizer)


def words_of(backbone: Backbone, ids: torch.Tensor) -> list[str]:
    return [backbone.tokenizer.decode([int(token)]).strip() for token in ids]


@pytest.mark.parametrize(
    ("class_at", "expected", "slots"),
    [
        ("end", "a photo of the tabby cat .", [1, 2, 3, 4]),
        ("middle", "a photo tabby cat of the .", [1, 2, 5, 6]),
        ("front", "tabby cat a photo of the .", [3, 4, 5, 6]),
    ],
)
def test_the_context_stands_around_the_name(class_at: str, expected: str, slots: list[int]) -> None:
    backbone = walks()
    words = ["a", "photo", "of", "the"]
    tokens, found = context_prompts(backbone, NAMES, words, class_at=class_at)
    assert words_of(backbone, tokens[1, 1:8]) == expected.split()
    assert found[1].tolist() == slots
    ends = backbone.tokens([f"a photo of the {name.replace('_', ' ')}." for name in NAMES])
    assert torch.equal(tokens.argmax(1), ends.argmax(1))
    contexts = tokens.gather(1, found)
    assert (contexts == contexts[:1]).all()


def test_an_odd_context_has_its_smaller_half_first() -> None:
    _, slots = context_prompts(walks(), ["cat"], ["X"] * 5, class_at="middle")
    assert slots.tolist() == [[1, 2, 4, 5, 6]]


def test_tokens_beyond_the_slots_stay() -> None:
    backbone = walks()
    tokens, slots = context_prompts(backbone, ["cat"], ["a", "photo", "of", "a"], 2, "front")
    assert words_of(backbone, tokens[0, 1:7]) == ["of", "a", "cat", "a", "photo", "."]
    assert slots.tolist() == [[4, 5]]


def test_an_empty_name_gives_the_prompt_without_a_class() -> None:
    backbone = walks()
    tokens, _ = context_prompts(backbone, [""], ["X", "X"])
    assert torch.equal(tokens, backbone.tokens(["X X."]))


@pytest.mark.parametrize("family", ["clip", "custom text", "no causal mask, last token"])
@pytest.mark.parametrize("class_at", ["end", "middle", "front"])
def test_the_words_own_embeddings_change_nothing(family: str, class_at: str) -> None:
    backbone = walks(family)
    words = ["a", "photo", "of", "a"]
    tokens, slots = context_prompts(backbone, NAMES, words, class_at=class_at)
    state = context_state(backbone, tokens, slots, 1)
    assert state.x is not None
    written = state.note.write(state.x, word_vectors(backbone, words), 1)
    torch.testing.assert_close(written, state.x)
    other = state.note.write(state.x, random_vectors(4, 32, seed=0), 1)
    changed = (other != state.x).any(-1)
    assert torch.equal(changed.nonzero(as_tuple=True)[1].view(4, 4).sort(1)[0], slots.sort(1)[0])


def test_a_name_without_room_is_refused_with_the_limit() -> None:
    backbone = walks()
    context_prompts(backbone, ["cat"], ["X"] * 73)
    with pytest.raises(UserError, match=r"'cat' takes 4 tokens .* context 74; .* 77 at most.* 73"):
        context_prompts(backbone, ["cat"], ["X"] * 74)
    # The tokenizer cuts these words themselves.
    with pytest.raises(UserError, match=r"'cat' takes 4 tokens .* context 80; .* 77 at most.* 73"):
        context_prompts(backbone, ["cat"], ["X"] * 80)
    with pytest.raises(UserError, match="shorten the name"):
        context_prompts(backbone, ["cat " * 90], ["X"])


def test_words_with_too_few_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="'a photo' has 2 tokens, too few for a context of 3"):
        context_prompts(walks(), ["cat"], ["a", "photo"], 3)


def test_context_is_drawn_without_touching_the_global_state() -> None:
    before = torch.random.get_rng_state()
    drawn = random_vectors(200, 50, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(drawn, random_vectors(200, 50, seed=3))
    assert abs(float(drawn.std()) - 0.02) < 5e-4


def test_a_text_tower_that_runs_whole_is_refused() -> None:
    model = new_model()
    backbone = Backbone(model.clip, tokenizer=model.tokenizer)
    backbone.text.steps = False
    tokens, slots = context_prompts(backbone, ["cat"], ["X"])
    with pytest.raises(UserError, match="no place in this text tower"):
        context_state(backbone, tokens, slots, 1)
