"""What is skipped because it changes nothing; each saving can be switched off."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vlmlayers.arguments import checked


@checked
@dataclass(frozen=True)
class Savings:
    """What is skipped because it changes nothing; each can be switched off.

    Attributes:
        cut_prompts: Prompts end at the longest end-of-text, not at 77 tokens (causal towers).
        text_prefix: Text activations below the first adapted block are computed once.
        image_prefix: Image activations below the first adapted block are computed without a
            graph, and once for all placements that are trained together.
        last_token: The last block computes the pooled token only, without other tokens' keys.
        fused: Standard blocks run with fewer passes over memory.
        onednn: Fused blocks multiply with oneDNN on a CPU in float32 where that is faster.
        text_features: Class features are kept between updates at evaluation.
    """

    cut_prompts: bool = True
    text_prefix: bool = True
    image_prefix: bool = True
    last_token: bool = True
    fused: bool = True
    onednn: bool = True
    text_features: bool = True

    @classmethod
    def none(cls) -> Savings:
        """Return the plain computation."""
        return cls(**dict.fromkeys((f.name for f in fields(cls)), False))
