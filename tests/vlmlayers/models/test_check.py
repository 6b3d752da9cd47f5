"""The check of architectures: found, or refused with a reason that is right."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest

from vlmlayers.errors import UserError
from vlmlayers.models import check, models_check, summary
from vlmlayers.study.catalogue import models_text

SOME = [
    "RN50",
    "ViT-B-32-quickgelu",
    "ViT-B-32-SigLIP2-256",
    "coca_ViT-B-32",
    "convnext_tiny",
    "MobileCLIP-S1",
    "mt5-base-ViT-B-32",
]


def test_a_family_of_each_kind_is_found_without_weights():
    table = models_check(SOME).set_index("model")
    assert summary(table.reset_index()) == "7 of 7 architectures: both towers found"
    assert table.loc["RN50", ["vision_kind", "vision_blocks", "joint_positions"]].tolist() == [
        "stages",
        4,
        "last stage",
    ]
    assert table.loc[
        "ViT-B-32-quickgelu",
        ["vision_blocks", "vision_width", "text_width", "vision_pooling", "text_pooling"],
    ].tolist() == [12, 768, 512, "cls", "eot"]
    assert table.loc["ViT-B-32-SigLIP2-256", "vision_pooling"] == "model (attention pool)"
    assert table.loc["coca_ViT-B-32", "text_pooling"] == "cls"
    assert table.loc["mt5-base-ViT-B-32", "text_family"] == "HF mt5"


def test_a_refusal_says_why(monkeypatch):
    def refuse(clip):
        raise UserError("no vision tower is known in Odd")

    monkeypatch.setattr(check, "find_vision", refuse)
    table = models_check(["ViT-S-32"])
    assert table.loc[0, ["status", "reason"]].tolist() == [
        "refused",
        "no vision tower is known in Odd",
    ]
    assert summary(table) == "0 of 1 architectures: both towers found"


def test_the_check_reads_well_at_80_columns(monkeypatch):
    lines = models_text(SOME, check=True).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(
        " ".join(line.split()) == "RN50 4 stages × 2048 attention 12 × 512 eot" for line in lines
    )
    assert "Stages count as blocks" in lines[-2]
    assert lines[-1] == "7 of 7 architectures: both towers found"

    def refuse(clip):
        raise UserError("no vision tower is known in Odd")

    monkeypatch.setattr(check, "find_vision", refuse)
    lines = models_text(["ViT-S-32"], check=True).splitlines()
    assert lines[1].split() == ["ViT-S-32", "refused"]
    assert lines[-2:] == [
        "ViT-S-32: no vision tower is known in Odd",
        "0 of 1 architectures: both towers found",
    ]


def test_the_list_of_all_architectures_fits_a_terminal() -> None:
    lines = models_text().splitlines()
    assert len(lines) > 100 and max(map(len, lines)) <= 80


def test_unknown_architecture_is_refused():
    with pytest.raises(UserError, match="did you mean 'ViT-B-32'"):
        models_check(["VITB32"])


@pytest.mark.slow
def test_every_architecture_of_open_clip_is_found():
    table = models_check()
    assert table["model"].tolist() == open_clip.list_models()
    assert table.loc[table["status"] != "found", ["model", "reason"]].to_numpy().tolist() == []


def test_a_model_of_ones_own_is_no_unknown_name(tmp_path: Path) -> None:
    """146 names of open_clip were listed as the valid ones."""
    with pytest.raises(UserError, match=rf"of your own.*load_model\('{tmp_path}'\)\.towers"):
        models_text([str(tmp_path)])
