"""Damaged files of every kind end in data or in one line, never in a traceback or a hang."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from fuzzing import SHARES, Broken, Target, fuzz, spliced, targets

from vlmlayers.errors import UserError

# The default is for every day; the documentation says what a run of 120,000 came to.
MANY = int(os.environ.get("VLMLAYERS_FUZZ", "12000"))


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    found = targets(tmp_path_factory.mktemp("fuzz"))
    assert set(found) == set(SHARES)
    return found


@pytest.mark.parametrize("name", SHARES)
def test_whole_files_are_read(readers: dict[str, Target], name: str) -> None:
    """What is refused further down is refused for its damage."""
    kind = readers[name]
    for whole in kind.seeds:
        found = fuzz(replace(kind, seeds=[whole], damage=lambda random, data: data), 1)
        assert (found.accepted, found.broken) == (1, [])


@pytest.mark.parametrize("name", SHARES)
def test_a_few_damaged_files(readers: dict[str, Target], name: str) -> None:
    found = fuzz(readers[name], max(12, round(600 * SHARES[name])), seed=1)
    assert found.broken == []
    assert found.refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARES)
def test_many_damaged_files(readers: dict[str, Target], name: str) -> None:
    found = fuzz(readers[name], round(MANY * SHARES[name]), seed=2)
    assert found.broken == []


def test_the_harness_sees_what_it_looks_for() -> None:
    """A reader that crashes, hangs, is wordy or greedy is found out."""

    def crashes(data: bytes) -> None:
        raise KeyError(data[:3])

    def hangs(data: bytes) -> None:
        while True:
            pass

    def wordy(data: bytes) -> None:
        error = UserError("x")
        error.args = ("two\nlines",)
        raise error

    def greedy(data: bytes) -> None:
        np.ones(140_000_000).sum()

    def fine(data: bytes) -> None:
        raise UserError("no")

    for read, words in (
        (crashes, "KeyError"), (hangs, "more than 5"), (wordy, "not one line"),
        (greedy, "KiB more memory"),
    ):  # fmt: skip
        (line,) = fuzz(Target("t", [b"abc"], read, spliced([b""])), 1).broken
        assert words in line
    assert fuzz(Target("t", [b"abc"], fine, spliced([b""])), 5).refused == 5
    assert issubclass(Broken, AssertionError)
