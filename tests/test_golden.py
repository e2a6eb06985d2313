"""The golden numbers: as they were, or remade on purpose by scripts/golden.py."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

golden = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "golden.py")))
FILED = json.loads(golden.FILE.read_text())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * ("-1202" in n and n[-1] != "A")) for n in golden.NETS]
)
def test_size_of_a_net(name):
    assert golden.size(*golden.NETS[name]) == FILED["nets"][name]


@pytest.mark.parametrize("overrides", golden.SCHEDULES)
def test_rates_of_a_run(overrides):
    assert [list(row) for row in golden.rates(overrides)] == FILED["rates"][overrides]


def test_losses():
    """Exact where processor, torch and threads are those of the file; elsewhere to a thousandth."""
    pytest.importorskip("sklearn", reason="the tiny run is on scikit-learn's digits")
    same = golden.machine() == FILED["machine"]
    assert golden.losses() == pytest.approx(list(FILED["losses"].values()), rel=0 if same else 1e-3, abs=0)


def test_losses_are_those_of_the_command(command, tmp_path, monkeypatch):
    """The script takes its steps as resnet-train does, bit for bit; here with one thread."""
    pytest.importorskip("sklearn", reason="the tiny run is on scikit-learn's digits")
    monkeypatch.setitem(golden.losses.__globals__, "THREADS", 1)
    result = command(*golden.TINY, "run_dir=run")
    assert result.returncode == 0, result.stderr
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["loss"] for line in lines if line["split"] == "train"] == golden.losses()


def test_file_holds_what_the_script_makes_and_nothing_else():
    assert FILED["nets"].keys() == golden.NETS.keys()
    assert tuple(FILED["rates"]) == golden.SCHEDULES
    assert list(FILED["losses"]) == [str(iteration) for iteration in range(20)]
    assert golden.FILE.read_text() == golden.text(FILED)


def test_changes_are_named():
    old = {"nets": {"a": {"parameters": 1}, "b": {"parameters": 2}}, "losses": {"0": 2.5}}
    new = {"nets": {"a": {"parameters": 1}, "b": {"parameters": 3}}, "losses": {"1": 2.5}}
    expected = ["nets.b.parameters: 2 -> 3", "losses.0: 2.5 -> None", "losses.1: None -> 2.5"]
    assert golden.changes(old, new) == expected
    assert golden.changes(old, old) == []
