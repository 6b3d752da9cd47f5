"""The command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from vlmlayers import cli


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `vlmlayers WORDS` in this process: exit code, output, errors."""

    def of(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlmlayers", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        read = capsys.readouterr()
        return code, read.out, read.err

    return of
