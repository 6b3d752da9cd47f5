"""Bars are for eyes: on a terminal, not in a file."""

from __future__ import annotations

import sys

import pytest

from vlmlayers.progress import track


@pytest.mark.parametrize(("terminal", "show"), [(True, True), (True, False), (False, True)])
def test_a_bar_is_shown_on_a_terminal_where_it_is_wanted(
    terminal: bool,
    show: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(track([1, 2, 3], "counting", show=show)) == [1, 2, 3]
    assert ("counting" in capsys.readouterr().err) == (terminal and show)
