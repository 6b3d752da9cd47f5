"""Recipes under the path that scripts written for 0.1.0 import them from."""

from vlmadapters.training.recipes import Recipe, TrainConfig, load_recipe

__all__ = ["Recipe", "TrainConfig", "load_recipe"]
