"""The report in a real browser: charts present, every control works, no error, no request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from browser import CHROMIUM, Tab, chromium
from run_folders import make_run
from score_tables import DATASETS

from vlmlayers.report import write_comparison, write_report
from vlmlayers.scores import read_scores, write_scores

pytest.importorskip("websocket", reason="needs websocket-client, which jupyterlab brings")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the path")

CHANGE = """(figure, name, value) => {
  const c = document.querySelector(`figure[data-chart=${figure}] [data-control=${name}]`);
  if (c.type === 'checkbox') c.checked = value; else c.value = value;
  c.dispatchEvent(new Event('change'));
  return document.querySelector(`figure[data-chart=${figure}] .plot`).innerHTML;
}"""


def change(tab: Tab, figure: str, name: str, value: object) -> str:
    return str(
        tab.run(f"({CHANGE})({json.dumps(figure)}, {json.dumps(name)}, {json.dumps(value)})")
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    evil = "<img src=http://example.invalid/x onerror=alert(1)>"
    first = make_run(folder / "first", validated=True)
    cells = pd.read_csv(first.validation).assign(amount="scale=0.3,epochs=15", comparison="tuned")
    cells.to_csv(first.validation, index=False)
    tuned = pd.read_csv(first.folder / "validation_placements.csv")
    tuned.to_csv(first.folder / "validation_untuned.csv", index=False)
    second = make_run(folder / "second", 24, 12, small=True, weights="random")
    return {
        "report": write_report(first.folder, title=evil, note=evil, formats=("svg",)),
        "random": write_report(second.folder, formats=("svg",)),
        "comparison": write_comparison(
            [first.folder, second.folder], folder / "both", formats=("svg",)
        ),
    }


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def load(tab: Tab, path: Path, width: int = 1280) -> None:
    tab.events.clear()
    tab.open(path, width)
    tab.until("document.documentElement.dataset.charts === 'drawn'")


@pytest.mark.parametrize("width", [1400, 1280, 390])
@pytest.mark.parametrize("name", ["report", "random", "comparison"])
def test_pages_stand_alone_and_fit(tab: Tab, pages: dict[str, Path], name: str, width: int) -> None:
    load(tab, pages[name], width)
    assert tab.errors() == []
    assert tab.requests() == [pages[name].resolve().as_uri()]
    charts = tab.run(
        "[...document.querySelectorAll('figure[data-chart]')].map(f => "
        "[f.dataset.chart, f.querySelectorAll('.plot svg > *').length])"
    )
    assert charts and all(count > 8 for _, count in charts), charts
    assert tab.run("document.documentElement.scrollWidth") <= width
    cut = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth + 1)"
    assert tab.run(f"{cut}.map(s => s.getAttribute('aria-label'))") == []
    outside = """[...document.querySelectorAll('.plot svg text')].filter(text => {
        const [a, b] = [text, text.ownerSVGElement].map(one => one.getBoundingClientRect());
        return a.width && (a.left < b.left - 1 || a.right > b.right + 1);
    }).map(text => text.textContent)"""
    assert tab.run(outside) == []
    # Beside a long value a heading of a narrow table gives way, but not within a word.
    broken = """[...document.querySelectorAll('tbody td[data-heading]')].filter(cell => {
        const style = getComputedStyle(cell, '::before'), pen = document.createElement('canvas');
        const width = Object.assign(pen.getContext('2d'), {font: style.font});
        const words = cell.dataset.heading.split(/[ -]/).map(w => width.measureText(w).width);
        return parseFloat(style.width) < Math.max(...words) - 1;
    }).map(cell => cell.dataset.heading)"""
    assert tab.run(broken) == []
    lines = "[...document.querySelectorAll('.whole')].map(part => part.getClientRects().length)"
    assert set(tab.run(lines)) <= {1}, "a placement's part stands on one line"
    assert tab.run(
        "[...document.querySelectorAll('img')].every(i => i.complete && "
        "i.naturalWidth > 0 && i.alt.length > 20)"
    )


def test_every_control_redraws_its_chart(tab: Tab, pages: dict[str, Path]) -> None:
    load(tab, pages["report"])
    controls = tab.run("""[...document.querySelectorAll('[data-control]')].map(c => [
        c.closest('figure').dataset.chart, c.dataset.control, c.type,
        c.options ? [...c.options].map(o => o.value) : []])""")
    seen = set()
    for figure, name, kind, options in controls:
        values = [False, True] if kind == "checkbox" else options[::-1]
        drawings = {change(tab, figure, name, value) for value in values}
        assert len(drawings) >= min(2, len(values)), (figure, name)
        seen.add(figure)
    assert seen == {"curves", "datasets", "agreement", "sweep", "scatter"}
    assert tab.errors() == []


def test_curves_follow_metric_dataset_and_towers(tab: Tab, pages: dict[str, Path]) -> None:
    load(tab, pages["report"])
    both = "document.querySelectorAll('figure[data-chart=curves] path.series').length"
    assert tab.run(both) == 2
    change(tab, "curves", "text", False)
    assert tab.run(both) == 1
    change(tab, "curves", "metric", "class_accuracy")
    about = tab.run("document.querySelector('figure[data-chart=curves] .about').textContent")
    assert ". Mean over datasets. Bands: " in about
    change(tab, "curves", "dataset", "<b>signs</b>")
    rows = tab.run(
        "[...document.querySelectorAll('figure[data-chart=curves] tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )
    assert len(rows) == 14
    expected = 0.3 + 0.04 * 2 + 0.5 * 7 / 12
    block = next(row for row in rows if row[1] == "7")
    assert float(block[2]) == pytest.approx(expected, abs=5e-4)
    assert tab.run("document.querySelector('figure[data-chart=curves] b') === null")


def test_chance_is_one_line_or_one_per_tower(tab: Tab, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    lines = (
        "[...document.querySelectorAll('figure[data-chart=curves] path.chance')].map((p, i) => "
        "[document.querySelectorAll('figure[data-chart=curves] text.over')[i].textContent, "
        "(p.getAttribute('d').match(/L/g) || []).length])"
    )
    load(tab, write_report(run.folder, formats=("svg",)))
    assert tab.run(lines) == [["Chance", 1]]
    scores = read_scores(run.folder)
    text = scores["tower"] == "text"
    scores.loc[text, "null"] = 0.2 + 0.3 * scores.loc[text, "depth"]
    write_scores(scores, run.folder)
    load(tab, write_report(run.folder, formats=("svg",)))
    assert tab.run(lines) == [["Chance, vision", 1], ["Chance, text", 13]]
    assert "0.10 for vision and 0.20 to 0.50 for text." in run.report.read_text()
    assert tab.errors() == []


def test_a_heat_map_names_datasets_as_they_are_called(tab: Tab, pages: dict[str, Path]) -> None:
    load(tab, pages["report"])
    shown = tab.run(
        "(() => { const figure = document.querySelector('figure[data-chart=datasets]');"
        "const form = figure.querySelector('[data-control=form]'); form.value = 'heat';"
        "form.dispatchEvent(new Event('change', { bubbles: true }));"
        "return [...figure.querySelectorAll('.plot text')].map(t => t.textContent) })()"
    )
    assert set(DATASETS) < set(shown) and {"Embed", "Proj"} < set(shown)


def test_long_names_with_one_beginning_stay_apart(tab: Tab, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    scores = read_scores(run.folder)
    same = "photographs of the same institute in "
    names = {name: f"{same}{year}" for year, name in enumerate(DATASETS, 2021)}
    write_scores(scores.assign(dataset=scores["dataset"].replace(names)), run.folder)
    load(tab, write_report(run.folder))
    shown = tab.run(
        "[...document.querySelectorAll('figure[data-chart=datasets] .plot text')]"
        ".map(t => t.textContent).filter(t => t.startsWith('photographs'))"
    )
    assert len(shown) == len(set(shown)) == len(DATASETS)
    assert all(len(name) < len(same) for name in shown)


def test_names_without_a_space_stay_in_their_cards_and_cells(tab: Tab, tmp_path: Path) -> None:
    long = "a_name_of_sixty_characters_" + "x" * 33
    run = make_run(tmp_path / "run", model=long)
    scores = read_scores(run.folder)
    names = {name: f"{long}_{number}" for number, name in enumerate(DATASETS)}
    write_scores(scores.assign(dataset=scores["dataset"].replace(names)), run.folder)
    load(tab, write_report(run.folder, formats=("svg",)))
    captions = "[...document.querySelectorAll('figcaption')]"
    assert tab.run(f"{captions}.filter(c => c.textContent.includes('{long}')).length") > 3
    assert tab.run(f"{captions}.filter(c => c.scrollWidth > c.clientWidth + 1).length") == 0
    # In a legend a key of 22 pixels stands before each name, and one on its right on the same line.
    gaps = tab.run("""[...document.querySelectorAll('.plot svg')].flatMap(svg => {
        const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBBox()]);
        return texts.filter(([name]) => name.startsWith('a_name')).flatMap(([, box]) => texts
            .filter(([, other]) => Math.abs(other.y - box.y) < 1 && other.x > box.x)
            .map(([, other]) => other.x - 28 - box.x - box.width));
    })""")
    assert gaps and min(gaps) >= 0


def test_values_show_on_hover_and_by_keyboard(tab: Tab, pages: dict[str, Path]) -> None:
    load(tab, pages["report"])
    plot = "document.querySelector('figure[data-chart=curves] .plot')"
    tab.run(f"{plot}.scrollIntoView({{block: 'center'}})")
    box = tab.run(
        f"(r => [r.x, r.y, r.width, r.height])({plot}.querySelector('svg').getBoundingClientRect())"
    )
    for part in (0.5, 0.9):
        tab.send(
            "Input.dispatchMouseEvent",
            type="mouseMoved",
            x=box[0] + box[2] * part,
            y=box[1] + box[3] * 0.5,
        )
    tip = tab.run(f"{plot}.querySelector('.tip').textContent")
    assert "Vision 0.9 [0.89, 0.91]" in tip and "Text 0.9" in tip
    tab.run(f"{plot}.focus()")
    for _ in range(20):
        tab.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
    assert tab.run(f"{plot}.querySelector('.live').textContent").startswith("Embed: Vision 0.4 [")
    for chart in ("agreement", "frequency", "datasets", "sweep", "scatter"):
        tab.run(f"document.querySelector('figure[data-chart={chart}] .plot').focus()")
        tab.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        said = tab.run(f"document.querySelector('figure[data-chart={chart}] .live').textContent")
        assert ":" in said, chart
    assert tab.errors() == []


def test_downloads_are_made_in_the_page(tab: Tab, pages: dict[str, Path], tmp_path: Path) -> None:
    load(tab, pages["report"])
    tab.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for kind in ("csv", "svg", "png"):
        tab.run(f"document.querySelector('figure[data-chart=curves] [data-get={kind}]').click()")
        file = tmp_path / f"curves.{kind}"
        for _ in range(400):
            if file.exists() and file.stat().st_size:
                break
            tab.run("new Promise(done => setTimeout(done, 25))")
        assert file.stat().st_size > 300, kind
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert lines[0].startswith("model,weights,tower,position") and len(lines) == 29
    assert all(line.startswith("toy,toy.safetensors,") for line in lines[1:])
    assert (tmp_path / "curves.svg").read_text().startswith("<svg")
    assert tab.errors() == []


def test_the_sweep_shows_differences_with_whiskers_and_zero_shot(
    tab: Tab, pages: dict[str, Path]
) -> None:
    load(tab, pages["report"])
    count = "document.querySelectorAll('figure[data-chart=sweep] {0}').length"
    assert tab.run(count.format("line.level")) == 3  # base, novel and HM without an adapter
    assert tab.run(count.format(".whisker")) == 0
    change(tab, "sweep", "form", "difference")
    assert tab.run(count.format(".whisker")) == 13 * 3
    path = "document.querySelector('figure[data-chart=sweep] path.series').getAttribute('d')"
    assert tab.run(path).count("M") == 2  # the placement beside the sweep is not joined to it
    rows = tab.run("[...document.querySelectorAll('figure[data-chart=sweep] tbody tr')].length")
    assert rows == 13
    for name in ("base", "novel", "hm"):
        change(tab, "sweep", name, False)
    assert tab.errors() == []


def test_a_comparison_shows_differences_to_the_first_run(tab: Tab, pages: dict[str, Path]) -> None:
    load(tab, pages["comparison"])
    drawn = {change(tab, "runs", "form", one) for one in ("difference", "value")}
    assert len(drawn) == 2
    change(tab, "runs", "form", "difference")
    rows = tab.run(
        "[...document.querySelectorAll('figure[data-chart=runs] tbody tr')]"
        ".map(r => [r.cells[0].textContent, Number(r.cells[2].textContent)])"
    )
    assert {value for name, value in rows if name == "first"} == {0}
    assert {name for name, _ in rows} == {"first", "second (random)"}
    assert tab.errors() == []


def test_every_table_is_a_download(tab: Tab, pages: dict[str, Path], tmp_path: Path) -> None:
    load(tab, pages["report"])
    tab.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tables = tab.run("document.querySelectorAll('.table').length")
    assert tables == tab.run("document.querySelectorAll('button[data-table]').length") > 8
    tab.run("document.querySelector('.answer button[data-table]').click()")
    for _ in range(400):
        if found := [f for f in tmp_path.glob("*.csv") if f.stat().st_size]:
            break
        tab.run("new Promise(done => setTimeout(done, 25))")
    lines = found[0].read_text().splitlines()
    assert lines[0].startswith("model,weights,Placement,Base classes,Novel classes")
    assert len(lines) == 4


def test_downloads_of_random_weights_say_so(
    tab: Tab, pages: dict[str, Path], tmp_path: Path
) -> None:
    tab.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for page, chart, row in (
        ("random", "frequency", "toy,random,vision,1,"),
        ("comparison", "runs", "toy,random,second (random),embed,"),
    ):
        load(tab, pages[page])
        tab.run(f"document.querySelector('figure[data-chart={chart}] [data-get=csv]').click()")
        file = tmp_path / f"{chart}.csv"
        for _ in range(400):
            if file.exists() and file.stat().st_size:
                break
            tab.run("new Promise(done => setTimeout(done, 25))")
        lines = file.read_text().splitlines()
        assert lines[0].startswith("model,weights,")
        assert any(line.startswith(row) for line in lines), lines


def test_printing_unfolds_and_narrows_and_undoes_it(tab: Tab, pages: dict[str, Path]) -> None:
    load(tab, pages["report"])
    closed = "document.querySelectorAll('details:not(.screen):not([open])').length"
    width = "document.querySelector('figure[data-chart=curves] svg').viewBox.baseVal.width"
    before = tab.run(closed), tab.run(width)
    assert before[0] > 3 and before[1] > 900
    tab.run("dispatchEvent(new Event('beforeprint'))")
    assert tab.run(closed) == 0 and tab.run(width) <= 680
    tab.run("dispatchEvent(new Event('afterprint'))")
    assert (tab.run(closed), tab.run(width)) == before


def test_prints_to_a4(tab: Tab, pages: dict[str, Path]) -> None:
    load(tab, pages["report"])
    printed = tab.send("Page.printToPDF", preferCSSPageSize=True, printBackground=False)["data"]
    assert len(printed) > 20_000
    tab.send("Emulation.setEmulatedMedia", media="print")
    shown = tab.run(
        "[...document.querySelectorAll('.controls, nav')].filter("
        "e => getComputedStyle(e).display !== 'none').length"
    )
    tab.send("Emulation.setEmulatedMedia", media="")
    assert shown == 0


def test_text_has_contrast(tab: Tab, pages: dict[str, Path]) -> None:
    """Every text colour of the page against white or its card reaches WCAG AA, 4.5 : 1."""
    load(tab, pages["random"])
    pairs = tab.run("""(() => {
      const found = new Map();
      const all = 'p, dt, dd, h1, h2, h3, td, th, a, small, label, figcaption, summary, i, .random';
      const clear = 'rgba(0, 0, 0, 0)';
      for (const e of document.querySelectorAll(all)) {
        if (!e.textContent.trim()) continue;
        let up = e, back = clear;
        for (; up && back === clear; up = up.parentElement) {
          back = getComputedStyle(up).backgroundColor;
        }
        found.set(getComputedStyle(e).color + '|' + back, e.tagName);
      }
      return [...found.keys()];
    })()""")
    for pair in pairs:
        text, back = (luminance(part) for part in pair.split("|"))
        ratio = (max(text, back) + 0.05) / (min(text, back) + 0.05)
        assert ratio >= 4.5, (pair, round(ratio, 2))


def luminance(colour: str) -> float:
    parts = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    if colour == "rgba(0, 0, 0, 0)":
        return 1.0
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
