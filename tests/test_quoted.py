"""Pages quote recorded tables: what is measured anew has to be written anew there too."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Return the cells of each row of the table of a page under a heading, without bold."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("*", "")
    lines = text[text.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def between(start: str, end: str) -> str:
    """Return what the README says from some words on up to others, in one line."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    return text[text.index(start) : text.index(end)]


def assert_quoted(quoted: str, *recorded: float) -> None:
    """Assert that the numbers in a quotation are recorded ones, rounded to the digits it has."""
    numbers = re.findall(r"\d[\d,]*(?:\.\d+)?", quoted)
    assert len(numbers) == len(recorded), quoted
    for number, value in zip(numbers, recorded):
        _, _, decimals = number.partition(".")
        # Of thousands the zeros at the end stand for digits that are left out.
        zeros = len(number) - len(number.rstrip("0")) if "," in number else 0
        step = 10.0 ** (zeros - len(decimals))
        assert abs(float(number.replace(",", "")) - value) <= step / 2 + 1e-9, (quoted, value)


def test_the_page_on_scale_quotes_start_up_and_tables() -> None:
    started = pd.read_csv(RESULTS / "startup.csv").set_index("kind")["cpu_seconds"]
    small, large = started["report"]
    quick = started.drop("report")
    tables = pd.read_csv(RESULTS / "metrics_tables.csv").query("datasets == 27 and positions == 15")
    taken = tables.set_index(["verb", "resamples"])["cpu_seconds"].sort_index()
    expected = {
        "an error": (quick.min(), quick.max()),
        "`select`": (taken["select", 200],),
        "`score`": (taken["score", 50],),
        "`report` of these": (large,),
        "`report` of 3": (small,),
    }
    for (work, quiet, *_), (start, recorded) in zip(
        rows_of("docs/scale.md", "| work | quiet"), expected.items(), strict=True
    ):
        assert work.startswith(start)
        assert_quoted(quiet, *recorded)


def test_the_page_on_scale_quotes_what_many_classes_take() -> None:
    table = pd.read_csv(RESULTS / "metrics_classes.csv")
    whole = table[table["metric"] == "(all)"].set_index("classes")
    probe = table[table["metric"] == "class_accuracy"].set_index("classes")["seconds"]
    said = " ".join((ROOT / "docs/scale.md").read_text(encoding="utf-8").split())
    said = said[said.index("of 10,000 items take") : said.index(" MiB. Sums over")]
    taken, (few, some, many) = whole["seconds"], whole.index
    assert_quoted(
        said.replace(" (one process; `benchmarks/metrics.py classes`)", ""),
        10_000, taken[few], few, taken[some], some, taken[many], many, probe[many],
        *whole["peak_mib"],
    )  # fmt: skip


def test_the_page_on_scale_quotes_peers() -> None:
    table = pd.read_csv(RESULTS / "peers.csv")
    said = (ROOT / "docs/scale.md").read_text(encoding="utf-8").partition("Beside other libr")[2]
    quoted = re.findall(r"\d\.\d+, \d\.\d+ to \d\.\d+", said)
    del quoted[3]  # thingsvision on its own torch, which is not recorded again
    peers = ["thingsvision", "open_clip", "timm", "pytorch-cka"]
    table = table.sort_values("peer", key=lambda names: names.map(peers.index), kind="stable")
    assert_quoted(" ".join(quoted), *table.filter(like="faster").to_numpy().ravel())


def test_the_page_on_scale_quotes_training_on_a_cpu() -> None:
    table = pd.read_csv(RESULTS / "training_cpu.csv")
    for processor, upper, last, plain in rows_of("docs/scale.md", "| processor |"):
        own = table[table["hardware"].str.startswith(processor.split()[0])]
        ratio = own.set_index(["side", "placement", "views"])["ratio"].sort_index()
        places = [("v5-12,t5-12", "fresh"), ("v9-12,t9-12", "cached")]
        found = [ratio[("ours", *place)] for place in places]
        assert_quoted(f"{upper} {last}", *found)
        found = [ratio[("ours, torch's products", *place)] for place in places]
        assert_quoted(plain.partition("(")[0], *found)


def test_the_page_on_scale_quotes_training_on_a_gpu() -> None:
    table = pd.read_csv(RESULTS / "training_cuda.csv").query("hardware == 'NVIDIA H200'")
    keys = ["precision", "side", "placement", "views"]
    ratio = table.set_index(keys)["ratio"].sort_index()
    for name, *told, plain in rows_of("docs/scale.md", "| precision | 5–12"):
        precision = name.split()[0]
        placements, views = ("v5-12,t5-12", "v9-12,t9-12"), ("fresh", "cached")
        found = [ratio[precision, "ours, recorded", p, v] for p in placements for v in views]
        found.append(ratio[precision, "ours", placements[0], "fresh"])
        assert_quoted(" ".join([*told, plain]), *found)
    session = pd.read_csv(RESULTS / "gpu_session_cuda.csv").set_index("what")["value"]
    ways = ("as published", "crops and recorded step on the GPU", "likewise, 3 processes")
    for (_, *told), way in zip(rows_of("docs/scale.md", "| way |"), ways, strict=True):
        found = [
            session[f"base to novel, 12 cells, {way}, {what}"] for what in ("s", "GPU busy, %")
        ]
        assert_quoted(" ".join(told), *map(float, found))


def test_the_page_of_methods_quotes_their_speed() -> None:
    ours = pd.read_csv(RESULTS / "methods_cpu.csv").query("side == 'ours'")
    taken = ours.set_index(["method", "views"])["cpu_ratio"].sort_index()
    quoted = rows_of("docs/methods.md", "| method | batch |")
    assert {method for method, *_ in quoted} == set(ours["method"])
    for method, _, fresh, cached, *_ in quoted:
        assert_quoted(fresh, taken[method, "fresh"])
        if cached != "–":
            assert_quoted(cached, taken[method, "cached"])


def test_the_readme_quotes_training_on_a_gpu() -> None:
    said = between("in half precision MMA's step", "; 80 was the goal")
    table = pd.read_csv(RESULTS / "training_cuda.csv").query("side == 'ours, recorded'")
    half, single = table.query("precision != 'fp32'"), table.query("precision == 'fp32'")
    session = pd.read_csv(RESULTS / "gpu_session_cuda.csv").set_index("what")["value"]
    quoted = re.findall(r"[\d.]+ to [\d.]+ times|between \d+ and \d+|\d+ %", said)
    found = [half["ratio"].min(), half["ratio"].max(), half["ratio_low"].min(),
             half["ratio_high"].max(), single["ratio"].min(), single["ratio"].max()]  # fmt: skip
    found += [
        float(session[f"base to novel, 12 cells, {way}, GPU busy, %"])
        for way in ("as published", "likewise, 3 processes")
    ]
    assert_quoted(" ".join(quoted), *found)


def test_the_readme_quotes_how_often_intervals_hold_the_truth() -> None:
    said = between("On 100 [simulated samples]", ", of few prompts 100.")
    table = pd.read_csv(RESULTS / "interval_coverage.csv")
    one, joined, streamed = (
        table[table["how"].str.startswith(how)] for how in ("rows of one", "joined", "streamed")
    )
    of_class = one["metric"].str.startswith("class_accuracy")
    of_dataset = streamed["metric"] == "dataset_accuracy_lda"
    few = (streamed["texts"] == "prompts") & (streamed["tower"] == "text")
    parts = [one[~of_class], one[of_class], joined, streamed[~of_dataset],
             streamed[of_dataset & ~few]]  # fmt: skip
    found = [end for part in parts for end in (part["held"].min(), part["held"].max())]
    assert_quoted(" ".join(re.findall(r"\d+ to \d+", said)), *(100 * end for end in found))


def test_the_readme_quotes_the_registered_study() -> None:
    page = (ROOT / "benchmarks/registered_search.md").read_text(encoding="utf-8").replace("\\", "")
    quoted = rows_of("README.md", "| study, small backbones |")
    cells = [cell for name, _, *told in quoted if "sweep" not in name for cell in told]
    assert len(cells) == 10
    for cell in cells:
        difference, _, _ = cell.replace("−", "-").partition(", claimed")
        assert f"| {difference} |" in page, cell
