"""Whole runs on real digits: what they leave, how they stop, how they go on."""

import json
import os
import random
import signal
import subprocess
import time

import forked
import pytest
import torch
from conftest import TINY, differences, metrics, needs, stamp, start

from resnet_train.engine import checkpoint

needs("sklearn")


def test_a_run_leaves_what_the_readme_says(undisturbed):
    assert sorted(os.listdir(undisturbed)) == [
        "checkpoints",
        "config.json",
        "curves.png",
        "environment.json",
        "metrics.jsonl",
        "split.json",
        "summary.json",
        "tensorboard",
    ]
    assert sorted(os.listdir(undisturbed / "checkpoints")) == ["best.pt", "last.pt", "previous.pt"]
    assert (undisturbed / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_every_line_names_data_split_protocol_seed_and_iteration(undisturbed):
    for line in metrics(undisturbed):
        assert line["data"] == "digits"
        assert line["seed"] == 0
        assert {"split", "protocol", "iteration", "epoch", "loss", "error"} <= line.keys()
    splits = {
        split: [m["iteration"] for m in metrics(undisturbed) if m["split"] == split] for split in ("train", "test")
    }
    assert splits["train"] == [*range(5, 61, 5), 61]
    assert splits["test"] == [12, 24, 36, 48, 60, 61]


def test_the_warm_up_ends_by_the_error_of_its_window_and_for_good(undisturbed):
    """Windows of 15 iterations, three logged points each, of which the first below 85 % ends it."""
    points = [m for m in metrics(undisturbed) if m["split"] == "train"]
    windows = [sum(m["error"] for m in points[start : start + 3]) / 3 for start in range(0, 12, 3)]
    end = 3 * (1 + next(i for i, error in enumerate(windows) if error < 85))
    assert [m["lr"] for m in points[:end]] == [0.01] * end
    assert points[end]["lr"] == (0.1 if points[end]["iteration"] <= 30 else pytest.approx(0.01))


def test_the_summary_has_the_last_point_and_the_best_of_the_validation_error(undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    test = [m for m in metrics(undisturbed) if m["split"] == "test"]
    val = [m for m in metrics(undisturbed) if m["split"] == "val"]
    best = min(val, key=lambda m: m["error"])
    assert summary["last"]["test"]["error"] == test[-1]["error"]
    assert summary["best"]["val"]["iteration"] == best["iteration"]
    assert summary["best"]["test"]["error"] == next(m["error"] for m in test if m["iteration"] == best["iteration"])
    assert checkpoint.load(undisturbed / "checkpoints/best.pt")["iteration"] == best["iteration"]
    assert summary["images"] == {"train": 1300, "val": 137, "test": 360}
    assert summary["parameters"] == sum(
        p.numel()
        for name, p in checkpoint.load(undisturbed / "checkpoints/last.pt")["model"].items()
        if is_weight(name)
    )


def is_weight(name):
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_the_held_out_part_is_written_and_no_test_label_chose_it(undisturbed):
    from resnet_train.data.sampler import held_out

    assert json.loads((undisturbed / "split.json").read_text())["val"] == held_out(1437, 137)[1].tolist()


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_the_undisturbed_run(undisturbed, tmp_path):
    """SIGKILL three times at random moments after the first checkpoint; then bit for bit the same files and curves."""
    rng, kills, seed = random.Random(), 0, random.randrange(10**6)
    rng.seed(seed)
    folder = tmp_path / "run"
    for _ in range(40):
        process = forked.Popen(start(*TINY, "run_dir=run"), cwd=tmp_path, stdout=subprocess.DEVNULL)
        if kills < 3:
            before = stamp(folder)
            while stamp(folder) == before and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.25))
            if process.poll() is None:
                process.kill()
                kills += 1
        process.wait()
        if (folder / "summary.json").exists():
            break
    assert kills == 3, f"seed {seed}: {kills} kills"
    assert differences(folder, undisturbed) == [], f"seed {seed}"


def test_ctrl_c_ends_at_an_iteration_with_a_checkpoint_and_the_run_goes_on(undisturbed, tmp_path):
    with forked.Popen(start(*TINY, "run_dir=run"), cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("iteration 10/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    assert "the same command resumes" in rest
    stopped = checkpoint.load(tmp_path / "run/checkpoints/last.pt")["iteration"]
    assert 10 <= stopped < 61
    done = forked.run(start(*TINY, "run_dir=run"), cwd=tmp_path, capture_output=True, text=True)
    assert f"resuming from iteration {stopped}" in done.stdout
    assert (tmp_path / "run/checkpoints/last.pt").read_bytes() == (undisturbed / "checkpoints/last.pt").read_bytes()
    assert metrics(tmp_path / "run") == metrics(undisturbed)


def test_resnet_eval_gives_the_logged_count(undisturbed, tmp_path):
    for split in ("test", "val"):
        out = tmp_path / f"{split}.json"
        arguments = [f"checkpoint={undisturbed}/checkpoints/last.pt", f"split={split}", f"out={out}"]
        forked.run(start(*arguments, entry="evaluate"), cwd=tmp_path, check=True, capture_output=True)
        result = json.loads(out.read_text())
        logged = next(m for m in reversed(metrics(undisturbed)) if m["split"] == split)
        assert {k: result[k] for k in ("wrong", "seen", "error")} == {k: logged[k] for k in ("wrong", "seen", "error")}
        assert (result["data"], result["split"], result["iteration"]) == ("digits", split, 61)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("depth=14", "depth=14: the run in run has depth=8"),
        ("schedule.lr=0.2", "schedule.lr=0.2: the run in run has schedule.lr=0.1"),
        ("seed=1", "seed=1: the run in run has seed=0"),
    ],
)
def test_an_unfinished_run_is_not_continued_as_another(undisturbed, command, tmp_path, changed, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text((undisturbed / "config.json").read_text())
    done = command(*TINY, "run_dir=run", changed)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert os.listdir(tmp_path / "run") == ["config.json"]


def test_a_finished_run_is_not_run_again(undisturbed, command):
    done = command(*TINY, f"run_dir={undisturbed}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "holds a finished run" in done.stderr


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(command, tmp_path):
    arguments = [
        "data=digits",
        "iterations=60",
        "schedule.lr=1e30",
        "log_every=50",
        "checkpoint_every=1",
        "run_dir=run",
    ]
    done = command(*arguments, "precision=fp32", "warmup.depth=8", "warmup.lr=1e30")
    assert done.returncode == 1
    assert "not finite" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run/summary.json").exists()
    for path in (tmp_path / "run/checkpoints").glob("*.pt"):
        assert all(
            torch.isfinite(value).all()
            for value in checkpoint.load(path)["model"].values()
            if value.is_floating_point()
        )
