"""The notebooks run, draw what they promise, and say the same as the scripts they are paired with."""

import os
import pathlib
import re

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FIGURE = re.compile(r"\bplt\.(subplots|subplot_mosaic|figure|show)\(")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def assert_every_figure_is_drawn(notebook):
    figures = [cell for cell in notebook.cells if cell.cell_type == "code" and FIGURE.search(cell.source)]
    assert figures, "no cell draws a figure"
    for cell in figures:
        pictures = [output.data.get("image/png") for output in cell.outputs if output.output_type == "display_data"]
        assert any(pictures), f"a figure cell left no picture:\n{cell.source}"


def test_every_notebook_has_a_script_and_every_script_a_notebook():
    assert NOTEBOOKS
    assert [path.stem for path in NOTEBOOKS] == sorted(path.stem for path in FOLDER.glob("*.py"))


@each_notebook
def test_notebook_runs_and_draws(path, tmp_path, monkeypatch):
    # The kernel of this environment, whatever the user has installed or configured for theirs.
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute(env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    assert_every_figure_is_drawn(notebook)
    complaints = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not complaints


@each_notebook
def test_notebook_equals_its_script(path):
    notebook, script = jupytext.read(path), jupytext.read(path.with_suffix(".py"))
    for side in (notebook, script):
        assert side.metadata.jupytext.formats == "ipynb,py:percent"
    cells, expected = ([(cell.cell_type, cell.source) for cell in side.cells] for side in (notebook, script))
    assert cells == expected, f"run: jupytext --sync {path.relative_to(FOLDER.parent).with_suffix('.py')}"


@each_notebook
def test_committed_notebook_shows_its_figures_and_stays_small(path):
    assert_every_figure_is_drawn(nbformat.read(path, as_version=4))
    assert path.stat().st_size < 600_000
