"""The adapter against numbers recorded from the authors' code, and against its own definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F

from vlmadapters.config import MMAConfig
from vlmadapters.mma import attach, class_logits


class Golden:
    """The recorded run: arrays by key, and the configuration."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "mma_tiny.json").read_text())
        self.arrays = np.load(folder / "mma_tiny.npz")

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        keys = [key for key in self.arrays.files if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.tensor(key) for key in keys}

    def clip(self) -> open_clip.CLIP:
        clip = open_clip.model.CLIP(**self.config["model_cfg"])
        clip.load_state_dict(self.group("state/"))
        return clip.eval()

    def adapter_config(self) -> MMAConfig:
        a = self.config["adapter"]
        return MMAConfig.span(a["start"], a["end"], dim=a["dim"], scale=a["scale"])


@pytest.fixture(scope="module")
def golden(shared_golden: Path) -> Golden:
    return Golden(shared_golden)


def test_plain_clip_agrees_before_anything_is_attached(golden: Golden) -> None:
    logits = class_logits(golden.clip(), golden.tensor("images")[0], golden.tensor("tokens"))
    torch.testing.assert_close(logits, golden.tensor("clip/logits"), atol=1e-5, rtol=1e-5)


def test_logits_and_first_gradients_agree_with_the_authors_code(golden: Golden) -> None:
    clip = golden.clip()
    with attach(clip, golden.adapter_config()) as mma:
        mma.load_official_state_dict(golden.group("adapter_init/"))
        logits = class_logits(clip, golden.tensor("images")[0], golden.tensor("tokens"))
        torch.testing.assert_close(logits, golden.tensor("mma/logits"), atol=1e-5, rtol=0)
        F.cross_entropy(logits, golden.tensor("labels")[0]).backward()
        for key, parameter in mma.named_official_parameters():
            expected = golden.tensor(f"grad/{key}")
            assert parameter.grad is not None
            error = (parameter.grad - expected).norm() / expected.norm()
            assert error < 1e-4, key


def test_five_steps_follow_the_authors_trajectory(golden: Golden) -> None:
    clip, losses = golden.clip(), []
    o = golden.config["optimizer"]
    with attach(clip, golden.adapter_config()) as mma:
        mma.load_official_state_dict(golden.group("adapter_init/"))
        optimizer = torch.optim.SGD(
            mma.parameters(), lr=o["lr"], momentum=o["momentum"], weight_decay=o["weight_decay"]
        )
        for images, labels in zip(golden.tensor("images"), golden.tensor("labels")):
            loss = F.cross_entropy(class_logits(clip, images, golden.tensor("tokens")), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        final = class_logits(clip, golden.tensor("images")[0], golden.tensor("tokens"))
    np.testing.assert_allclose(losses, golden.arrays["losses"], atol=1e-5)
    torch.testing.assert_close(final, golden.tensor("mma/final_logits"), atol=1e-5, rtol=0)
    for key, value in mma.official_state_dict().items():
        torch.testing.assert_close(
            value, golden.tensor(f"adapter_final/{key}"), atol=1e-6, rtol=1e-5
        )


def test_the_benchmarks_transcription_agrees_with_the_authors_code(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    from public_recipe import PublicMMA

    public = PublicMMA(golden.clip(), golden.adapter_config())
    initial = golden.group("adapter_init/")
    parameters = public.adapter_parameters()
    assert parameters.keys() == initial.keys()
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(initial[key])
    logits = public(golden.tensor("images")[0], golden.tensor("tokens"))
    torch.testing.assert_close(logits, golden.tensor("mma/logits"), atol=1e-5, rtol=0)
    F.cross_entropy(logits, golden.tensor("labels")[0]).backward()
    for key, parameter in parameters.items():
        expected = golden.tensor(f"grad/{key}")
        assert (parameter.grad - expected).norm() / expected.norm() < 1e-4, key
