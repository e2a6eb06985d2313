"""A run's directory: claimed, cleared or resumed, and checkpoints from elsewhere taken into it."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from pathlib import Path
from typing import Any, Literal

from torch import nn

from resnet_train.config.run_dir import check_same_data, check_same_run, run_state
from resnet_train.engine import checkpoint
from resnet_train.engine.environment import environment_of
from resnet_train.engine.task import Task, TaskConfig
from resnet_train.errors import UserError
from resnet_train.files import expand, lock_directory, nearest_existing, read_object, write_json
from resnet_train.terminal import say


def before_restart(directory: Path, restarts: int) -> Literal["new", "unfinished", "finished"]:
    """How far this launch had come with its run when a worker died and the launcher started all again; else new."""
    path = directory / "environment.json"
    if not restarts or not path.exists():
        return "new"
    ours = read_object(path).get("launch") == os.environ.get("TORCHELASTIC_RUN_ID")
    return run_state(directory) if ours else "new"


def claim_run(
    config: TaskConfig, directory: Path, digest: str, held: contextlib.ExitStack, kind: str
) -> dict[str, Any] | None:
    """Take the run's directory, until `held` closes. The checkpoint to resume from, if any. Raises UserError."""
    auto = config.resume == "auto"
    state = None if auto else _resume_state(config, directory, digest, kind)  # before a directory is made
    # Workers of a killed run hold on to it for some seconds.
    held.enter_context(lock_directory(directory, "run_dir", "training", patience=20))
    if run_state(directory) == "finished":
        raise UserError(f"run_dir={directory}: another process has finished the run there")
    if auto:  # only now: until they let go of the directory, workers of a killed run write there
        state = _resume_state(config, directory, digest, kind)
    return state


def _resume_state(config: TaskConfig, directory: Path, digest: str, kind: str) -> dict[str, Any] | None:
    """The checkpoint to resume from and its "path", if any, held against what was asked. Raises UserError."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        found = checkpoint.load_newest(directory / "checkpoints", kind=kind)
        if found is None:
            return None
        path, state = found
    else:
        path = expand(config.resume)
        state = checkpoint.load(path, kind=kind)
        if state["iteration"] == config.iterations and not (path.absolute().parent.parent / "metrics.jsonl").exists():
            raise UserError(f"resume={path}: no iteration is left; resnet-eval {shlex.quote(str(path))} measures it")
    otherwise = "another run_dir=" if config.resume == "auto" else "init_from= in place of resume="
    state["path"] = str(path)
    check_same_run(state["config"], config, str(path), otherwise)
    check_same_data(state["config"]["data"], state["digest"], config.plain()["data"], digest, str(path))
    return state


def check_space(directory: Path, model: nn.Module) -> None:
    """Refuse to begin where the checkpoints would not fit. Raises UserError."""
    free = shutil.disk_usage(nearest_existing(directory)).free
    # Weights and momentum: last, previous, best, two being made.
    needed = 10_000_000 + 5 * 8 * sum(parameter.numel() for parameter in model.parameters())
    if free < needed:
        raise UserError(f"run_dir={directory}: {free / 1e6:.0f} MB are free there, {needed / 1e6:.0f} are needed")


def begin_run(task: Task, directory: Path, state: dict[str, Any] | None, command: str, digest: str) -> dict[str, Any]:
    """Write what a run begins with: config.json and, given back, environment.json. Raises UserError."""
    check_space(directory, task.model)
    config, environment = task.config, environment_of(command, task.device, digest)
    try:
        begin_directory(directory, config.plain(), new=state is None)
        for name, content in task.begin_files().items():
            write_json(directory / name, content, indent=None)
        if state is not None and config.resume != "auto":
            import_checkpoint(expand(config.resume), directory, state)
        write_json(directory / "environment.json", environment)  # last: with it, this launch has begun
    except OSError as error:
        raise UserError(f"run_dir={directory}: cannot be written: {error.strerror}") from error
    return environment


def begin_directory(directory: Path, config: dict[str, Any], *, new: bool) -> None:
    """Write config.json; a `new` start removes what a run before left.

    The checkpoints leave their place all at once: half of them would be taken for a run to resume. Raises OSError.
    """
    folder, old = directory / "checkpoints", directory / "checkpoints.part"
    if new:
        _remove_folder(old)
        if folder.exists():
            os.replace(folder, old)
    write_json(directory / "config.json", config)  # with it, the folder is a run's
    if new:
        for place in (old, directory / "tensorboard"):
            _remove_folder(place)
        for name in ("metrics.jsonl", "split.json", "curves.png"):
            (directory / name).unlink(missing_ok=True)


def _remove_folder(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def import_checkpoint(path: Path, directory: Path, state: dict[str, Any]) -> None:
    """Make the checkpoint `path`, which holds `state`, the last of the run in `directory`.

    To another run's directory it brings that run's metrics; in its own, what came after it goes. best.pt becomes the
    best that there was then.
    """
    folder = directory / "checkpoints"
    source = path.absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        best = _best_of(state, path, source)
        if best is not None:
            shutil.copy(best, folder / "best.pt.part")
            os.replace(folder / "best.pt.part", folder / "best.pt")
        else:
            (folder / "best.pt").unlink(missing_ok=True)
        shutil.copy(path, folder / "last.pt.part")
        os.replace(folder / "last.pt.part", folder / "last.pt")
        (folder / "previous.pt").unlink(missing_ok=True)
        for kept in folder.glob("iteration-*.pt"):
            if int(kept.stem.removeprefix("iteration-")) > state["iteration"]:
                kept.unlink()
        if source.parent != directory.absolute() and (source.parent / "metrics.jsonl").exists():
            shutil.copy(source.parent / "metrics.jsonl", directory / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"resume={path}: cannot be taken into {directory}: {error.strerror}") from error


def _best_of(state: dict[str, Any], path: Path, source: Path) -> Path | None:
    """The checkpoint in `source` of the best iteration so far when `path`, which holds `state`, was written, if any."""
    at = state["best"][1]
    if not at:  # nothing was held out, or not yet tested
        return None
    for place in (source / "best.pt", source / f"iteration-{at:07d}.pt", path, source / "previous.pt"):
        with contextlib.suppress(UserError):
            if checkpoint.load(place)["iteration"] == at:
                return place
    say(f"note: the best checkpoint so far, of iteration {at}, is left in no file; the next better one is kept")
    return None
