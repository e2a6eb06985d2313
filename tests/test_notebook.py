"""docs/degradation.ipynb runs from top to bottom, and shows what it says."""

import ast
import json

import pytest
import torch
from conftest import ROOT, needs

needs("sklearn")
CELLS = json.loads((ROOT / "docs" / "degradation.ipynb").read_text())["cells"]


def run(steps):
    """All cells in order, with so many steps of training in place of 100; the names that they leave."""
    names = {}
    with torch.random.fork_rng():
        for cell in (cell for cell in CELLS if cell["cell_type"] == "code"):
            text = "".join(cell["source"]).replace(
                "STEPS, BATCH, RATE = 100, 64,", f"STEPS, BATCH, RATE = {steps}, 64,"
            )
            exec(compile(text, cell["id"], "exec"), names)
    assert names["STEPS"] == steps
    return names


def test_the_notebook_runs_from_top_to_bottom():
    assert {len(errors) for errors, _ in run(10)["found"].values()} == {1}


@pytest.mark.long
def test_it_shows_what_it_says(capsys):
    names = run(100)
    found = {key: float(errors[-1]) for key, (errors, _) in names["found"].items()}
    assert found["none", 56] > 40
    assert max(error for key, error in found.items() if key != ("none", 56)) < 10
    told = capsys.readouterr().out
    assert "20 layers: 269,722 weights, 269,722 with shortcuts" in told
    assert "ResNet-56" in told
    assert len(names["figure"].axes) == 2


def test_what_it_has_stored_names_no_place_and_no_error():
    outputs = [output for cell in CELLS for output in cell.get("outputs", ())]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert "/home" not in json.dumps(outputs)
    assert "/tmp" not in json.dumps(outputs)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell["cell_type"] == "code"], ids=lambda cell: cell["id"])
def test_each_cell_is_python_alone(cell):
    """No %magic and no !command, which only Jupyter knows."""
    ast.parse("".join(cell["source"]))
