"""Load folders of the Hugging Face hub that hold models of transformers or timm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from torch import nn

from vlmlayers.architectures import FOREIGN_CONFIG, read_foreign
from vlmlayers.errors import UserError, one_line
from vlmlayers.files import find_weights
from vlmlayers.models.modes import in_float32, seeded

_SHOWN = 3
# Where the second is not said, transformers asks at the terminal whether to run a folder's code.
LOCALLY = {"local_files_only": True, "trust_remote_code": False}


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds the configuration of a model of transformers or timm."""
    return (folder / FOREIGN_CONFIG).is_file()


def load_folder(folder: Path, random_weights: bool) -> tuple[nn.Module, str]:
    """Return the model of a folder, in eval mode, and the name of its file of weights.

    Args:
        folder: `config.json` and weights.
        random_weights: Build it untrained, the same each time.

    Raises:
        UserError: Configuration, model or weights cannot be loaded, weights are missing, or it
            would have to run code of its own.
    """
    timms = "architecture" in read_foreign(folder)
    weights = "random" if random_weights else find_weights(folder).name
    make = _timm if timms else _transformers
    try:
        with seeded(0), in_float32():
            model = make(folder, random_weights)
    except UserError:
        raise
    except Exception as error:  # these libraries raise what they like on files that do not fit
        raise UserError(f"{folder} cannot be loaded: {one_line(error)}") from error
    return model.eval(), weights


def _timm(folder: Path, random_weights: bool) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=not random_weights)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' progress bars meanwhile: it draws them into log files as well."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _transformers(folder: Path, random_weights: bool) -> Any:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise UserError(
            f"{folder} holds a model of transformers: pip install 'vlm-layers[hf]'"
        ) from error
    if random_weights:
        config = AutoConfig.from_pretrained(folder, **LOCALLY)
        return AutoModel.from_config(config)
    # transformers only warns of missing weights and leaves them random: hence the loading report.
    with _without_bars():
        model, found = AutoModel.from_pretrained(folder, **LOCALLY, output_loading_info=True)
    # The pooler of a classification that the weights were made for is no part of the features.
    lacks = [key for key in found["missing_keys"] if not key.startswith("pooler.")]
    lacks += [str(entry[0]) for entry in found.get("mismatched_keys", ())]
    if lacks:
        more = ", …" if len(lacks) > _SHOWN else ""
        raise UserError(
            f"the weights of {folder} do not fit its configuration: {len(lacks)} missing or of "
            f"another shape ({', '.join(sorted(lacks)[:_SHOWN])}{more})"
        )
    return model
