"""Documents that are read and written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from vlmlayers.errors import UserError
from vlmlayers.files import (
    lock,
    read_csv,
    read_json,
    read_toml,
    write_csv,
    write_json,
    write_text,
    writing,
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    content = {"of": Path("é/x"), "rows": [1, 2.5, None], "deep": {"a": True}}
    assert read_json(write_json(tmp_path / "new" / "a.json", content)) == {**content, "of": "é/x"}


@pytest.mark.parametrize("read", [read_json, read_toml])
@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"x = " + b"[" * 9000, b"[" * 99_000])
def test_what_is_no_document_is_one_line(
    read: Callable[..., dict[str, Any]], text: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"a\.txt is not valid (JSON|TOML): ") as caught:
        read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(UserError, match=r"cannot read the thing .*absent: No such file"):
        read(tmp_path / "absent", "the thing")
    with pytest.raises(UserError, match=r"cannot read the thing .*: Is a directory"):
        read(tmp_path, "the thing")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"'])
def test_json_that_is_no_object(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.json must hold an object; write it anew$"):
        read_json(path, advice="write it anew")


def test_an_error_that_has_a_number_alone_is_told_in_the_systems_words(tmp_path: Path) -> None:
    error = OSError("Failed to open local file '.x.12-34.part'. Detail: [errno 13]")  # Arrow's
    error.errno = errno.EACCES
    with (
        pytest.raises(UserError, match=r"cannot write \S+/x: Permission denied; choose a folder"),
        writing(tmp_path / "x"),
    ):
        raise error


def test_names_in_tables_stay_as_they_were_written(tmp_path: Path) -> None:
    """Pandas by itself takes some for missing and others for numbers."""
    names = ["NA", "None", "007", "1e5", "null"]
    table = pd.DataFrame({"dataset": names, "placement": ["9", "NaN", "5-12", "1", ""]})
    table["hm"] = [1.5, np.nan, 2.0, 3.0, 4.0]
    file = write_csv(tmp_path / "a.csv", table)
    for missing in ("", "NA", "NaN"):  # as R, and others, write a number that is not there
        file.write_text(file.read_text().replace("NaN,\n", f"NaN,{missing}\n"))
        read = read_csv(file)
        assert read["dataset"].tolist() == names
        assert read["placement"].fillna("").tolist() == table["placement"].tolist()
        assert read["hm"].equals(table["hm"])


@pytest.mark.skipif(os.name == "nt", reason="asks whether a process is there by a signal")
def test_a_draft_goes_with_the_next_writing_once_its_process_is_gone(tmp_path: Path) -> None:
    writes = (
        "import sys, time; from pathlib import Path; from vlmlayers.files import atomically;"
        "atomically(Path(sys.argv[1]), lambda part: (part.write_text('half'),"
        "print(flush=True), time.sleep(60)))"
    )
    file = tmp_path / "a[1].csv"  # what a pattern would read as another name
    command = [sys.executable, "-c", writes, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (draft,) = tmp_path.glob(".*")
        elsewhere = draft.with_name(f".{file.name}.00000000-{process.pid}-1.part")
        elsewhere.touch()  # of a machine that shares the folder
        write_text(file, "whole")
        assert {*tmp_path.iterdir()} == {file, draft, elsewhere}, "it is being written"
        process.kill()
    write_text(file, "again")
    assert {*tmp_path.iterdir()} == {file, elsewhere}
    assert file.read_text() == "again"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_lock_ends_with_its_process_though_one_that_it_forked_lives_on(tmp_path: Path) -> None:
    """As one does that decodes images, for seconds after a kill."""
    held = (
        "import os, sys, time; from pathlib import Path; from vlmlayers.files import lock;"
        "handle = lock(Path(sys.argv[1])); child = os.fork();"
        # From the child, which by then has left the lock.
        "print(os.getpid(), flush=True) if not child else None; time.sleep(60)"
    )
    command = [sys.executable, "-c", held, str(tmp_path / "lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert lock(tmp_path / "lock") is None
        process.kill()
        process.wait()
        taken = lock(tmp_path / "lock")
        assert taken is not None
        taken.close()
    finally:
        os.kill(child, signal.SIGKILL)
