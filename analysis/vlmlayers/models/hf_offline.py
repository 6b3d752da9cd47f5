"""Dimensions of the Hugging Face text towers that open_clip names, so that they build offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlmlayers.errors import UserError

# Each as the config.json of its repository states it.
_ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-5,
}
_XLM = {**_ROBERTA, "model_type": "xlm-roberta", "vocab_size": 250002}
_MT5 = {
    "model_type": "mt5",
    "vocab_size": 250112,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_heads": 12,
    "is_encoder_decoder": True,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
    "layer_norm_epsilon": 1e-6,
}
_NLLB = {
    "model_type": "m2m_100",
    "vocab_size": 256206,
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "max_position_embeddings": 1024,
    "is_encoder_decoder": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "scale_embedding": True,
    "activation_function": "relu",
}
KNOWN: dict[str, dict[str, Any]] = {
    "roberta-base": _ROBERTA,
    "xlm-roberta-base": _XLM,
    "xlm-roberta-large": {
        **_XLM,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "google/mt5-base": _MT5,
    "google/mt5-xl": {
        **_MT5,
        "d_model": 2048,
        "d_ff": 5120,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 32,
    },
    "facebook/nllb-200-distilled-600M": _NLLB,
    "facebook/nllb-200-distilled-1.3B": {
        **_NLLB,
        "encoder_layers": 24,
        "decoder_layers": 24,
        "encoder_ffn_dim": 8192,
        "decoder_ffn_dim": 8192,
    },
}


@contextmanager
def text_config_offline(config: dict[str, Any]) -> Iterator[bool]:
    """Point a configuration's Hugging Face text tower at dimensions that are on this machine.

    Edits `config` in place; weights never come from the text tower's own repository.

    Yields:
        Whether the text tower is a Hugging Face one.

    Raises:
        UserError: `transformers` is not installed, or nothing is known of the text tower.
    """
    text = config["text_cfg"]
    name = text.get("hf_model_name")
    if not name:
        yield False
        return
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"text tower {name} needs Hugging Face transformers: pip install 'vlm-layers[hf]'"
        ) from error
    text["hf_model_pretrained"] = False
    if name not in KNOWN:
        if not Path(name).exists():
            raise UserError(
                f"dimensions of text tower {name!r} are not known offline; known: "
                f"{', '.join(KNOWN)}; or give hf_model_name a local folder with config.json"
            )
        yield True
        return
    with TemporaryDirectory(prefix="vlmlayers-") as folder:
        # transformers takes a folder for a repository, and then asks nothing of the network.
        (Path(folder) / "config.json").write_text(json.dumps(KNOWN[name]), encoding="utf-8")
        text["hf_model_name"] = folder
        yield True
