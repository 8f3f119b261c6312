"""The tutorial runs from its first cell to its last, and says what is true."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"


@pytest.fixture(scope="module")
def written():
    return nbformat.read(TUTORIAL, as_version=4)


def text_of(cell):
    """What a cell prints and shows as text."""
    return "".join(
        output.text if output.output_type == "stream" else output.data.get("text/plain", "")
        for output in cell.outputs
        if output.get("name") != "stderr"
    )


def test_the_tutorial_runs_in_a_folder_without_the_source(written, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.from_dict(written)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    said = {cell.source: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}

    def after(beginning):
        return next(text for source, text in said.items() if source.startswith(beginning))

    planted, found, _ = after("truth = ").splitlines()
    assert planted.partition(":")[2].strip() == found.partition(":")[2].strip()
    assert after("import numpy").split() == ["plain:", "C", "silenced:", "R"]
    assert after("found.save").endswith("True")


def test_the_tutorial_is_kept_with_its_outputs_and_is_small(written):
    assert TUTORIAL.stat().st_size < 300_000
    cells = [cell for cell in written.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not [output for output in outputs if output.output_type == "error"]
    assert "/tmp/" not in TUTORIAL.read_text() and "/home/" not in TUTORIAL.read_text()
