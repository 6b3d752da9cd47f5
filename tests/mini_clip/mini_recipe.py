"""A recipe so small that a step takes milliseconds."""

from __future__ import annotations

from mini_clip.loop import Recipe, load_recipe


def tiny_recipe(**changes: object) -> Recipe:
    recipe = load_recipe(steps=4) | {"batch_size": 12, "warmup": 2, "merges": 300}
    recipe["teacher"] = recipe["teacher"] | {"taught": False}
    model = recipe["model"]
    recipe["model"] = model | {
        "embed_dim": 32,
        "vision_cfg": model["vision_cfg"] | {"layers": 2, "width": 32, "head_width": 16},
        "text_cfg": model["text_cfg"] | {"layers": 2, "width": 32},
    }
    return recipe | changes
