"""How a run resumes from what it finds: checkpoints, metrics and configurations that are damaged, old or another's.

In this process, on digits of 8 px, where a run takes less than a second.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import forked
import pytest
import torch
from conftest import curves, metrics, needs, start
from PIL import Image

from resnet_train.classification.run import build, build_or_resume, open_data, train
from resnet_train.classification.train import ClassificationTask
from resnet_train.config.compose import compose
from resnet_train.config.run_dir import check_run_dir
from resnet_train.config.train import check_train
from resnet_train.data.image_set import ImageSet
from resnet_train.engine import checkpoint
from resnet_train.engine.environment import git_commit, name_launch
from resnet_train.engine.logger import MetricsLogger, read_points
from resnet_train.engine.loop import Clock, log_evaluation, save
from resnet_train.engine.resume import (
    SAME,
    before_restart,
    begin_run,
    claim_run,
    earlier_environments,
    import_checkpoint,
)
from resnet_train.errors import SIGNALS, RunError, UserError

needs("sklearn")
pytestmark = pytest.mark.usefixtures("signals")
SMALL = ["data.size=8", "augment.pad=1", "depth=8", "batch_size=32", "warmup.depth=0", "device=cpu", "precision=fp32"]
SMALL += ["log_every=1", "eval_every=4", "checkpoint_every=4", "keep_every=4", "eval_batch_size=200", "compile=false"]
DIGITS = ["data=digits", "data.validation=37", "iterations=12"]


@pytest.fixture
def signals():
    """Put back what a run does about signals: here it is no process of its own."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def config_of(*words):
    return check_train(compose("train", [*SMALL, *(words if "data=imagefolder" in words else (*DIGITS, *words))]))


def run(folder, *words):
    """A whole run in this process; its exit code."""
    return train(config_of(*words), folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    before = {number: signal.getsignal(number) for number in SIGNALS}
    assert run(folder) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    return folder


def cut(whole, folder, iteration):
    """A copy of a run as it was when it was killed after the checkpoint of `iteration` and before the next."""
    shutil.copytree(whole, folder)
    for name in ("summary.json", "curves.png", "checkpoints/previous.pt"):
        (folder / name).unlink()
    shutil.copy(folder / f"checkpoints/iteration-{iteration:07d}.pt", folder / "checkpoints/last.pt")
    for later in range(iteration + 4, 13, 4):
        (folder / f"checkpoints/iteration-{later:07d}.pt").unlink()
    return folder


def weights(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("checkpoints/*.pt"))}


def alike(folder, whole):
    """That a run has the checkpoints, byte for byte, the metrics and the results of another."""
    assert {**weights(folder), "previous.pt": 0} == {**weights(whole), "previous.pt": 0}
    assert metrics(folder) == metrics(whole)
    one, other = (json.loads((place / "summary.json").read_text()) for place in (folder, whole))
    assert {key: one[key] for key in ("last", "best")} == {key: other[key] for key in ("last", "best")}


# --- metrics.jsonl and config.json -----------------------------------------------------------------------------------

BAD = {
    "half a line": b'{"iteration": 3, "split": "tra\n',
    "NULs": bytes(64) + b"\n",
    "null": b"null\n",
    "a number": b"7\n",
    "deep nesting": b"[" * 100_000 + b"\n",
    "no text": b'{"iteration": 3, "split": "\xff"}\n',
    "no iteration": b'{"split": "train", "error": 1.0}\n',
    "a true iteration": b'{"iteration": true, "split": "train", "error": 1.0}\n',
    "another split": b'{"iteration": 3, "split": "trial", "error": 1.0}\n',
    "an error in words": b'{"iteration": 3, "split": "train", "error": "low"}\n',
    "seconds in words": b'{"iteration": 3, "split": "train", "error": 1.0, "seconds": "many"}\n',
    "empty": b"\n",
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_a_bad_line_of_the_metrics_is_left_out_and_the_run_goes_on(line, whole, tmp_path, capsys):
    folder = cut(whole, tmp_path / "run", 8)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join([*lines[:4], line, *lines[4:], line]))
    assert run(folder) == 0
    told = f"warning: {folder}/metrics.jsonl: lines 5, {len(lines) + 2} are damaged and left out\n"
    assert told in capsys.readouterr().out
    alike(folder, whole)


@pytest.mark.parametrize("iteration", [8, 12])
def test_a_run_whose_metrics_are_gone_ends_with_results(iteration, whole, tmp_path, capsys):
    folder = cut(whole, tmp_path / "run", iteration)
    (folder / "metrics.jsonl").unlink()
    assert run(folder) == 0
    assert "metrics.jsonl: is not there; the curves begin after iteration" in capsys.readouterr().out
    one, other = (json.loads((place / "summary.json").read_text())["last"] for place in (folder, whole))
    assert [one[split] for split in ("val", "test")] == [other[split] for split in ("val", "test")]
    assert weights(folder)["last.pt"] == weights(whole)["last.pt"]


@pytest.mark.parametrize(
    ("left", "words"),
    [(0, "has no points; the curves begin after"), (4, "ends at iteration 4; the curves have a gap until")],
)
def test_metrics_that_are_cut_short_are_named(left, words, whole, tmp_path, capsys):
    folder = cut(whole, tmp_path / "run", 8)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["iteration"] <= left))
    read_points(folder / "metrics.jsonl", left + 1, log_every=left or 2)  # by which there is no later one
    assert capsys.readouterr().out == ""
    assert run(folder) == 0
    assert f"warning: {folder}/metrics.jsonl: {words} iteration 8\n" in capsys.readouterr().out
    assert metrics(folder) == [line for line in metrics(whole) if not left < line["iteration"] <= 8]


def test_metrics_that_are_a_pipe_are_none(whole, tmp_path):
    folder = cut(whole, tmp_path / "run", 8)
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    assert run(folder) == 0
    assert metrics(folder) == [line for line in metrics(whole) if line["iteration"] > 8]


def test_no_metrics_line_too_many_after_a_resume(whole, tmp_path):
    for iteration in (4, 8):
        folder = cut(whole, tmp_path / f"run-{iteration}", iteration)
        kept = [m for m in metrics(whole) if m["iteration"] <= iteration]
        with contextlib.ExitStack() as held, contextlib.closing(MetricsLogger(folder, {}, iteration, 12)) as record:
            opened(config_of(), folder, held)
            assert metrics(folder) == kept
            record.log("train", iteration + 1, error=1.0)
        assert len(metrics(folder)) == len(kept) + 1


CONFIGS = [b"", b"[]", b"null", b'{"a":' * 100_000, b"\xff", b'{"data": []}', b'{"depth": {"a": {}}}', bytes(9)]


@pytest.mark.parametrize("content", CONFIGS, ids=range(len(CONFIGS)))
def test_a_configuration_that_is_none_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        check_run_dir(tmp_path, config_of())
    assert str(error.value).count("\n") == 0
    assert str(tmp_path) in str(error.value)
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("content", [None, b"", b'{"depth": '])
def test_checkpoints_whose_configuration_is_gone_are_resumed_from_elsewhere(content, whole, tmp_path):
    folder = cut(whole, tmp_path / "run", 8)
    last = f"{folder}/checkpoints/last.pt"
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    advice = f"; use another run_dir=, with resume={last} to resume from the checkpoint there"
    with pytest.raises(UserError, match=re.escape(advice) + "$"):
        check_run_dir(folder, config_of())
    assert run(tmp_path / "other", f"resume={last}") == 0
    assert metrics(tmp_path / "other") == metrics(whole)
    assert weights(tmp_path / "other")["last.pt"] == weights(whole)["last.pt"]
    os.remove(last)
    with pytest.raises(UserError, match=r"; use another run_dir=$"):
        check_run_dir(folder, config_of())


@pytest.mark.parametrize("iteration", [-1, 13])
def test_a_checkpoint_of_an_iteration_that_its_run_does_not_have_is_refused(iteration, whole, tmp_path):
    folder = cut(whole, tmp_path / "run", 8)
    state = checkpoint.load(folder / "checkpoints/last.pt") | {"iteration": iteration}
    checkpoint.save(folder / "checkpoints/last.pt", {key: value for key, value in state.items() if key != "path"})
    with pytest.raises(UserError, match=f"last.pt: is of iteration {iteration}, and the run has iterations=12"):
        run(folder)


def test_a_disk_that_is_full_at_the_start_is_none_of_the_input(whole, tmp_path):
    """A queue starts again what ends with 1, and gives up what ends with 2."""
    folder = cut(whole, tmp_path / "run", 8)
    (folder / f"config.json.{os.getpid()}.part").symlink_to("/dev/full")
    before = weights(folder)
    with pytest.raises(RunError) as error, contextlib.ExitStack() as held:
        opened(config_of(), folder, held)
    assert str(error.value) == f"run_dir={folder}: cannot be written: No space left on device"
    assert (error.value.code, weights(folder)) == (1, before)


# --- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(9))
def test_an_import_that_is_killed_leaves_no_run_without_its_curve(step, whole, tmp_path, monkeypatch):
    """Killed at each of its copies: what then resumes has all points, or nothing resumes."""
    replace, done = os.replace, []

    def replace_some(*paths):
        if len(done) == step:
            raise Killed
        done.append(paths)
        replace(*paths)

    path, folder = whole / "checkpoints/iteration-0000008.pt", tmp_path / "new"
    folder.mkdir()
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr("resnet_train.engine.resume.os.replace", replace_some)
        import_checkpoint(path, folder, checkpoint.load(path))
    if (folder / "checkpoints/last.pt").exists():
        assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def opened(config, folder, held):
    """The task of a run whose directory is opened until `held` closes, as the engine opens it."""
    sets = open_data(config)
    state = claim_run(config, folder, sets.digest, held, "net")
    task = build_or_resume(config, sets, torch.device("cpu"), state)
    begin_run(task, folder, state, "resnet-train", sets.digest)
    return task


class Killed(BaseException):
    """The end of a process, where nothing is caught."""


@pytest.mark.parametrize("after", [0, 1, 3, 7])
def test_a_new_start_that_is_killed_while_it_clears_the_folder_loses_nothing(after, whole, tmp_path, monkeypatch):
    """The same command without resume=never then does all again, and no old checkpoint is gone on from."""
    folder, count, unlink = cut(whole, tmp_path / "run", 8), 0, os.unlink

    def killed_at_last(*arguments, **options):
        nonlocal count
        count += 1
        if count > after:
            raise Killed
        unlink(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killed_at_last)
        with pytest.raises(Killed):
            run(folder, "resume=never")
    assert run(folder) == 0
    alike(folder, whole)
    assert not [path.name for path in folder.iterdir() if path.suffix == ".part"]


def test_a_new_start_leaves_no_file_of_the_run_before(whole, tmp_path):
    folder = cut(whole, tmp_path / "run", 8)
    (folder / "curves.png").touch()
    with contextlib.ExitStack() as held:
        opened(config_of("resume=never", "data.validation=0"), folder, held)
    assert sorted(os.listdir(folder)) == ["config.json", "environment.json"]


@pytest.mark.parametrize("at_best", [4, 12])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_an_older_checkpoint_has_its_own_best_and_nothing_of_what_came_after_it(at_best, elsewhere, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    checkpoints = folder / "checkpoints"
    for name in ("last.pt", "iteration-0000008.pt", "best.pt"):  # the best of the whole run is at its end or its begin
        path = checkpoints / name
        checkpoint.save(path, checkpoint.load(path) | {"best": [50.0, 4 if "8" in name else at_best]})
    shutil.copy(checkpoints / f"iteration-{at_best:07d}.pt", checkpoints / "best.pt")
    shutil.copy(checkpoints / "last.pt", checkpoints / "iteration-0000012-mine.pt")
    place = tmp_path / "new" if elsewhere else folder
    with contextlib.ExitStack() as held:
        run_ = opened(config_of(f"resume={checkpoints}/iteration-0000008.pt"), place, held)
    found = {path.name: checkpoint.load(path)["iteration"] for path in (place / "checkpoints").glob("*.pt")}
    kept = {} if elsewhere else {"iteration-0000004.pt": 4, "iteration-0000008.pt": 8, "iteration-0000012-mine.pt": 12}
    assert found == {"last.pt": 8, "best.pt": 4, **kept}
    assert (run_.best, run_.best_at) == (50.0, 4)


def test_where_the_best_of_then_is_left_in_no_file_there_is_none(whole, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(whole, source)
    path = source / "checkpoints/iteration-0000008.pt"
    checkpoint.save(path, checkpoint.load(path) | {"best": [50.0, 4]})
    (source / "checkpoints/iteration-0000004.pt").unlink()
    with contextlib.ExitStack() as held:
        opened(config_of(f"resume={path}"), tmp_path / "new", held)
    assert [path.name for path in (tmp_path / "new/checkpoints").glob("*.pt")] == ["last.pt"]
    assert "note: the best checkpoint so far, of iteration 4, is in no file" in capsys.readouterr().out


def test_the_best_is_not_forgotten_at_a_resume(whole, tmp_path):
    """A worse validation after it leaves best.pt as it is."""
    folder = cut(whole, tmp_path / "run", 8)
    last = folder / "checkpoints/last.pt"
    checkpoint.save(last, checkpoint.load(last) | {"best": [0.0, 4]})
    shutil.copy(folder / "checkpoints/iteration-0000004.pt", folder / "checkpoints/best.pt")
    assert run(folder) == 0
    assert checkpoint.load(folder / "checkpoints/best.pt")["iteration"] == 4
    assert checkpoint.load(last)["best"] == [0.0, 4]
    assert json.loads((folder / "summary.json").read_text())["best"]["test"]["iteration"] == 4


# --- What is chosen and logged ---------------------------------------------------------------------------------------


def test_the_best_is_chosen_by_the_validation_error_and_of_equal_ones_it_is_the_first(tmp_path):
    """Labels are made up so that validation and test errors are known and do not fall together."""
    run_ = build(config_of())
    run_.model.eval()
    parts, truth = run_.dataset.parts, {}
    for split in ("val", "test"):
        images, _ = next(run_.dataset.eval_batches(split, run_.mean, run_.device, len(parts[split])))
        truth[split] = run_.model(images).argmax(1)
    run_.model.train()
    with contextlib.closing(MetricsLogger(tmp_path, {}, 0, 12)) as record:
        wrong = {"val": [30, 20, 20, 25, 19, 19], "test": [9, 8, 7, 1, 200, 3]}
        for number in range(6):
            for split, labels in truth.items():
                changed = torch.arange(len(labels)) < wrong[split][number]
                parts[split] = ImageSet(parts[split].images, torch.where(changed, (labels + 1) % 10, labels))
            run_.iteration = number + 1
            log_evaluation(run_, tmp_path, record, Clock(0))
            kept = checkpoint.load(tmp_path / "checkpoints/best.pt")["iteration"]
            assert (kept, run_.best_at) == ([1, 2, 2, 2, 5, 5][number],) * 2
            assert run_.best == pytest.approx(100 * wrong["val"][kept - 1] / 37)


def test_the_logged_rate_is_that_of_the_step_before_and_not_of_the_next(whole):
    """Drops are at half and three quarters of 12: the first step at a tenth is the seventh."""
    rates = [line["lr"] for line in metrics(whole) if line["split"] == "train"]
    assert rates == pytest.approx([0.1] * 6 + [0.01] * 3 + [0.001] * 3)


def test_what_is_written_is_on_disk_before_it_is_given_its_name(whole, tmp_path, monkeypatch):
    """Metrics first, then the checkpoint's content, then its name, then the folder that has the name."""
    folder = cut(whole, tmp_path / "run", 8)
    done = []

    def noted(name, of):
        def call(*arguments):
            inode = (os.fstat(arguments[0]) if name == "fsync" else os.stat(arguments[0])).st_ino
            done.append((name, inode, *(Path(path).name for path in arguments[1:])))
            return of(*arguments)

        return call

    with contextlib.ExitStack() as held:
        run_ = opened(config_of(), folder, held)
        record = held.enter_context(contextlib.closing(MetricsLogger(folder, {}, 8, 12)))
        before = (folder / "checkpoints/last.pt").stat().st_ino
        monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync))
        monkeypatch.setattr(os, "replace", noted("replace", os.replace))
        save(run_, folder, record, Clock(8))
    of = {name: (folder / name).stat().st_ino for name in ("metrics.jsonl", "checkpoints")}
    new, kept = ((folder / f"checkpoints/{name}.pt").stat().st_ino for name in ("last", "iteration-0000008"))
    assert done == [
        ("fsync", of["metrics.jsonl"]),
        ("fsync", kept),
        ("replace", kept, "iteration-0000008.pt"),
        ("fsync", of["checkpoints"]),
        ("fsync", new),
        ("replace", before, "previous.pt"),
        ("replace", new, "last.pt"),
        ("fsync", of["checkpoints"]),
    ]


def test_where_the_last_checkpoints_are_gone_a_kept_one_is_resumed(whole, tmp_path, capsys):
    folder = cut(whole, tmp_path / "run", 8)
    (folder / "checkpoints/last.pt").unlink()
    assert run(folder) == 0
    told = capsys.readouterr().out
    assert (
        f"warning: {folder}/checkpoints/last.pt: is not there; resuming from iteration-0000008.pt (iteration 8)" in told
    )
    alike(folder, whole)


def test_a_run_that_is_killed_in_its_first_test_begins_again(whole, tmp_path):
    """best.pt is there by then, and the test is not in the record."""
    folder = cut(whole, tmp_path / "run", 4)
    for name in ("last.pt", "iteration-0000004.pt"):
        (folder / "checkpoints" / name).unlink()
    assert run(folder) == 0
    alike(folder, whole)


@pytest.mark.parametrize("link", ["checkpoints", "checkpoints/last.pt"])
def test_a_link_to_what_is_not_there_is_not_an_empty_run(link, whole, tmp_path):
    """Of a disk that is not mounted. The record, which belongs to the checkpoints there, stays."""
    folder = cut(whole, tmp_path / "run", 8)
    (folder / link).rename(tmp_path / "away")
    (folder / link).symlink_to("/not/mounted")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"run/{link}: is a link to /not/mounted, which is not there"):
        run(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    again = shutil.copytree(folder, tmp_path / "again", symlinks=True)
    assert run(again, "resume=never") == 0
    alike(again, whole)
    (folder / link).unlink()
    (tmp_path / "away").rename(folder / link)
    assert run(folder) == 0
    alike(folder, whole)


def test_an_empty_summary_is_of_no_finished_run(whole, tmp_path):
    folder = cut(whole, tmp_path / "run", 12)
    (folder / "summary.json").touch()
    assert run(folder) == 0
    alike(folder, whole)


@pytest.mark.parametrize("key", ["wrong", "seen", "protocol", "error"])
def test_a_last_test_without_one_of_its_values_is_made_again(key, whole, tmp_path):
    folder = cut(whole, tmp_path / "run", 12)
    *lines, last = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert (last["split"], last.pop(key) is None) == ("test", False)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, last]))
    assert run(folder) == 0
    one, other = (json.loads((place / "summary.json").read_text()) for place in (folder, whole))
    assert one["last"] == other["last"]


def test_the_summary_which_ends_a_run_is_written_last_and_to_the_disk(whole, tmp_path, monkeypatch):
    folder, there = cut(whole, tmp_path / "run", 12), []
    draw, fsync, synced = ClassificationTask.draw, os.fsync, []
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )

    def note_and_draw(task, metrics, picture):
        there.append((folder / "summary.json").exists())
        return draw(task, metrics, picture)

    monkeypatch.setattr(ClassificationTask, "draw", note_and_draw)
    assert run(folder) == 0
    assert there == [False]
    assert Path(synced[-1]).name.startswith("summary.json.")


def test_what_killed_processes_have_begun_to_write_goes(whole, tmp_path):
    folder = cut(whole, tmp_path / "run", 8)
    (folder / "config.json.77.part").touch()
    (folder / "curves.png.78.part").touch()
    (folder / "checkpoints/last.pt.79.part").touch()
    assert run(folder) == 0
    assert not list(folder.rglob("*.part"))


# --- Pictures --------------------------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_drawn_costs_a_warning_and_no_result(whole, tmp_path, capsys):
    folder = cut(whole, tmp_path / "run", 12)
    (folder / "curves.png").mkdir()
    assert run(folder) == 0
    alike(folder, whole)
    told = capsys.readouterr().out
    assert f"warning: {folder}/curves.png: cannot be drawn (" in told
    assert "curves: " not in told


# --- The same images? ------------------------------------------------------------------------------------------------


def photos(folder, shift=0):
    """A tree of images of two classes; another `shift` gives other ones by the same names."""
    for part, count in (("train", 20), ("test", 6)):
        for number in range(2 * count):
            path = folder / part / ("ab"[number % 2]) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number * 5, number % 2 * 99 + shift, 0)).save(path)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "cache"))


def test_a_run_says_where_it_has_been(whole, tmp_path):
    """Each device, commit and version with the iteration until which it counts; not each start."""
    folder = cut(whole, tmp_path / "run", 4)
    path, here = folder / "environment.json", json.loads((whole / "environment.json").read_text())
    assert here["before"] == []
    path.write_text(json.dumps(here | {"device": "a GPU"}))
    assert run(folder) == 0
    there = {key: here[key] for key in SAME} | {"device": "a GPU", "until": 4}
    assert json.loads(path.read_text())["before"] == [there]
    again = cut(folder, tmp_path / "again", 8)
    assert run(again) == 0
    assert json.loads((again / "summary.json").read_text())["before"] == [there]
    elsewhere = tmp_path / "elsewhere"
    (again / "environment.json").write_text(json.dumps(here | {"git_commit": "0123abc", "before": [there]}))
    assert run(elsewhere, f"resume={again}/checkpoints/iteration-0000008.pt") == 0
    assert curves(elsewhere) == curves(whole)  # the curves of TensorBoard are whole, too
    recorded = json.loads((elsewhere / "environment.json").read_text())["before"]
    assert [(one["device"], one["git_commit"], one["until"]) for one in recorded] == [
        ("a GPU", here["git_commit"], 4),
        (here["device"], "0123abc", 8),
    ]


def test_a_file_of_the_folder_itself_by_another_name_takes_no_curve_away(whole, tmp_path):
    folder = cut(whole, tmp_path / "run", 12)
    before = curves(folder)
    (tmp_path / "home").symlink_to(tmp_path)
    path = tmp_path / "home/run/checkpoints/iteration-0000008.pt"
    import_checkpoint(path, folder, checkpoint.load(path))
    assert curves(folder) == before
    assert metrics(folder) == metrics(whole)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"precision": "xyz"}, "precision xyz"), ({"compile": torch.zeros(2)}, "Boolean value"), ({"blocks": [1]}, None)],
    ids=str,
)
def test_a_malformed_measure_is_one_line(whole, tmp_path, change, reason):
    path = whole / "checkpoints/last.pt"
    state = checkpoint.load(path)
    state |= {"path": path, "measure": state["measure"] | change}
    config = config_of()
    if reason is None:
        assert build_or_resume(config, open_data(config), torch.device("cpu"), state).measure["blocks"] is True
    else:
        with pytest.raises(UserError, match=reason):
            build_or_resume(config, open_data(config), torch.device("cpu"), state)


A, B, C = (dict.fromkeys(SAME, letter) for letter in "ABC")


@pytest.mark.parametrize(
    ("last", "iteration", "now", "before"),
    [
        (A, 100, A, []),
        (A, 100, B, [(A, 100)]),
        (B | {"before": [A | {"until": 100}]}, 100, A, []),  # B ended before its first checkpoint
        (B | {"before": [A | {"until": 100}]}, 100, C, [(A, 100)]),
        (B | {"before": [A | {"until": 100}]}, 50, B, [(A, 50)]),  # resume= with an older checkpoint
        (B | {"before": [A | {"until": 100}]}, 50, C, [(A, 50)]),
        (B | {"before": [A | {"until": 100}]}, 150, A, [(A, 100), (B, 150)]),
        (A, 0, B, []),
        ({"before": [1, {}, {"until": "x"}, A | {"until": None}]}, 9, B, []),
        ({"before": 5} | A, 9, B, [(A, 9)]),
        ([], 9, B, []),
    ],
    ids=str,
)
def test_what_an_environment_has_of_the_past_is_what_the_checkpoint_saw(tmp_path, last, iteration, now, before):
    (tmp_path / "environment.json").write_text(json.dumps(last))
    state = {"path": tmp_path / "checkpoints/last.pt", "iteration": iteration}
    assert earlier_environments(now, state) == [one | {"until": until} for one, until in before]


@pytest.mark.parametrize(("name", "parent", "state"), [("none", 0, "unfinished"), ("none", 1, "new"), ("9f", 1, "new")])
def test_a_restart_resumes_what_its_own_launch_has_begun(whole, tmp_path, monkeypatch, name, parent, state):
    """Without --rdzv-id torchrun names all launches "none": their process then tells them apart."""
    folder = cut(whole, tmp_path / "run", 4)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "getppid", lambda: 7)
    (folder / "environment.json").write_text(json.dumps({"launch": name_launch()}))
    monkeypatch.setattr(os, "getppid", lambda: 7 + parent)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
    assert before_restart(folder, 1) == state


def test_the_commit_of_what_pip_has_installed_from_git_is_the_one_it_records(tmp_path):
    """The code is in no checkout then, and the record is that of the package beside it, not of another copy."""
    code, record = (
        tmp_path / "site" / "resnet_train" / "engine" / "code.py",
        tmp_path / "site" / "resnet_train-9.dist-info",
    )
    code.parent.mkdir(parents=True)
    code.touch()
    assert git_commit(code) is None
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: resnet-train\nVersion: 9\n")
    assert git_commit(code) is None
    vcs = {"vcs": "git", "requested_revision": "main", "commit_id": "0123abc"}
    for content, commit in (
        ({"url": "https://host/resnet-train.git", "vcs_info": vcs}, "0123abc"),
        ({"url": "file:///home/me/resnet-train", "dir_info": {}}, None),
        ({"url": "https://host/resnet-train.git", "vcs_info": 7}, None),
        ([], None),
    ):
        (record / "direct_url.json").write_text(json.dumps(content))
        assert git_commit(code) == commit
    (record / "direct_url.json").write_text('{"vcs_info": ')
    assert git_commit(code) is None
    (record / "direct_url.json").write_text(json.dumps({"vcs_info": vcs}))
    other = tmp_path / "elsewhere" / "resnet_train" / "engine" / "code.py"
    other.parent.mkdir(parents=True)
    other.touch()
    assert git_commit(other) is None


def test_a_resumed_run_is_compiled_as_it_was(whole, tmp_path):
    """Whole or block by block, by the checkpoint; those before it was stored by their depth."""
    folder = cut(whole, tmp_path / "run", 8)
    last = folder / "checkpoints/last.pt"
    state = checkpoint.load(last)
    assert state["measure"]["blocks"] is False
    older = {key: value for key, value in state["measure"].items() if key != "blocks"}
    config = config_of()
    for measure, blocks in ((state["measure"] | {"blocks": True}, True), (older, False)):
        task = build_or_resume(
            config, open_data(config), torch.device("cpu"), state | {"measure": measure, "path": last}
        )
        assert task.state()["measure"]["blocks"] == blocks


@pytest.mark.usefixtures("cache")
def test_a_run_goes_on_with_its_own_images_only(tmp_path):
    first, other = photos(tmp_path / "photos"), photos(tmp_path / "other/photos", shift=50)
    words = ["data=imagefolder", "iterations=4", f"data.root={first}"]
    assert run(tmp_path / "run", *words) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    state = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
    told = json.loads((tmp_path / "run/environment.json").read_text())
    assert summary["digest"] == state["digest"] == told["digest"]
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", *words[:2], f"data.root={other}")
    for part in (f"data.root={other}: ", f"data.root={first}, digest {state['digest'][:12]})"):
        assert part in str(error.value)
    moved = (tmp_path / "photos").rename(tmp_path / "moved")  # the same images at another place
    assert run(tmp_path / "run", *words[:2], f"data.root={moved}") == 0


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_a_sweep_does_not_take_a_run_on_other_images_for_its_own(tmp_path, command):
    first, other = photos(tmp_path / "photos"), photos(tmp_path / "other/photos", shift=50)
    words, place = [*SMALL, "data=imagefolder", "iterations=4"], tmp_path / "runs/photos/one"
    assert run(place, *words, f"data.root={first}") == 0
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    sweep = ["-m", *words, f"run_dir={place}"]
    done = command(*sweep, f"data.root={first}")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{place}: finished, skipped\n" in done.stdout
    done = command(*sweep, f"data.root={other}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"error: data.root={other}: " in done.stderr
    assert f"data.root={first}" in done.stderr
    done = command(*sweep[1:], f"data.root={other}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"holds a finished run on data.root={first}, not on data.root={other}; " in done.stderr
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


# --- The end of a process --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_run_without_a_word_and_it_goes_on(whole, tmp_path):
    words = start(*SMALL, *DIGITS, "run_dir=run")
    with forked.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert any("resnet-8-A on digits" in line for line in job.stdout)
        job.stdout.close()
        assert job.stderr.read() == ""
    assert job.returncode == 1
    assert not (tmp_path / "run/summary.json").exists()
    assert run(tmp_path / "run") == 0
    alike(tmp_path / "run", whole)
