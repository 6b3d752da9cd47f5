"""Notebooks run from the first cell to the last on the embedded default, and hold no outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebooks'")
nbclient = pytest.importorskip("nbclient", reason="needs the extra 'notebooks'")
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_is_a_notebook_for_each_step() -> None:
    assert [path.stem.partition("_")[0] for path in NOTEBOOKS] == list("12345678")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_thin_and_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.cells[0].source.startswith("# ")
    for cell in code:
        assert "def " not in cell.source, "a function belongs into the library"
        assert len(cell.source.splitlines()) <= 17


def executed(*cells: str) -> nbformat.NotebookNode:
    """Return a notebook of these cells after a kernel has run them."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=170, kernel_name="python3").execute()
    return notebook


def test_every_plot_is_shown_in_a_notebook_and_none_of_those_only_saved() -> None:
    """From the first figure on, also where nobody imported pyplot before."""
    cells = (
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent / 'vlmlayers')!r})\n"
        "import vlmlayers as vl\nfrom score_tables import full\nscores = full()\nscores",
        "vl.plots.layer_curves(scores, 'class_accuracy');",
        "vl.plots.agreement_matrix(scores)",
        "with vl.plots.unseen():\n    vl.plots.agreement_matrix(scores)",
    )
    notebook = executed(*cells)
    kinds = [{kind for output in cell.outputs for kind in output.get("data", {})}
             for cell in notebook.cells[1:]]  # fmt: skip
    assert ["image/png" in found for found in kinds] == [True, True, False]


def test_a_bar_leaves_nothing_in_a_saved_notebook_unless_it_stopped() -> None:
    """Beside the widget a notebook saves its first text, which would say 0 % for ever."""
    cells = (
        "from vlmlayers.progress import bar, track\nlist(track(range(3), 'counting'))",
        "with bar(total=3, description='by hand') as shown:\n    shown.update(3)",
        "with bar(total=3, description='stopped') as shown:\n    shown.update(1)",
        "list(track(range(3), 'hidden', show=False))",
    )
    notebook = executed(*cells)
    nbformat.validate(notebook)
    texts = [
        [output.data["text/plain"] for output in cell.outputs if output.output_type != "stream"]
        for cell in notebook.cells
    ]
    assert texts[0] == ["", "[0, 1, 2]"] and texts[1] == [""] and texts[3] == ["[0, 1, 2]"]
    assert len(texts[2]) == 1 and "stopped" in texts[2][0]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=170, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        pictures = [kind for output in cell.outputs for kind in output.get("data", {})
                    if kind in ("image/png", "image/svg+xml")]  # fmt: skip
        draws = any(word in cell.source for word in ("vl.plots.", "plt.", "SVG("))
        assert bool(pictures) == draws, cell.source
        words = [output.text for output in cell.outputs if output.output_type == "stream"]
        assert not any("Warning" in text for text in words), words
