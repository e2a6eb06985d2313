"""The commands as they are typed: a wrong one is one line on stderr, exit code 2, and nothing else."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import start

from resnet_train import cli

# The entry point, and a note in $TORCH of whether torch came with it.
CODE = """
import atexit, os, sys
atexit.register(lambda: open(os.environ["TORCH"], "w").write(str("torch" in sys.modules)))
from resnet_train.cli import {entry}
sys.argv[0] = "resnet-{name}"
if __name__ == "__main__":
    {entry}()
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Run a command line in an empty folder, each once: its result, with what it left there and if torch was loaded."""

    @functools.cache
    def run(line, name="train"):
        folder = tmp_path_factory.mktemp("command")
        note = folder.with_suffix(".torch")
        code = CODE.format(entry={"train": "train", "eval": "evaluate"}[name], name=name)
        done = subprocess.run(
            [sys.executable, "-c", code, *line.split()],
            cwd=folder,
            env=os.environ | {"RESNET_TRAIN_DATA": str(folder / "data"), "TORCH": str(note)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        done.left = sorted(os.listdir(folder))
        done.torch = note.read_text() == "True"
        return done

    return run


def has_one_line_of_error(done, *parts):
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
    assert all(part in done.stderr for part in parts), done.stderr
    assert done.left == []
    return True


# --- Help, configuration, completion ---------------------------------------------------------------------------------


def test_help_shows_examples_groups_and_values(outcome):
    done = outcome("--help")
    assert (done.returncode, done.stderr, done.left, done.torch) == (0, "", [], False)
    assert "resnet-train depth=110 data=cifar10" in done.stdout
    assert "resnet-train -m " in done.stdout
    for group, options in {
        "data": "cifar10, digits, imagefolder, imagenet",
        "recipe": "cifar10, digits, imagefolder, imagenet",
        "schedule": "cosine, plateau, step",
    }.items():
        assert f"{group}: {options}\n" in done.stdout
    assert "shortcut: A\n" in done.stdout


def test_every_example_of_the_help_is_a_command_that_works(outcome, tmp_path, monkeypatch):
    """Those that name no file of the reader's own."""
    monkeypatch.chdir(tmp_path)
    examples = [
        line.split("   ")[0].split()[1:]
        for line in outcome("--help").stdout.splitlines()
        if line.startswith("  resnet-train ") and "data.root" not in line
    ]
    assert len(examples) >= 4
    for words in examples:
        overrides = [word for word in words if "=" in word]
        for job in cli._jobs(overrides, "-m" in words):
            cli._prepare_train(cli._compose("train", job), job, "-m" in words)


def test_eval_has_help_of_its_own(outcome):
    done = outcome("--help", "eval")
    assert (done.returncode, done.stderr, done.left, done.torch) == (0, "", [], False)
    assert "resnet-eval checkpoint=" in done.stdout


def test_cfg_prints_the_whole_configuration(outcome):
    done = outcome("depth=110 data=digits schedule=cosine schedule.lr=0.05 arch=plain --cfg job")
    assert (done.returncode, done.stderr, done.left, done.torch) == (0, "", [], False)
    found = yaml.safe_load(done.stdout)
    words = ["depth=110", "data=digits", "schedule=cosine", "schedule.lr=0.05", "arch=plain"]
    assert found == cli._compose("train", words)
    assert (found["depth"], found["recipe"], found["arch"]) == (110, "digits", "plain")
    assert found["schedule"] == {"name": "cosine", "lr": 0.05}


def test_cfg_of_a_wrong_configuration_is_an_error(outcome):
    assert has_one_line_of_error(outcome("depth=21 --cfg job"), "depth=21", "nearest: 20")


def test_completion_is_a_script(outcome):
    done = outcome("-sc install=bash")
    assert (done.returncode, done.stderr, done.left, done.torch) == (0, "", [], False)
    assert "complete " in done.stdout
    assert "resnet-train" in done.stdout


# --- Wrong command lines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("depth=21", ["depth=21", "nearest: 20"]),
        ("dept=20", ["dept=20", "did you mean depth?"]),
        ("schedule.lrr=1", ["schedule.lrr=1", "did you mean schedule.lr?"]),
        ("data=cifar11", ["data=cifar11", "did you mean cifar10?"]),
        ("data=[cifar10,digits]", ["data=[cifar10,digits]"]),
        ("schedule={lr:1}", ["schedule={lr:1}", "schedule.KEY=VALUE"]),
        ("batch_size=abc", ["batch_size=abc", "whole number"]),
        ("data=imagenet depth=20 data.root=.", ["depth=20", "nearest: 18"]),
        ("data=imagefolder data.root=.", ["data.root=", "empty"]),
        ("data.root=~/cifar", ["data.root=~/cifar", "quotes"]),
        ("depth", ["'depth'", "key=value"]),
        ("depth=20 32", ["'32'", "key=value"]),
        ("depth=[", ["depth=["]),
        ("depth=20,32", ["depth=20,32", "-m"]),
        ("depth=${nosuch}", ["depth", "nosuch"]),
        ("run_dir=/dev/null/x", ["run_dir=/dev/null/x"]),
        ("hydra.nosuch=1", ["hydra.nosuch"]),
        ("--nosuch", ["--nosuch", "--help"]),
        ("--depth 20", ["--depth", "--help"]),
        ("--cfg jbo", ["jbo", "job"]),
        ("-cn eval", ["--config-name"]),
        ("-m depth=20,21", ["depth=21", "nearest: 20"]),
        ("-m depth=20,20", ["share runs/cifar10/resnet-20-A/seed-0"]),
        ("-m seed=0,1 run_dir=x", ["share x"]),
        ("-m data=glob(*)", ["data=glob(*)"]),
        ("-m hydra.sweeper.params.depth=20", []),
        ("hydra.mode=MULTIRUN depth=21", ["depth=21"]),
    ],
)
def test_a_wrong_command_line_is_one_line_and_leaves_nothing(outcome, line, parts):
    done = outcome(line)
    assert has_one_line_of_error(done, *parts)
    assert not done.torch


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ["checkpoint", "checkpoint="]),
        ("checkpoint=nosuch.pt", ["checkpoint=nosuch.pt", "no such file"]),
        (f"checkpoint={__file__} data=cifar11", ["cifar11", "did you mean cifar10?"]),
        (f"-m checkpoint={__file__}", ["-m"]),
        (f"hydra.mode=MULTIRUN checkpoint={__file__}", ["-m"]),
        ("chekpoint=x", ["chekpoint=x", "did you mean checkpoint?"]),
    ],
)
def test_a_wrong_evaluation_is_one_line_and_leaves_nothing(outcome, line, parts):
    done = outcome(line, "eval")
    assert has_one_line_of_error(done, *parts)
    assert not done.torch


def test_a_text_is_no_checkpoint(outcome):
    """torch finds it out, within the job: Hydra adds no line of its own."""
    assert has_one_line_of_error(outcome(f"checkpoint={__file__}", "eval"), __file__)


def test_data_that_only_the_job_can_judge(outcome):
    done = outcome("data=digits data.validation=5000 device=cpu")
    assert has_one_line_of_error(done, "data.validation=5000", "1437")


# --- Sweeps ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_trains_what_is_missing(tmp_path):
    pytest.importorskip("sklearn")

    def sweep():
        words = "-m depth=8,14 data=digits iterations=6 log_every=3 eval_every=6 compile=false device=cpu"
        done = subprocess.run(
            start(*words.split()),
            cwd=tmp_path,
            env=os.environ | {"RESNET_TRAIN_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = sweep()
    assert first.count("test error") == 2
    assert "skipped" not in first
    runs = {path.parent.parent.name: path.parent for path in Path(tmp_path).glob("runs/digits/*/*/summary.json")}
    assert runs.keys() == {"resnet-8-A", "resnet-14-A"}
    summaries = {net: json.loads((run / "summary.json").read_text()) for net, run in runs.items()}
    assert [summaries[net]["net"] for net in ("resnet-8-A", "resnet-14-A")] == ["resnet-8-A", "resnet-14-A"]
    for run in runs.values():
        assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["iteration"] == 6

    again = sweep()
    assert again.count("skipped") == 2
    assert "test error" not in again

    cut, whole = runs["resnet-14-A"], runs["resnet-8-A"]
    (cut / "summary.json").unlink()
    before = (whole / "summary.json").read_bytes()
    third = sweep()
    assert [line for line in third.splitlines() if "skipped" in line] == [
        f"{whole.relative_to(tmp_path)}: finished, skipped"
    ]
    assert "going on from iteration 6" in third
    assert (whole / "summary.json").read_bytes() == before
    assert json.loads((cut / "summary.json").read_text())["last"] == summaries["resnet-14-A"]["last"]


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_job_that_fails_and_tells_at_its_end(tmp_path):
    pytest.importorskip("sklearn")
    words = "-m depth=8 data=digits iterations=4 log_every=2 eval_every=4 compile=false device=cpu precision=fp32"
    done = subprocess.run(
        start(*words.split(), "schedule.lr=1e38,0.1"),
        cwd=tmp_path,
        env=os.environ | {"RESNET_TRAIN_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert all(line.startswith("error: ") for line in done.stderr.splitlines()), done.stderr
    assert "ended with exit code 1" in done.stderr.splitlines()[-1]
    assert [path.parent.name for path in Path(tmp_path).glob("runs/digits/*/*/summary.json")] == [
        path.name for path in Path(tmp_path).glob("runs/digits/*/*schedule.lr-0.1*")
    ]
    assert len(list(Path(tmp_path).glob("runs/digits/*/*/summary.json"))) == 1
