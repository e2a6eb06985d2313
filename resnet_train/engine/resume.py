"""A run's directory: locked, cleared or resumed; checkpoints of other runs are imported into it."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, Literal

from torch import nn

from resnet_train.config.run_dir import check_same_data, check_same_run, run_state
from resnet_train.engine import checkpoint
from resnet_train.engine.environment import environment_of, name_launch
from resnet_train.engine.task import Task, TaskConfig
from resnet_train.errors import RunError, UserError, from_write_error
from resnet_train.files import (
    copy_file,
    expand,
    lock_directory,
    nearest_existing,
    read_if_object,
    read_object,
    write_json,
)
from resnet_train.terminal import say

SAME = ("device", "processes", "threads", "git_commit", "versions", "measure")  # on what the bits may depend


def before_restart(directory: Path, restarts: int) -> Literal["new", "unfinished", "finished"]:
    """The state of the run that this launch had begun before the launcher restarted it; "new" if there is none."""
    path = directory / "environment.json"
    if not restarts or not path.exists():
        return "new"
    ours = read_object(path).get("launch") == name_launch()
    return run_state(directory) if ours else "new"


def claim_run(
    config: TaskConfig, directory: Path, digest: str, stack: contextlib.ExitStack, kind: str
) -> dict[str, Any] | None:
    """Lock the run's directory until `stack` closes and return the checkpoint to resume from. Raises UserError."""
    auto = config.resume == "auto"
    state = None if auto else _resume_state(config, directory, digest, kind)  # before a directory is made
    # Workers of a killed run keep the lock for some seconds.
    stack.enter_context(lock_directory(directory, "run_dir", "training", patience=20))
    if run_state(directory) == "finished":
        raise UserError(f"run_dir={directory}: another process has finished the run there")
    if auto:  # after locking: until then, workers of a killed run may still write there
        state = _resume_state(config, directory, digest, kind)
    return state


def _resume_state(config: TaskConfig, directory: Path, digest: str, kind: str) -> dict[str, Any] | None:
    """The checkpoint to resume from with its "path", or None. Raises UserError if it does not match `config`."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        newest = load_newest(directory / "checkpoints", kind=kind)
        if newest is None:
            return None
        path, state = newest
    else:
        path = expand(config.resume)
        state = checkpoint.load(path, kind=kind)
        if state["iteration"] == config.iterations and not (path.absolute().parent.parent / "metrics.jsonl").exists():
            raise UserError(f"resume={path}: no iteration is left; resnet-eval {shlex.quote(str(path))} measures it")
    otherwise = "another run_dir=" if config.resume == "auto" else "init_from= in place of resume="
    check_same_run(state["config"], config, str(path), otherwise)
    if not 0 <= state["iteration"] <= config.iterations:
        raise UserError(f"{path}: is of iteration {state['iteration']}, and the run has iterations={config.iterations}")
    check_same_data(state["config"]["data"], state["digest"], config.plain()["data"], digest, str(path))
    return state


def load_newest(folder: Path, *, kind: str = "net") -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint of a run: last.pt, or previous.pt if that is damaged; None if there is none at all.

    Where both are damaged or missing, the newest of those that `keep_every` has kept becomes last.pt, or best.pt if
    they are damaged. Raises UserError if there are checkpoints but none can be loaded, and for a link to nothing.
    """
    last, problems = folder / "last.pt", []
    for link in (folder, last):  # a disk that is not mounted must not end the run's record
        if link.is_symlink() and not link.exists():
            raise UserError(f"{link}: is a link to {os.readlink(link)}, which is not there")
    for path in (last, folder / "previous.pt"):
        if path.exists():
            try:
                state = checkpoint.load(path, kind=kind)
                break
            except UserError as error:
                problems.append(error)
    else:
        # best.pt alone is of a run that was killed in its first test, which is not in its record.
        best = [folder / "best.pt"] if problems else []
        kept = _newest_intact([*folder.glob("iteration-*.pt"), *best], kind)
        if kept is None:
            if not problems:
                return None
            raise UserError("; ".join([*map(str, problems), "resume=never begins the run again"]))
        path, state = kept, checkpoint.load(kept, kind=kind)
        problems = problems or [UserError(f"{last}: is not there")]
    for problem in problems:
        say(f"warning: {problem}; resuming from {path.name} (iteration {state['iteration']})")
    if problems and last.exists():
        last.replace(folder / "damaged.pt")  # else the next save would make it previous.pt
    if path.name not in ("last.pt", "previous.pt"):
        copy_file(path, last)
    return path, state


def _newest_intact(paths: list[Path], kind: str) -> Path | None:
    """The intact checkpoint of the latest iteration; one at a time is in memory."""
    intact = []
    for path in paths:
        with contextlib.suppress(UserError):
            intact.append((checkpoint.load(path, kind=kind)["iteration"], path))
    return max(intact)[1] if intact else None


def check_space(directory: Path, model: nn.Module) -> None:
    """Raises RunError if the disk has too little room for the checkpoints."""
    free = shutil.disk_usage(nearest_existing(directory)).free
    # Weights and momentum of last, previous, best and two that are being written.
    needed = 10_000_000 + 5 * 8 * sum(parameter.numel() for parameter in model.parameters())
    if free < needed:
        amounts = f"{math.floor(free / 1e6)} MB are free there, {math.ceil(needed / 1e6)} are needed"
        raise RunError(f"run_dir={directory}: {amounts}")


def begin_run(task: Task, directory: Path, state: dict[str, Any] | None, command: str, digest: str) -> dict[str, Any]:
    """Write the first files of a run; return the content of environment.json. Raises UserError and RunError."""
    check_space(directory, task.model)
    config = task.config
    environment = environment_of(command, task.device, digest) | {"measure": task.measure}
    environment["before"] = earlier_environments(environment, state)
    try:
        begin_directory(directory, config.plain(), new=state is None)
        for name, content in task.begin_files().items():
            write_json(directory / name, content, indent=None)
        if state is not None and config.resume != "auto":
            import_checkpoint(expand(config.resume), directory, state)
        write_json(directory / "environment.json", environment)  # last: it marks the launch as begun
        for part in (*directory.glob("*.part"), *directory.glob("checkpoints/*.part")):
            if re.search(r"\.\d+\.part$", part.name):  # of a process that was killed
                part.unlink(missing_ok=True)
    except OSError as error:
        raise from_write_error(f"run_dir={directory}: cannot be written", error) from error
    return environment


def earlier_environments(now: dict[str, Any], state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Where the checkpoint with content `state` was trained, but for what is as `now`, with the iteration it ended at.

    As the environment.json beside the checkpoint has it.
    """
    if state is None:
        return []
    last = read_if_object(Path(state["path"]).absolute().parent.parent / "environment.json")
    before = last.get("before")
    recorded = [one for one in before if isinstance(one, dict)] if isinstance(before, list) else []
    earlier: list[dict[str, Any]] = []
    end = 0
    for one in [*recorded, last | {"until": state["iteration"]}]:
        until = one.get("until")
        if isinstance(until, int) and end < until and end < state["iteration"] and "device" in one:
            end = min(until, state["iteration"])
            earlier.append({key: one.get(key) for key in SAME} | {"until": end})
    while earlier and all(earlier[-1][key] == now[key] for key in SAME):
        earlier.pop()
    return earlier


def begin_directory(directory: Path, config: dict[str, Any], *, new: bool) -> None:
    """Write config.json; if `new`, remove the files of an earlier run.

    Its checkpoints are first renamed together: some of them alone would look like a run to resume. Raises OSError.
    """
    folder, old = directory / "checkpoints", directory / "checkpoints.part"
    if new:
        _remove_folder(old)
        if os.path.lexists(folder):
            os.replace(folder, old)
    write_json(directory / "config.json", config)  # makes the folder a run's directory
    if new:
        for path in (old, directory / "tensorboard"):
            _remove_folder(path)
        for name in ("metrics.jsonl", "split.json", "curves.png"):
            (directory / name).unlink(missing_ok=True)


def _remove_folder(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def import_checkpoint(path: Path, directory: Path, state: dict[str, Any]) -> None:
    """Make the checkpoint `path` with content `state` the last one of the run in `directory`.

    If it is from another run, that run's metrics and TensorBoard events are copied as well. Later checkpoints in
    `directory` are removed, and best.pt becomes the best checkpoint at that iteration.
    """
    folder = directory / "checkpoints"
    source = path.absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if source.parent.resolve() != directory.resolve():
            _import_record(source.parent, directory)  # first: with last.pt it is a run to resume
        best = _best_of(state, path, source)
        if best is not None:
            copy_file(best, folder / "best.pt")
        else:
            (folder / "best.pt").unlink(missing_ok=True)
        copy_file(path, folder / "last.pt")
        (folder / "previous.pt").unlink(missing_ok=True)
        for file in sorted(folder.glob("iteration-*.pt")):
            number = file.stem.removeprefix("iteration-")
            if number.isdecimal() and int(number) > state["iteration"]:
                file.unlink()
                say(f"note: {file}: is removed, being of a later iteration than resume={path}")
    except OSError as error:
        raise from_write_error(f"resume={path}: cannot be copied into {directory}", error) from error


def _import_record(source: Path, directory: Path) -> None:
    """Copy the metrics and TensorBoard events of the run in `source`, if it has any. Raises OSError."""
    if not (source / "metrics.jsonl").is_file():
        return
    copy_file(source / "metrics.jsonl", directory / "metrics.jsonl")
    _remove_folder(directory / "tensorboard")
    for events in source.glob("tensorboard/*/events.out.tfevents.*"):
        if events.is_file():
            place = directory / events.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            copy_file(events, place)


def _best_of(state: dict[str, Any], path: Path, source: Path) -> Path | None:
    """The file in `source` with the best checkpoint at the time when `path` (content: `state`) was written, if any."""
    iteration = state["best"][1]
    if not iteration:  # there is no validation set, or it was not yet evaluated
        return None
    for candidate in (source / "best.pt", source / f"iteration-{iteration:07d}.pt", path, source / "previous.pt"):
        with contextlib.suppress(UserError):
            if checkpoint.load(candidate)["iteration"] == iteration:
                return candidate
    say(f"note: the best checkpoint so far, of iteration {iteration}, is in no file; the next better one is saved")
    return None
