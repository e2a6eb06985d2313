"""One run from its directory's first file to its last: opened or resumed, trained, summed up."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import nn

from resnet_train import __version__, checkpoint, curves, paper, state_dicts
from resnet_train.batchnorm import group_statistics
from resnet_train.build import (
    check_synchronised,
    compile_network,
    exchanging,
    network,
    open_sets,
    pick_compile,
    pick_device,
    pick_precision,
    placed,
)
from resnet_train.config.runs import check_same_data, check_same_run, run_state
from resnet_train.config.training import Config, share
from resnet_train.data.places import describe_left_out
from resnet_train.data.sampler import generator
from resnet_train.data.sets import MemorySets, StreamedSets
from resnet_train.distributed import from_main, joined, main, one_after_all, together, total, world
from resnet_train.errors import UserError, of_a_peer
from resnet_train.files import claimed, expand, nearest_existing, read_object, write_json
from resnet_train.models.resnet import multiply_adds, parameters
from resnet_train.record import Record
from resnet_train.schedule import Progress
from resnet_train.terminal import say
from resnet_train.train import Clock, Meters, Run, Stop, log_test, loop
from resnet_train.weights import Source, check_same_net, divisor, read_source


def train(config: Config, directory: Path) -> int:
    """The command `resnet-train`: train in `directory`, going on where a run there was cut. The exit code.

    0: finished; 128 and a signal's number: stopped by it, with a checkpoint. Raises UserError and RunError.
    Several processes do this together, and the first alone writes and prints.
    """
    device = pick_device(config.device)
    with joined(device, config.timeout), contextlib.ExitStack() as held:
        restarts = int(total(torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))))
        before = from_main(lambda: before_restart(directory, restarts))
        if before == "finished":  # a process died after all was done
            return 0
        resume = config.resume if before == "new" else "auto"
        config = dataclasses.replace(config, devices=world(), resume=resume)
        run = build(config, directory)
        source = from_main(lambda: _source(config, directory))
        if source is not None:
            together(lambda: begin_from(run, source))
        state, environment = from_main(lambda: _open(run, held))
        together(lambda: None if main() else _go_on(run, state))  # as the first has in `_open`
        wanted = pick_compile(config, device) if state is None else run.compiled
        if wanted:
            run.compiled = compile_network(run.model, config.depth, run.device)
        if world() > 1:
            run.net = exchanging(run.model, run.precision, (run.share.images, 3, config.data.size, config.data.size))
        _announce(run, state, source)
        stop = Stop()
        record = Record(
            directory if main() else None,
            {"data": run.sets.label, "seed": config.seed},
            run.iteration,
            config.iterations,
        )
        run.seconds = record.seconds
        reference = _reference(config, run.sets.label)
        if reference:
            record.reference(reference[1], config.iterations)
        try:
            with contextlib.closing(record):
                loop(run, record, stop)
                splits = ("val", "test") if run.sets.sizes["val"] else ("test",)
                if run.iteration == config.iterations and from_main(lambda: record.lacks(run.iteration, *splits)):
                    log_test(run, record, Clock(run.iteration))  # it was trained and tested, and the record was lost
            if run.iteration == config.iterations:
                from_main(lambda: _summarise(run, environment, reference))
                return 0
        except RuntimeError as error:
            # Another has died, and the launcher, which names it, ends this one.
            if world() > 1 and stop.signal and of_a_peer(error):
                sys.exit(1)
            if not (stop.signal and _of_the_compiler(error)):
                raise
            # The signal was for the compiler's own processes as well. Nothing has come of this iteration.
            if main():
                begun = (directory / "checkpoints" / "last.pt").exists()
                how = "goes on from the last checkpoint" if begun else "begins again"
                say(f"stopped after iteration {run.iteration}, while compiling; the same command {how}")
            return 128 + stop.signal
        if main():
            how = "the same command" if config.resume == "auto" else "the same command with resume=auto"
            say(f"stopped at iteration {run.iteration}, checkpoint written; {how} goes on from there")
        return 128 + stop.signal


def _of_the_compiler(error: BaseException | None) -> bool:
    """Whether torch's compiler has raised `error`, or what it came of."""
    while error is not None:
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo", "concurrent.futures")):
            return True
        error = error.__cause__ or error.__context__
    return False


def before_restart(directory: Path, restarts: int) -> Literal["new", "unfinished", "finished"]:
    """How far this launch had come with its run when a worker died and the launcher started all again; else new."""
    path = directory / "environment.json"
    if not restarts or not path.exists():
        return "new"
    ours = read_object(path).get("launch") == os.environ.get("TORCHELASTIC_RUN_ID")
    return run_state(directory) if ours else "new"


def build(config: Config, directory: Path, sets: MemorySets | StreamedSets | None = None) -> Run:
    """Data, if not given as `sets`, network and optimiser, with nothing written yet. Raises UserError."""
    device = pick_device(config.device)
    precision = together(lambda: pick_precision(config.precision, device))
    part = together(lambda: share(config, world()))
    sets = sets or one_after_all(lambda: open_sets(config))
    torch.backends.cudnn.benchmark = True  # shapes are fixed
    torch.manual_seed(generator(config.seed, "initialisation", 0).initial_seed())
    model = network(config, len(sets.classes))
    if config.bn_images == "all" and world() > 1:
        together(lambda: check_synchronised(device))
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world() > 1 or part.passes > 1 or part.group < part.images or config.activation_checkpointing:
        group_statistics(model, part.group)
    model.recompute = config.activation_checkpointing
    if config.freeze is not None:
        model.freeze(config.freeze)
    model = placed(model, device, precision)
    return Run(
        config=config,
        directory=directory,
        device=device,
        precision=precision,
        compiled=False,
        sets=sets,
        mean=one_after_all(sets.mean_image).to(device),
        model=model,
        net=model,
        share=part,
        optimizer=optimizer(model, config, precision),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        meters=Meters(device),
        progress=Progress(warm=0 < config.warmup.depth <= config.depth),
    )


def optimizer(model: nn.Module, config: Config, precision: str) -> torch.optim.SGD:
    """SGD with momentum. Weight decay on all parameters, as in the paper, or on convolution and linear weights only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if config.decay == "all" or p.ndim > 1]
    spared = [p for p in trained if config.decay == "weights" and p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    found = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.schedule.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
    if precision == "fp16" and config.momentum:  # where the scaler skips the first step, it would stay uninitialised
        for parameter in trained:
            found.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return found


def _source(config: Config, directory: Path) -> Source | None:
    """The weights that a run begins with, unless it goes on from a checkpoint, which has its own. Raises UserError."""
    begun = (directory / "checkpoints" / "last.pt").exists() or (directory / "checkpoints" / "previous.pt").exists()
    if config.init_from is None or (config.resume != "never" and (config.resume != "auto" or begun)):
        return None
    path = Path(config.init_from)
    source = read_source(path)
    check_same_net(source, config, f"init_from={path}")
    return source


def begin_from(run: Run, source: Source) -> None:
    """Take over the weights of `source` and the mean that its images had subtracted; other classes keep a fresh fc.

    At another size of images the mean image's channel averages take its place.
    """
    state = state_dicts.rescaled(source.model, source.std, divisor(run.config))
    if not source.same_classes(run.sets.classes):
        state = state | {f"fc.{name}": value for name, value in run.model.fc.state_dict().items()}
    with checkpoint.fitting(f"init_from={run.config.init_from}"):
        run.model.load_state_dict(state)
    mean = source.mean.to(run.mean)
    run.mean = mean if mean.shape == run.mean.shape else mean.mean((0, 1)).expand_as(run.mean).contiguous()


def _resume_state(run: Run) -> dict[str, Any] | None:
    """The checkpoint to go on from, if any, held against what was asked. Raises UserError if they differ."""
    config = run.config
    if config.resume == "never":
        return None
    if config.resume == "auto":
        found = checkpoint.load_newest(run.directory / "checkpoints")
        if found is None:
            return None
        path, state = found
    else:
        path = expand(config.resume)
        state = checkpoint.load(path)
        if state["iteration"] == config.iterations and not (path.absolute().parent.parent / "metrics.jsonl").exists():
            raise UserError(f"resume={path}: no iteration is left; resnet-eval {shlex.quote(str(path))} measures it")
    otherwise = "another run_dir=" if config.resume == "auto" else "init_from= in place of resume="
    check_same_run(state["config"], config.plain(), str(path), otherwise)
    check_same_data(state["config"]["data"], state["digest"], config.plain()["data"], run.sets.digest, str(path))
    return state


def _go_on(run: Run, state: dict[str, Any] | None) -> None:
    """Take over a checkpoint, if there is one. Raises UserError for one that does not fit."""
    if state is not None:
        with checkpoint.fitting(f"the checkpoint to go on from in {run.directory}"):
            run.precision, run.compiled = state["measure"]["precision"], state["measure"]["compile"]
            run.load(state)


def _open(run: Run, held: contextlib.ExitStack) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Take the run's directory, until `held` closes, and write what a run begins with: a checkpoint, the environment.

    The checkpoint is the one to go on from, if any. Raises UserError.
    """
    auto = run.config.resume == "auto"
    check_space(run.directory, run.model)
    state = None if auto else _resume_state(run)  # before a directory is made
    # Workers of a killed run hold on to it for some seconds.
    held.enter_context(claimed(run.directory, "run_dir", "training", patience=20))
    if run_state(run.directory) == "finished":
        raise UserError(f"run_dir={run.directory}: another process has finished the run there")
    if auto:  # only now: until they let go of the directory, workers of a killed run write there
        state = _resume_state(run)
    _go_on(run, state)  # before a checkpoint that does not fit takes the place of one that does
    return state, _open_directory(run, state)


def check_space(directory: Path, model: nn.Module) -> None:
    """Refuse to begin where the checkpoints would not fit. Raises UserError."""
    free = shutil.disk_usage(nearest_existing(directory)).free
    needed = 10_000_000 + 5 * 8 * parameters(model)  # weights and momentum: last, previous, best, two being made
    if free < needed:
        raise UserError(f"run_dir={directory}: {free / 1e6:.0f} MB are free there, {needed / 1e6:.0f} are needed")


def _open_directory(run: Run, state: dict[str, Any] | None) -> dict[str, Any]:
    """Write config.json, the split, a checkpoint from elsewhere and, given back, environment.json.

    A new start removes what a run before left.
    """
    directory, config = run.directory, run.config
    environment = environment_of("resnet-train", run.device, run.sets.digest)
    try:
        begin_directory(directory, config.plain(), new=state is None)
        if run.sets.sizes["val"]:
            write_json(directory / "split.json", {"val": run.sets.val_indices.tolist()}, indent=None)
        if state is not None and config.resume != "auto":
            _adopt(expand(config.resume), directory, state)
        write_json(directory / "environment.json", environment)  # last: with it, this launch has begun
    except OSError as error:
        raise UserError(f"run_dir={directory}: cannot be written: {error.strerror}") from error
    return environment


def begin_directory(directory: Path, config: dict[str, Any], *, new: bool) -> None:
    """Write config.json; a `new` start removes what a run before left.

    The checkpoints leave their place all at once: half of them would be taken for a run to go on with. Raises OSError.
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
        for name in ("metrics.jsonl", "split.json", "test.json", "curves.png"):
            (directory / name).unlink(missing_ok=True)


def _remove_folder(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _adopt(path: Path, directory: Path, state: dict[str, Any]) -> None:
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


def environment_of(command: str, device: torch.device, digest: str) -> dict[str, Any]:
    """Where, by what `command` and on data of which `digest` a run is made, for environment.json."""
    return {
        "command": shlex.join([command, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "processes": world(),
        "threads": torch.get_num_threads(),
        "launch": os.environ.get("TORCHELASTIC_RUN_ID"),
        "digest": digest,
        "versions": versions(device),
    }


def git_commit() -> str | None:
    """The commit of this package's code, where it lies in a git repository."""
    return _output_of("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40") or None


def versions(device: torch.device) -> dict[str, str]:
    """Of what computes; on a GPU of its libraries and driver as well."""
    found = {
        "resnet_train": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    if device.type == "cuda":
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return found


def _output_of(*command: str) -> str:
    """What a command prints; empty where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the GPU's memory where it trains on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_held(device: torch.device) -> int:
    """The bytes that this process holds now, likewise; where the system does not say, the most so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_memory(device)


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _announce(run: Run, state: dict[str, Any] | None, source: Source | None) -> None:
    if not main():
        return
    config, sizes = run.config, run.sets.sizes
    held_out = f", {sizes['val']} held out" if sizes["val"] else ""
    say(
        f"{config.net} on {run.sets.label}: {sizes['train']} training images{held_out}, {sizes['test']} for the"
        f" test; {config.iterations} iterations of {_batch(run)}; {run.precision} on {run.device};"
        f" {'compiling; ' if run.compiled else ''}{run.directory}"
    )
    if line := describe_left_out(run.sets.left_out):
        say(f"note: {line}")
    if source is not None:
        classes, kept = len(run.sets.classes), source.same_classes(run.sets.classes)
        say(
            f"begins with the weights of {config.init_from} ({source.name})"
            + ("" if kept else f", but for fc, which is fresh, for {classes} classes in place of its {source.count}")
        )
        if source.assumed:
            say(f"assumed, for the file does not say: {'; '.join(source.assumed)}")
    if config.freeze is not None:
        say(f"frozen: all from the input to {config.freeze}")
    if state is not None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        after = f", restart {attempt} after the death of a process" if attempt != "0" else ""
        say(f"going on from iteration {run.iteration}{after}")
        before = state["measure"].get("bn_images", run.share.group)
        if before != run.share.group:
            least = min(before, run.share.group)
            say(
                f"note: batch norm's statistics were over {before} images and are now over {run.share.group}"
                + (f"; bn_images={least} from the start keeps them the same on any devices" if least > 1 else "")
            )
    sys.stdout.flush()


def _batch(run: Run) -> str:
    """The batch in words: how it is dealt."""
    part, details = run.share, []
    if world() > 1:
        details.append(f"{part.images * part.passes} in each of {world()} processes")
    if part.passes > 1:
        details.append(f"{part.images} at once")
    if part.group != part.images:
        details.append(f"batch norm over {part.group}")
    return str(run.config.batch_size) + (f" ({', '.join(details)})" if details else "")


def _reference(config: Config, label: str) -> tuple[str, float] | None:
    """The paper's test error of this net, for runs on CIFAR-10 proper."""
    if label == "cifar10" and config.net.endswith("-A") and config.depth in paper.CIFAR10_TEST_ERROR:
        return "He et al. 2015, table 6:", paper.CIFAR10_TEST_ERROR[config.depth]
    return None


def _summarise(run: Run, environment: dict[str, Any], reference: tuple[str, float] | None) -> None:
    """summary.json, which marks the run as finished, one line to read, and the picture."""
    config, directory = run.config, run.directory
    metrics = curves.read_metrics(directory / "metrics.jsonl")
    points = {(point["split"], point["iteration"]): point for point in metrics}

    def errors(iteration: int) -> dict[str, Any]:
        wanted = ("iteration", "loss", "error", "error5", "wrong", "seen", "protocol")
        found = {split: points.get((split, iteration)) for split in ("train", "val", "test")}
        return {s: {k: point[k] for k in wanted if k in point} for s, point in found.items() if point}

    last, best = errors(config.iterations), errors(run.best_at)
    summary = {
        "net": config.net,
        "data": run.sets.label,
        "images": run.sets.sizes,
        "recipe": config.recipe,
        "seed": config.seed,
        "iterations": config.iterations,
        "init_from": config.init_from,
        "freeze": config.freeze,
        "last": last,
        "best": {"chosen_by": "lowest validation error", **best} if run.sets.sizes["val"] and best else None,
        "paper": {"source": reference[0], "test_error": reference[1]} if reference else None,
        "parameters": parameters(run.model),
        "multiply_adds": multiply_adds(network(config, len(run.sets.classes)), config.data.size),
        "seconds": run.seconds,
        "peak_memory_bytes": peak_memory(run.device),
        "precision": run.precision,
        "compile": run.compiled,
        **environment,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    title = f"{config.net} on {run.sets.label}, seed {config.seed}"
    short = paper.shortened(run.sets.label, config.iterations)
    write_json(directory / "summary.json", summary)
    test, picture = last["test"], directory / "curves.png"
    heading = f"{short}\n{title}" if short else title
    drawn = curves.attempt(lambda: curves.draw({config.net: metrics}, heading, picture, reference), picture)
    say(
        f"{title}: test error {test['error']:.2f} % ({test['wrong']} of {test['seen']} wrong, {test['protocol']}) at"
        f" iteration {config.iterations}, the last{'; ' if short else ''}{short}"
    )
    say(f"{f'curves: {picture}; ' if drawn else ''}tensorboard --logdir {shlex.quote(str(directory))}")
