"""A relative path that is not there is named with the folder that it was looked for in."""

from __future__ import annotations

import shlex

import pytest

from vlmlayers.cli import main

COMMANDS = {
    "study no.toml": "no.toml",
    "train mini-clip digits --out z --recipe no.toml": "no.toml",
    "train mini-clip digits --out z --choice no.json": "no.json",
    "train mini-clip digits --out z --method lweib --set descriptions=no.json": "no.json",
    "train mini-clip digits --out z --method no.py:Mine": "no.py",
    "select scores.csv --rule no.py:rule": "no.py",
    "extract mini-clip ./no --out z": "no",
    "extract mini-clip no.csv --out z": "no.csv",
    "data check no.toml": "no.toml",
}


@pytest.mark.parametrize(("command", "name"), COMMANDS.items())
def test_it_is_said_where_a_relative_path_was_looked_for(
    command, name, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.csv").write_text("metric,value\n")
    monkeypatch.setattr("sys.argv", ["vlmlayers", *shlex.split(command)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert f"(looked for {tmp_path / name})" in "".join(capsys.readouterr())


def test_a_home_after_an_equals_sign_is_found_as_well(call, monkeypatch, tmp_path):
    """Shells expand `~` at the start of a word alone, and a folder `~` would be made here."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    code, _, error = call("train", "mini-clip", "faces", "--out=~/file")
    assert code == 2 and str(tmp_path / "file") in error.replace("\n", "")
