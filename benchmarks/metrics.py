"""What metrics cost: CKA of all layers, the suite, positions, n, width, classes, streams, tables.

    python benchmarks/metrics.py [cka] [suite] [positions] [growth] [classes] [stream] [tables]

Tables go to benchmarks/results/metrics_*.csv with machine, versions and load. Each case runs in a
process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import RESULTS, machine, write_table

TEST_HELPERS = Path(__file__).parents[1] / "tests" / "vlmlayers"
LAYERS, WIDTHS = 12, (768, 512)
SIZES = (1_000, 4_000, 50_000)
FIXED_N, FIXED_WIDTH = 400, 256
CLASSES, CLASS_ITEMS = (10, 100, 1_000), 10_000
TABLE_METRICS = (
    "dataset_accuracy", "class_accuracy", "fisher_ratio", "cka_debiased", "effective_rank",
)  # fmt: skip
WHOLE_TABLE = {"datasets": 27, "blocks": 12, "resamples": 50}
TABLE_SIZES = {"datasets": (3, 9), "blocks": (3, 6), "resamples": (200, 800)}
MARKS = ("-o", "--s", ":^", "-.D")


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write a tidy table with what the timing depends on."""
    write_table(f"metrics_{name}", [{**row, **machine()} for row in rows])


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def layers(n: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return two towers of synthetic layers, float32, as a feature store hands them over."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((n, 32), dtype=np.float32)

    def layer(width: int) -> np.ndarray:
        x = shared @ rng.standard_normal((32, width), dtype=np.float32)
        x += 4 * rng.standard_normal((n, width), dtype=np.float32)
        return x

    return [layer(WIDTHS[0]) for _ in range(LAYERS)], [layer(WIDTHS[1]) for _ in range(LAYERS)]


def plain_gram(xs: list[np.ndarray], ys: list[np.ndarray]) -> np.ndarray:
    """Debiased CKA as it is commonly written: both Gram matrices anew for every pair."""

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n = len(k)
        one = np.ones(n)
        mixed = 2 / (n - 2) * (one @ k) @ (m @ one)
        return float((k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - mixed)

    def gram(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        k = x @ x.T
        np.fill_diagonal(k, 0.0)
        return k

    def pair(x: np.ndarray, y: np.ndarray) -> float:
        k, m = gram(x), gram(y)
        return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))

    return np.array([[pair(x, y) for y in ys] for x in xs])


def case_cka(form: str, n: int) -> dict[str, Any]:
    from vlmlayers.metrics import cka_matrix
    from vlmlayers.metrics.cka_matrix import cheaper_form

    xs, ys = layers(n)
    before = peak_mib()
    used = 2 if form == "plain" and n > 1_000 else LAYERS
    start, cpu = time.perf_counter(), time.process_time()
    values = plain_gram(xs[:used], ys[:used]) if form == "plain" else cka_matrix(xs, ys)
    share = (LAYERS / used) ** 2
    seconds, cpu = (time.perf_counter() - start) * share, (time.process_time() - cpu) * share
    chosen = form if form == "plain" else cheaper_form(n, [768] * LAYERS, [512] * LAYERS)
    return {
        "form": chosen,
        "n": n,
        "layers": f"{LAYERS}x{LAYERS}",
        "widths": "768/512",
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "pairs_timed": used * used,
        "extra_peak_mib": round(peak_mib() - before, 1),
        "inputs_mib": round(before, 1),
        "first_value": round(float(values[0, 0]), 6),
        "note": "" if used == LAYERS else f"time is that of {used * used} pairs, scaled up",
    }


def suite_features() -> list[Any]:
    """Return what the suite is timed on: 8 datasets of 200 items, two towers of 12 blocks."""
    sys.path.insert(0, str(TEST_HELPERS))
    from synthetic import many

    return many(8, items=200, classes=20, blocks=12, widths=(768, 512, 512), strength=0.3)


def case_suite(jobs: int) -> list[dict[str, Any]]:
    from vlmlayers.scores import score, score_cost

    features = suite_features()
    start = time.perf_counter()
    table = score(features, jobs=jobs)
    total = time.perf_counter() - start
    rows: list[dict[Any, Any]] = [
        {"metric": "(all)", "seconds": round(total, 2), "rows": len(table)}
    ]
    rows += score_cost(table).round(3).to_dict("records")
    shape = {
        "datasets": 8,
        "items": 200,
        "native_positions": 30,
        "joint_positions": 28,
        "bootstrap": 200,
        "peak_mib": round(peak_mib()),
    }
    return [{"processes": jobs, **row, **shape} for row in rows]


def case_positions() -> list[dict[str, Any]]:
    """Time each metric at one position and at all, whole and with next to no resampling."""
    from vlmlayers.scores import score, score_cost

    features = suite_features()
    bare: dict[str, Any] = {"bootstrap": 20, "jackknife": 2, "shuffles": 1, "permutations": 1}
    cost = {
        (where, what): score_cost(score(features, jobs=1, positions=positions, **options))
        .set_index("metric")["seconds"]
        for where, positions in (("one", ["6"]), ("all", None))
        for what, options in (("whole", {}), ("value", bare))
    }  # fmt: skip
    rows = []
    for metric in cost["all", "whole"].index:
        one, every = cost["one", "whole"][metric], cost["all", "whole"][metric]
        value_one, value_all = cost["one", "value"][metric], cost["all", "value"][metric]
        rows.append(
            {
                "metric": metric,
                "one_position": round(one, 3),
                "all_positions": round(every, 3),
                "ratio": round(every / one, 2),
                "value_one": round(value_one, 3),
                "value_all": round(value_all, 3),
                "resampling_one": round(one - value_one, 3),
                "resampling_all": round(every - value_all, 3),
            }
        )
    return rows


def case_classes(classes: int) -> list[dict[str, Any]]:
    """Time the suite on one dataset of many items, as the number of its classes grows."""
    sys.path.insert(0, str(TEST_HELPERS))
    from synthetic import many

    from vlmlayers.scores import score, score_cost

    features = many(1, items=CLASS_ITEMS, classes=classes, blocks=1, widths=(512, 512, 512))
    start = time.perf_counter()
    table = score(features, jobs=1, positions=["1"])
    total = {"metric": "(all)", "seconds": time.perf_counter() - start, "rows": len(table)}
    cost = pd.concat([pd.DataFrame([total]), score_cost(table)]).round(2)
    shape = {"classes": classes, "items": CLASS_ITEMS, "width": 512, "position": "1"}
    rows: list[dict[Any, Any]] = cost.to_dict("records")
    return [{**shape, **row, "peak_mib": round(peak_mib())} for row in rows]


def case_growth() -> list[dict[str, Any]]:
    sys.path.insert(0, str(TEST_HELPERS))
    from synthetic import PLAIN_NEEDS

    from vlmlayers.metrics import METRICS

    rows = []
    for name, metric in METRICS.items():
        if metric.needs not in PLAIN_NEEDS:
            continue
        sizes = [(n, FIXED_WIDTH) for n in (100, 200, 400, 800, 1600)]
        sizes += [(FIXED_N, width) for width in (64, 128, 512, 1024)]
        for n, width in sizes:
            seconds = min(_timed(metric, n, width) for _ in range(2))
            rows.append({"metric": name, "n": n, "width": width, "seconds": round(seconds, 6)})
    return rows


def _timed(metric: Any, n: int, width: int) -> float:
    from synthetic import metric_inputs, metric_value

    features, rest = metric_inputs(metric, n=n, width=width, classes=10)
    if metric.needs == "pairs":
        rest = [features[0] + np.random.default_rng(1).normal(size=features[0].shape)]
    start = time.perf_counter()
    metric_value(metric, features, rest, classes=10)
    return time.perf_counter() - start


def case_stream(n: int) -> dict[str, Any]:
    from vlmlayers.features import LayerFeatures, TowerFeatures
    from vlmlayers.scores.streamed import streamed_scores
    from vlmlayers.scores.sums import StreamingScores

    width, chunk = 128, 5_000
    rng = np.random.default_rng(0)
    labels = np.arange(chunk) % 10
    sums = StreamingScores()
    start, cpu = time.perf_counter(), time.process_time()
    for first in range(0, n, chunk):
        arrays = {
            "native": {
                str(b): rng.standard_normal((chunk, width), dtype=np.float32) for b in (1, 2, 3)
            }
        }
        ids = tuple(str(first + i) for i in range(chunk))
        tower = TowerFeatures("vision", 3, "cls", "images", ids, labels, arrays)
        sums.update(LayerFeatures("m", "w", "noise", "train", tuple("abcdefghij"), tower))
    table = streamed_scores(sums)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "n": n,
        "positions": 3,
        "width": width,
        "chunk": chunk,
        "rows": len(table),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "items_per_second": round(n / seconds),
        "peak_mib": round(peak_mib(), 1),
    }


def case_tables() -> list[dict[str, Any]]:
    """Time `score` and `select` as datasets, positions and resamples grow, one at a time."""
    sys.path.insert(0, str(TEST_HELPERS))
    from synthetic import many

    from vlmlayers.scores import score
    from vlmlayers.selection import select

    cases = [
        WHOLE_TABLE,
        *({**WHOLE_TABLE, k: n} for k, sizes in TABLE_SIZES.items() for n in sizes),
    ]
    rows = []
    # The first call of each verb brings imports along, and is not counted.
    small = {**WHOLE_TABLE, "datasets": min(TABLE_SIZES["datasets"])}
    for number, case in enumerate([small, *cases]):
        features = many(case["datasets"], items=60, blocks=case["blocks"])
        start = time.process_time()
        table = score(features, list(TABLE_METRICS), bootstrap=case["resamples"], jobs=1)
        scored = time.process_time()
        select(table, resamples=case["resamples"])
        selected = time.process_time()
        timed = (("score", scored - start), ("select", selected - scored))
        for verb, seconds in timed if number else ():
            rows.append(
                {
                    "verb": verb,
                    "datasets": case["datasets"],
                    "positions": case["blocks"] + 3,
                    "resamples": case["resamples"],
                    "rows": len(table),
                    "cpu_seconds": round(seconds, 3),
                }
            )
    return rows


def alone(*arguments: str) -> Any:
    """Run one case in a process of its own and return its result."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", *arguments], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_cka() -> None:
    rows = [
        alone("cka", form, str(n))
        for n in SIZES
        for form in ("ours", "plain")
        if not (form == "plain" and n > 4_000)
    ]
    n = SIZES[-1]
    rows.append(
        {
            **dict.fromkeys(rows[0], ""),
            "form": "plain",
            "n": n,
            "pairs_timed": 0,
            "layers": f"{LAYERS}x{LAYERS}",
            "widths": "768/512",
            "extra_peak_mib": round(3 * n * n * 8 / 2**20),
            "note": "not run: memory of three n x n matrices in float64",
        }
    )
    plain = {row["n"]: row for row in rows if row["form"] == "plain" and row["seconds"]}
    for row in rows:
        base = plain.get(row["n"])
        row["faster"] = (
            round(base["seconds"] / row["seconds"], 1) if base and row["seconds"] else ""
        )
    write("cka", rows)


def run_growth() -> None:
    rows = alone("growth")
    write("growth", rows)
    plot(rows)


def run_tables() -> None:
    rows = alone("tables")
    write("tables", rows)
    plot_tables(rows)


def plot_tables(rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Draw CPU seconds of `score` and `select` against each size, the others held at the whole."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = ("datasets", "positions", "resamples")
    whole = rows[0]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True, layout="constrained")
    for ax, size in zip(axes, sizes):
        fixed = [name for name in sizes if name != size]
        for verb, mark in zip(("score", "select"), MARKS):
            points = sorted(
                (row[size], row["cpu_seconds"])
                for row in rows
                if row["verb"] == verb and all(row[name] == whole[name] for name in fixed)
            )
            ax.plot(*zip(*points), mark, label=verb)
        held = ", ".join(f"{whole[name]} {name}" for name in fixed)
        ax.set(xscale="log", yscale="log", title=held, xlabel=size)
        ticks = sorted({row[size] for row in rows})
        ax.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        ax.xaxis.minorticks_off()
    axes[0].set_ylabel("CPU seconds")
    axes[0].legend(frameon=False)
    path = folder / "metrics_tables.svg"
    figure.savefig(path)
    plt.close(figure)
    return path


def plot(rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Draw the cost of each metric against n and against width, one column for each level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from vlmlayers.metrics import METRICS

    names = list(dict.fromkeys(row["metric"] for row in rows))
    levels = list(dict.fromkeys(METRICS[name].level for name in names))
    figure, axes = plt.subplots(
        2, len(levels), figsize=(3 * len(levels), 6.4), sharex="row", sharey=True,
        layout="constrained",
    )  # fmt: skip
    for column, level in enumerate(levels):
        mine = [name for name in names if METRICS[name].level == level]
        for ax, key, fixed, value in zip(
            axes[:, column], ("n", "width"), ("width", "n"), (FIXED_WIDTH, FIXED_N)
        ):
            for i, name in enumerate(mine):
                points = sorted(
                    (row[key], 1e3 * row["seconds"])
                    for row in rows
                    if row["metric"] == name and row[fixed] == value
                )
                ax.plot(*zip(*points), MARKS[i % len(MARKS)], color=f"C{i % 10}", label=name)
            ax.set(xscale="log", yscale="log", title=f"{level}, {fixed} = {value}", xlabel=key)
        axes[1, column].legend(
            fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22)
        )
    for ax in axes[:, 0]:
        ax.set_ylabel("milliseconds, one position")
    path = folder / "metrics_growth.svg"
    figure.savefig(path)
    plt.close(figure)
    return path


RUNS: dict[str, Callable[[], None]] = {
    "cka": run_cka,
    "suite": lambda: write("suite", [row for n in (1, 2) for row in alone("suite", str(n))]),
    "positions": lambda: write("positions", alone("positions")),
    "growth": run_growth,
    "classes": lambda: write("classes", [row for n in CLASSES for row in alone("classes", str(n))]),
    "tables": run_tables,
    "stream": lambda: write(
        "stream", [alone("stream", str(n)) for n in (10_000, 100_000, 1_000_000)]
    ),
}


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--case"]:
        name, *rest = arguments[1:]
        cases: dict[str, Callable[..., Any]] = {
            "cka": lambda form, n: case_cka(form, int(n)),
            "suite": lambda jobs: case_suite(int(jobs)),
            "positions": case_positions,
            "growth": case_growth,
            "classes": lambda classes: case_classes(int(classes)),
            "tables": case_tables,
            "stream": lambda n: case_stream(int(n)),
        }
        print(json.dumps(cases[name](*rest)))
        return 0
    unknown = sorted(set(arguments) - set(RUNS))
    if unknown:
        print(f"unknown part {unknown[0]!r}; valid: {', '.join(RUNS)}", file=sys.stderr)
        return 2
    for name in arguments or RUNS:
        RUNS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
