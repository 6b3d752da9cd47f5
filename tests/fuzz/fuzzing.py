"""Damaged input by the thousand: every reader of the toolkit, and what it may do with it.

    python tests/fuzz/fuzzing.py [--inputs 120000] [--seed 0] [TARGET …]

A case is a whole file of a kind, damaged at a few random places. The answer has to be data or one
line of refusal; never a traceback, five seconds, or a gigabyte.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
REPOSITORY = HERE.parents[2]
for folder in ("vlmlayers", "vlmadapters"):
    sys.path.append(str(REPOSITORY / "tests" / folder))

import tiny  # noqa: E402

from vlmlayers.errors import UserError  # noqa: E402

SECONDS = 5.0
KIB = 1_000_000
ODD_TEXT = [
    b"", b'"', b"[", b"]", b"{", b"}", b"..", b"/", b"\\", b"\n", b"\0", b"-1", b"9" * 30,
            b"NaN", b"1e999", b"true", b"null", b'"\\ud800"', b"\xff", b"= ", b"../", b"{}", b"[[",
            b"<script>", b"train", b"inf", b",", b":", b"[1e3]", b"{}={}", b"'''", b"-0.0",
            "\u202egnp".encode(), "\U0001f408".encode(), b"1_0", b"0x10", b"1979-05-27",
]  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 10**30, 1.5, float("nan"), float("inf"), "", "..", "../../etc/passwd",
    "/etc/passwd", "\0", "<script>alert(1)</script>", "{}", "{0.__class__}", "%s%n", "\u202e\u2066",
    "a" * 10_000, [], [[]], {}, {"towers": 1}, [None], ["5-12"], {"vision": {"depth": "x"}}, "\n",
]  # fmt: skip
BYTES = [b"", b"\0", b"\xff", b"\x80", b"\x7f\xff\xff\xff", b"\0\0\0\0\0\0\0\x80", b"PK\x05\x06",
         b"PK\x03\x04", b"PAR1", b"\x80\x02c", b"cos\nsystem\n"]  # fmt: skip


class Broken(AssertionError):
    """A reader did with a damaged file what it must not."""


@dataclass
class Outcome:
    """What the cases of one target came to."""

    target: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    longest: float = 0.0
    grown_kib: int = 0
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: Kind of file.
        seeds: Whole files that it reads.
        read: Writes the bytes where they belong, reads and uses them.
        damage: Makes a damaged file of a whole one.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], None]
    damage: Callable[[np.random.Generator, bytes], bytes]


def spliced(pieces: list[bytes]) -> Callable[[np.random.Generator, bytes], bytes]:
    """Return a function that replaces, cuts, repeats or inserts at a few random places."""

    def damage(random: np.random.Generator, text: bytes) -> bytes:
        for _ in range(int(random.integers(1, 4))):
            start = int(random.integers(len(text) + 1))
            end = min(len(text), start + int(random.integers(0, 12)))
            piece = pieces[int(random.integers(len(pieces)))]
            text = text[:start] + piece + text[end:]
        return text

    return damage


def flipped(random: np.random.Generator, data: bytes) -> bytes:
    """Flip bits, cut the end off or splice: what disks and networks do, and what people try."""
    kind = int(random.integers(3))
    if kind == 0:
        return data[: int(random.integers(len(data)))]
    if kind == 1:
        return spliced(BYTES)(random, data)
    changed = bytearray(data)
    for _ in range(int(random.integers(1, 9))):
        changed[int(random.integers(len(changed)))] ^= 1 << int(random.integers(8))
    return bytes(changed)


def swapped(random: np.random.Generator, text: bytes) -> bytes:
    """Replace, drop or rename a node of a JSON document, or damage its text."""
    if random.random() < 0.3:
        return spliced(ODD_TEXT)(random, text)
    content = json.loads(text)
    for _ in range(int(random.integers(1, 3))):
        nodes = list(_nodes(content))
        if not nodes:
            break
        holder, key = nodes[int(random.integers(len(nodes)))]
        value = copy.deepcopy(ODD_VALUES[int(random.integers(len(ODD_VALUES)))])
        kind = int(random.integers(4))
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[str(value)[:50]] = holder.pop(key)
        else:
            holder[key] = value
    return json.dumps(content).encode()


def odd_cells(random: np.random.Generator, text: bytes) -> bytes:
    """Replace cells of a CSV table, or drop or repeat a row."""
    rows = list(csv.reader(io.StringIO(text.decode())))
    for _ in range(int(random.integers(1, 4))):
        row = int(random.integers(1, len(rows)))
        if random.random() < 0.2:
            rows[row : row + 1] = [rows[row]] * int(random.integers(0, 3))
        else:
            column = int(random.integers(len(rows[0])))
            odd = [*map(str, ODD_VALUES), "embed", "13", "text", "*", "1e-300", "cka_debiased"]
            rows[row] = [*rows[row]]
            rows[row][column] = odd[int(random.integers(len(odd)))]
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode("utf-8", "surrogatepass")


def _nodes(content: Any) -> Iterator[tuple[Any, Any]]:
    keys = (
        list(content)
        if isinstance(content, dict)
        else range(len(content) if isinstance(content, list) else 0)
    )
    for key in keys:
        yield content, key
        yield from _nodes(content[key])


@contextmanager
def limits(name: str) -> Iterator[None]:
    """Let nothing but a refusal out, and that as one printable line; watch time and memory."""

    def late(*_: Any) -> None:
        raise Broken(f"{name}: more than {SECONDS} seconds")

    before = peak_kib(anew=True)
    previous = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process, however busy the machine is
    try:
        yield
    except UserError as error:
        message = str(error)
        message.encode()
        if "\n" in message or len(message) > 2000:
            raise Broken(f"{name}: the refusal is not one line: {message[:300]!r}") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
        grown = peak_kib() - before
        if grown > KIB:
            raise Broken(f"{name}: {grown} KiB more memory")


def peak_kib(anew: bool = False) -> int:
    """Return the most memory this process held, since the last call `anew` where Linux can say."""
    if not Path("/proc/self/clear_refs").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if anew:  # an earlier test of this process may have needed more than any limit
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def fuzz(target: Target, inputs: int, seed: int = 0, keep: Path | None = None) -> Outcome:
    """Damage and read; collect what broke, with the bytes that did it in `keep`."""
    random = np.random.default_rng([seed, *target.name.encode()])
    outcome = Outcome(target.name)
    first = peak_kib(anew=True)
    for number in range(inputs):
        whole = target.seeds[int(random.integers(len(target.seeds)))]
        case = target.damage(random, whole)
        start = time.process_time()
        try:
            with limits(target.name):
                target.read(case)
            outcome.accepted += 1
        except UserError:
            outcome.refused += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - this is what is looked for
            words = " ".join(str(error).split())[:300]
            outcome.broken.append(f"input {number}: {type(error).__name__}: {words}")
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{target.name}-{seed}-{number}").write_bytes(case)
        outcome.inputs += 1
        outcome.longest = max(outcome.longest, time.process_time() - start)
        outcome.grown_kib = max(outcome.grown_kib, peak_kib() - first)
    return outcome


# The targets


def targets(folder: Path) -> dict[str, Target]:
    """Return every reader with whole files made in a folder."""
    made = (manifests, studies, split_files, score_tables, choices, adapters, states, weights)
    found: dict[str, Target] = {}
    for make in made:
        place = folder / make.__name__
        place.mkdir(parents=True, exist_ok=True)
        found[make.__name__] = make(place)
    return found


def manifests(folder: Path) -> Target:
    from vlmlayers.manifests import Manifest

    path = folder / "fuzz.toml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = Manifest.load(path)
        found._repr_html_().encode()
        found.prompt("x").encode()

    texts = [p.read_bytes() for p in sorted((REPOSITORY / "data_manifests").glob("*.toml"))]
    return Target("manifests", texts, read, spliced(ODD_TEXT))


def studies(folder: Path) -> Target:
    from vlmadapters.cli.validate_stage import ValidatePart
    from vlmlayers.options import validated
    from vlmlayers.study import read_study

    path = folder / "study.toml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        study = read_study(path)
        validated(ValidatePart, study.validate_ or {}, "[validate]")
        for part in study.datasets:
            study.part(part)

    examples = sorted((REPOSITORY / "data_manifests" / "studies").glob("*.toml"))
    return Target("studies", [p.read_bytes() for p in examples], read, spliced(ODD_TEXT))


def split_files(folder: Path) -> Target:
    from data_fixtures import coop_dataset, use

    rows = [[f"a/{i}.jpg", i % 3, "xyz"[i % 3]] for i in range(6)]
    lists = {"train": rows, "val": rows[:3], "test": rows[3:]}
    manifest = coop_dataset(folder, lists)

    def read(data: bytes) -> None:
        (folder / "split.json").write_bytes(data)
        use(manifest)

    return Target("split_files", [json.dumps(lists).encode()], read, swapped)


def score_tables(folder: Path) -> Target:
    from score_tables import full

    from vlmlayers.scores import read_scores
    from vlmlayers.selection import select

    table = full()
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    seeds = [table.to_csv(index=False).encode(), buffer.getvalue()]

    def read(data: bytes) -> None:
        path = folder / ("t.parquet" if data[:4] == b"PAR1" else "t.csv")
        path.write_bytes(data)
        select(read_scores(path), "threshold", resamples=20).to_dict()

    def damage(random: np.random.Generator, data: bytes) -> bytes:
        if data[:4] == b"PAR1":
            return flipped(random, data)
        return (odd_cells if random.random() < 0.7 else spliced(ODD_TEXT))(random, data)

    return Target("score_tables", seeds, read, damage)


def choices(folder: Path) -> Target:
    from score_tables import full

    from vlmadapters import MMAConfig
    from vlmlayers.selection import LayerChoice, select

    path = folder / "choice.json"
    select(full(), "threshold", resamples=20).save(path)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        choice = LayerChoice.load(path)
        f"{choice} {choice.statement} {choice.decided}".encode()
        choice._repr_html_().encode()
        MMAConfig.from_choice(path).placement.encode()

    return Target("choices", [path.read_bytes()], read, swapped)


def adapters(folder: Path) -> Target:
    from backbones import shared_backbone

    from vlmadapters import MMAConfig
    from vlmadapters.data.task import Task
    from vlmadapters.files import load_method, load_official, save_method, save_official
    from vlmadapters.methods.mma.module import new_adapter

    model = shared_backbone()
    adapter = new_adapter(model.clip, MMAConfig(vision=(2,), text=(3,), dim=4))
    ours = save_method(folder / "a.safetensors", adapter, model, Task(("cat", "dog")))
    theirs = save_official(folder / "b.pth.tar", adapter)

    def read(data: bytes) -> None:
        zipped = data[:2] == b"PK"
        path = folder / ("fuzz.pth.tar" if zipped else "fuzz.safetensors")
        path.write_bytes(data)
        if zipped:
            load_official(path, model).config.placement.encode()
        else:
            load_method(path, model).config.placement.encode()

    return Target("adapters", [ours.read_bytes(), theirs.read_bytes()], read, flipped)


def states(folder: Path) -> Target:
    import torch

    from vlmadapters.training.state import STATE_FILE, load_training_state, save_training_state
    from vlmlayers.manifests import Manifest

    data = Manifest.load("digits")
    identity = {"seed": 1, "data": data.identity(data.items("train")[:2]).text()}
    state = {"epoch": 1, "step": 2, "runs": [{"losses": [0.5], "adapter": {"w": torch.ones(3)}}]}
    save_training_state(folder, identity, state)

    def read(data: bytes) -> None:
        (folder / STATE_FILE).write_bytes(data)
        found = load_training_state(folder, identity)
        assert found is not None
        if found["epoch"] != 1 or found["runs"][0]["adapter"]["w"].tolist() != [1, 1, 1]:
            raise Broken("a damaged training state was taken for a whole one")

    return Target("states", [(folder / STATE_FILE).read_bytes()], read, flipped)


def weights(folder: Path) -> Target:
    import torch
    from safetensors.torch import save_file

    from vlmlayers.models.checkpoints import load_checkpoint, read_checkpoint

    clip = tiny.build("clip")
    state = {key: value.clone() for key, value in clip.state_dict().items()}
    save_file(state, folder / "w.safetensors")
    torch.save(state, folder / "w.pt")

    def read(data: bytes) -> None:
        path = folder / ("fuzz.pt" if data[:2] == b"PK" else "fuzz.safetensors")
        path.write_bytes(data)
        load_checkpoint(clip, read_checkpoint(path))

    def damage(random: np.random.Generator, data: bytes) -> bytes:
        # The bulk is weights, whose values are anyone's; the damage goes where the structure is.
        if random.random() < 0.2:
            return flipped(random, data)
        edge = 4000
        if data[:2] == b"PK" and random.random() < 0.5:
            return data[:-edge] + flipped(random, data[-edge:])
        return flipped(random, data[:edge]) + data[edge:]

    whole = [(folder / name).read_bytes() for name in ("w.safetensors", "w.pt")]
    return Target("weights", whole, read, damage)


# Shares of the inputs; what is dear to read gets fewer.
SHARES = {
    "manifests": 0.25, "studies": 0.2, "split_files": 0.2, "choices": 0.15, "score_tables": 0.05,
    "adapters": 0.06, "states": 0.06, "weights": 0.03,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*SHARES, []])
    parser.add_argument("--inputs", type=int, default=120_000, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the bytes of what broke")
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, target in targets(Path(folder)).items():
            if given.targets and name not in given.targets:
                continue
            start = time.monotonic()
            found = fuzz(target, round(given.inputs * SHARES[name]), given.seed, given.keep)
            bad += len(found.broken)
            print(  # noqa: T201
                f"{name:13} inputs {found.inputs:6} accepted {found.accepted:6} refused "
                f"{found.refused:6} broken {len(found.broken):4} longest {found.longest:.2f} s "
                f"memory +{found.grown_kib // 1024} MiB, {time.monotonic() - start:.0f} s",
                flush=True,
            )
            for line in list(dict.fromkeys(one.partition(": ")[2] for one in found.broken))[:12]:
                print("   ", line, flush=True)  # noqa: T201
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
