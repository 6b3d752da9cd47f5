"""Settings that cannot be meant, of every method: refused in one line that names the setting."""

from __future__ import annotations

from typing import Any

import pytest

from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.configs import CoOpConfig, LASPConfig, ProDAConfig
from vlmadapters.methods.deep_configs import (
    CLIPLoRAConfig,
    IVLPConfig,
    LwEIBConfig,
    MaPLeConfig,
    PromptSRCConfig,
    RPOConfig,
)
from vlmadapters.methods.head_configs import CLIPAdapterConfig, LinearProbeConfig, TipConfig
from vlmlayers.errors import UserError


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        (CLIPAdapterConfig, {"ratio": 0, "text_ratio": 0}, "nothing is adapted"),
        (CLIPAdapterConfig, {"ratio": 1.5}, "ratio takes a number from 0 to 1, not 1.5"),
        (CLIPAdapterConfig, {"reduction": 0}, "reduction takes a whole number from 1"),
        (CLIPAdapterConfig, {"vision": (1,)}, "clipadapter has no placement"),
        (CLIPLoRAConfig, {}, "cliplora has no block in either tower"),
        (
            CLIPLoRAConfig,
            {"text": (1,), "matrices": ()},
            "matrices is empty; name some of q, k, v, o",
        ),
        (CLIPLoRAConfig, {"text": (1,), "matrices": ("q", "q")}, "matrices is q, q; name some of"),
        (CLIPLoRAConfig, {"text": (1,), "matrices": ("w",)}, "matrices"),
        (CLIPLoRAConfig, {"text": (1,), "dropout": 1}, "dropout is 1, which drops all"),
        (CLIPLoRAConfig, {"text": (1,), "rank": 0}, "rank takes a whole number from 1"),
        (CoOpConfig, {"text": ()}, "coop has no text block"),
        (CoOpConfig, {"vision": (1,)}, "coop acts at no vision block; name text blocks only"),
        (CoOpConfig, {"length": 6}, r"starts from 4 words \('a photo of a'\), and length is 6"),
        (CoOpConfig, {"length": -1}, "length takes a whole number from 0, not -1"),
        (CoOpConfig, {"class_at": "back"}, "class_at takes 'end', 'middle' or 'front', not 'back'"),
        (CoOpConfig, {"words": 3}, "words takes a string, not 3"),
        (IVLPConfig, {}, "ivlp has no block in either tower"),
        (
            IVLPConfig,
            {"vision": (1,), "vision_length": 0},
            "vision_length takes a whole number from 1, not 0",
        ),
        (IVLPConfig, {"text": (1,), "text_length": 2.5}, "text_length takes a whole number"),
        (IVLPConfig, {"text": (1, 1)}, "twice"),
        (LASPConfig, {"text": (1,)}, "lasp acts at no text block; name vision blocks only"),
        (LASPConfig, {"weight": -1.0}, "weight takes a number from 0"),
        (LASPConfig, {"templates": ("a photo",)}, "templates takes .* exactly once"),
        (LASPConfig, {"other_names": "all"}, "other_names"),
        (LASPConfig, {"length": 3}, "starts from 4 words"),
        (LinearProbeConfig, {"vision": (1,)}, "linear-probe has no placement"),
        (LinearProbeConfig, {"inverse_penalties": ()}, "name one value or more, all above 0"),
        (
            LinearProbeConfig,
            {"inverse_penalties": (1.0, 0.0)},
            "name one value or more, all above 0",
        ),
        (LinearProbeConfig, {"iterations": 0}, "iterations takes a whole number from 1"),
        (LwEIBConfig, {}, "lweib has no block in either tower"),
        (LwEIBConfig, {"text": (1,), "alpha": 0}, "alpha takes a number above 0, not 0"),
        (LwEIBConfig, {"text": (1,), "slow": 1.5}, "slow takes a number from 0 to 1"),
        (LwEIBConfig, {"text": (1,), "negatives": -2}, "negatives takes a whole number from -1"),
        (MaPLeConfig, {"text": (1,)}, "name vision blocks, or take ivlp"),
        (MaPLeConfig, {"vision": (1,), "length": 0}, "length takes a whole number from 1, not 0"),
        (ProDAConfig, {"prompts": 5, "group": 5}, "must be a multiple of 4, or 1"),
        (
            ProDAConfig,
            {"prompts": 8, "group": 3},
            r"group is 3, which does not divide prompts \(8\)",
        ),
        (ProDAConfig, {"length": 0}, "length takes a whole number from 1, not 0"),
        (ProDAConfig, {"vision": (1,)}, "proda acts at no vision block"),
        (PromptSRCConfig, {}, "promptsrc has no block in either tower"),
        (PromptSRCConfig, {"text": (1,), "templates": ("a", "{}")}, "templates takes .*, not 'a'"),
        (PromptSRCConfig, {"text": (1,), "spread": 0}, "spread takes a number above 0, not 0"),
        (PromptSRCConfig, {"text": (1,), "image_weight": -1}, "image_weight takes a number from 0"),
        (RPOConfig, {"vision": (1,)}, "rpo has no text block"),
        (RPOConfig, {"text": (1,)}, "rpo has no vision block"),
        (
            RPOConfig,
            {"vision": (1,), "text": (1,), "pairs": 0},
            "pairs takes a whole number from 1, not 0",
        ),
        (TipConfig, {"vision": (1,)}, "tip has no placement: it acts at no block of either tower"),
        (TipConfig, {"alpha": -1.0}, "alpha takes a number from 0"),
        (TipConfig, {"views": 0}, "views takes a whole number from 1"),
        (TipConfig, {"templates": ("a photo",)}, "templates takes .* exactly once"),
    ],
)
def test_bad_settings_are_one_line(
    kind: type[MethodConfig], settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        kind(**settings)
