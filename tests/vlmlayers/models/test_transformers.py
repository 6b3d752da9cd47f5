"""Two-tower models of transformers: the same positions, poolings and spaces, their own features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers_models as tiny

from vlmlayers.models import Recorder, find_towers, wrap_model
from vlmlayers.models.transformers_towers import pack
from vlmlayers.positions import tower_positions


def own_features(model, **inputs):
    """Return what the model gives out by itself, and the states that it says it went through."""
    with torch.inference_mode():
        embed = model.get_text_features if "input_ids" in inputs else model.get_image_features
        found = embed(**inputs, output_hidden_states=True)
    return found.pooler_output.numpy(), [state.numpy() for state in found.hidden_states]


def record(tower, batch, spaces=("native", "normed", "joint"), pooling=None):
    with Recorder(tower, spaces, pooling) as recorder:
        return recorder(batch)


def inputs(kind, side):
    """Return the input of a tower as transformers takes it, and as a tower takes it."""
    if side == "text":
        return {"input_ids": tiny.token_ids()}, tiny.token_ids()
    if kind == "Siglip2":
        return tiny.patches(), pack(tiny.patches())
    return {"pixel_values": tiny.images()}, tiny.images()


def test_a_text_ends_at_the_token_that_the_model_names_and_not_at_the_largest():
    model, ids = tiny.build("CLIP"), tiny.token_ids()
    model.text_model.eos_token_id = model.text_model.config.eos_token_id = 1
    for row, text in enumerate(ids):
        text[row + 3] = 1  # behind words of 3 to 57, before padding of 59
    found = record(find_towers(model)["text"], ids)["joint"]
    np.testing.assert_allclose(found["3"], found["proj"], rtol=1e-4, atol=1e-5)


def test_models_whose_texts_end_at_other_tokens_are_told_apart():
    """A corrected config.json leaves the weights as they were, and not their features."""
    model = tiny.build("CLIP")
    known = wrap_model(model).identity()
    model.text_model.eos_token_id = 3
    now = wrap_model(model).identity()
    assert now["weights_hash"] == known["weights_hash"] and now != known


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("side", ["vision", "text"])
def test_positions_are_the_states_of_the_model_and_the_last_is_its_own_embedding(kind, side):
    model = tiny.build(kind)
    tower = find_towers(model)[side]
    theirs, ours = inputs(kind, side)
    embedding, states = own_features(model, **theirs)
    found = record(tower, ours)
    assert embedding.std() > 1e-2
    for position in (str(tower.depth), "proj"):
        np.testing.assert_allclose(found["joint"][position], embedding, atol=2e-5)
    for space in found:
        assert tuple(found[space]) == tuple(p for p in tower_positions(tower.depth, space))
    if tower.token_pooling == "mean":
        return
    row = {"cls": lambda x: x[:, 0], "model": lambda x: x[:, -1]}.get(tower.pooling)
    for position, state in zip(("embed", "1", "2"), states):
        if row is None:
            picked = state[np.arange(len(state)), tower.ends(ours).numpy()]
        else:
            picked = row(state)
        np.testing.assert_allclose(found["native"][position], picked, atol=2e-5)


def test_text_mean_covers_a_text_and_not_what_pads_it():
    model, ids = tiny.build("CLIP"), tiny.token_ids()
    _, states = own_features(model, input_ids=ids)
    found = record(find_towers(model)["text"], ids, ("native",), "mean")
    for row in range(len(ids)):
        expected = states[1][row, : row + 4].mean(0)  # three words and more, and the end
        np.testing.assert_allclose(found["native"]["1"][row], expected, atol=2e-5)


def test_siglip2_mean_covers_the_patches_of_an_image_and_not_what_pads_it():
    model, given = tiny.build("Siglip2"), tiny.patches()
    _, states = own_features(model, **given)
    found = record(find_towers(model)["vision"], pack(given), ("native",), "mean")
    for row, count in enumerate((16, 10, 9)):
        expected = states[2][row, :count].mean(0)
        np.testing.assert_allclose(found["native"]["2"][row], expected, atol=2e-5)
