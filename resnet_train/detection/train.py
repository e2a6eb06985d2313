"""The command `resnet-detect`: one run from its directory's first file to its last, the step and the loop in view."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_train import checkpoint, curves, schedule, state_dicts
from resnet_train.batchnorm import update_statistics
from resnet_train.build import DTYPES, autocast, parallel, pick_device, pick_precision, placed
from resnet_train.config.runs import check_same_data, check_same_run, run_state
from resnet_train.config.training import check_dealt
from resnet_train.data.sampler import generator
from resnet_train.data.transforms import IMAGENET_STD
from resnet_train.detection.batches import training_batches
from resnet_train.detection.config import DetectConfig
from resnet_train.detection.data import Examples, load, read_coco, read_voc
from resnet_train.detection.evaluate import check_shape, evaluate
from resnet_train.detection.models import Detector, Frame, resnet_detector, vgg_detector
from resnet_train.detection.pictures import drawn
from resnet_train.distributed import from_main, joined, main, rank, together, total, world
from resnet_train.errors import UserError, of_a_peer
from resnet_train.files import claimed, read_object, write_json
from resnet_train.models import imagenet_resnet
from resnet_train.models.resnet import parameters
from resnet_train.record import Record
from resnet_train.run import before_restart, begin_directory, check_space, environment_of, peak_memory
from resnet_train.terminal import say
from resnet_train.train import INDIFFERENT, Clock, Stop, check_finite, take_rows
from resnet_train.weights import read_source

LOSSES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")  # torchvision's names
PICTURES = 4  # test images that TensorBoard shows with what was found in them
PROTOCOL = "every test image once, whole"


@dataclass(frozen=True)
class Backbone:
    """What a detector is built around, as its checkpoint keeps it."""

    shortcut: str
    bottleneck_stride: str
    mean: list[float]  # of images in 0 to 1, subtracted from them
    std: list[float]  # and what is left divided by
    pretrained: str | None  # the net in words; None: random weights


@dataclass
class Run:
    """One run: what it was given, and what training changes and a checkpoint holds."""

    config: DetectConfig
    directory: Path
    device: torch.device
    precision: str
    examples: Examples
    backbone: Backbone
    model: Detector
    net: nn.Module  # the model, or around it what exchanges gradients between processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: Tensor  # of the losses since the last logged point, a row for each process; on the device, read seldom
    iteration: int = 0
    saved_at: int = -1
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        """A checkpoint's content: tensors and plain values only. All processes call this."""
        return {
            "detector": dataclasses.asdict(self.backbone),
            "config": self.config.plain() | INDIFFERENT,
            "classes": self.examples.classes,
            "category_ids": self.examples.category_ids,
            "digest": self.examples.digest,
            "measure": {"precision": self.precision},
            "mean": torch.tensor(self.backbone.mean),
            "iteration": self.iteration,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": total(self.sums.clone()).cpu(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        take_rows(self.sums, state["sums"])
        self.iteration = self.saved_at = state["iteration"]


def step(run: Run, images: list[Tensor], targets: list[dict[str, Tensor]], lr: float) -> None:
    """One iteration on this process's share of a batch; images are (3, H, W) uint8."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    # torchvision samples anchors and regions, and VGG drops units, from torch's own random state.
    torch.manual_seed(generator(run.config.seed, f"regions of {rank()}", run.iteration).initial_seed())
    with autocast(run.device, run.precision):
        losses = run.net([image.float() / 255 for image in images], targets)
    parts = torch.stack([losses[name].float() for name in LOSSES])
    run.scaler.scale(parts.sum()).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    update_statistics(run.model, 1)
    run.sums[rank()] += parts.detach()
    run.iteration += 1


def learning_rate(iteration: int, config: DetectConfig) -> float:
    """The rate of the step after `iteration` steps: rising to `lr` in the warm-up, a tenth at each of `drops`."""
    dropped = schedule.learning_rate(
        iteration,
        config.iterations,
        schedule.Progress(warm=False),
        name="step",
        lr=config.lr,
        warmup_lr=config.lr,
        factor=0.1,
        drops=config.drops,
    )
    return dropped * min(1.0, (iteration + 1) / max(1, config.warmup))


def loop(run: Run, record: Record, stop: Stop) -> None:
    """All iterations that are left, or those until a signal; leaves a checkpoint of the last one in either case."""
    config, clock = run.config, Clock(run.iteration)
    batches = training_batches(
        run.examples.train,
        seed=config.seed,
        batch_size=config.batch_size,
        iterations=range(run.iteration, config.iterations),
        workers=config.data.workers,
        device=run.device,
        rank=rank(),
        world=world(),
    )
    while run.iteration < config.iterations and not stop.agreed():
        images, targets = clock.next_of(batches)
        lr = learning_rate(run.iteration, config)
        step(run, images, targets, lr)
        record.bar.update()

        last = run.iteration == config.iterations
        if last or run.iteration % config.log_every == 0:
            _log_training(run, record, clock, lr)
        if last or run.iteration % config.eval_every == 0:
            _log_test(run, record, clock)
        if last or run.iteration % config.checkpoint_every == 0:
            _save(run, record, clock)
    if run.saved_at != run.iteration:
        _save(run, record, clock)


def _log_training(run: Run, record: Record, clock: Clock, lr: float) -> None:
    """A point of the training curve: the losses since the last one."""
    _require_finite(run)
    clock.lap(run, training=True)
    steps = (run.iteration - 1) % run.config.log_every + 1
    means = (total(run.sums.clone()).sum(0) / (world() * steps)).tolist()
    record.point(
        "train",
        run.iteration,
        epoch=run.iteration * run.config.batch_size / len(run.examples.train),
        loss=sum(means),
        **dict(zip(LOSSES, means, strict=True)),
        lr=lr,
        images_per_second=(run.iteration - clock.since) * run.config.batch_size / clock.training,
        waited=clock.waited / clock.training,
        seconds=run.seconds,
    )
    clock.training, clock.waited, clock.since = 0.0, 0.0, run.iteration
    run.sums.zero_()


def _of_the_first(run: Run) -> None:
    """Where batch norm is trained, each process has averages of its own images: take the first's."""
    if world() > 1 and run.backbone.pretrained is None:
        for buffer in run.model.buffers():
            dist.broadcast(buffer, 0)


def _log_test(run: Run, record: Record, clock: Clock) -> None:
    """A point of the test curve, and pictures of the first test images."""
    clock.lap(run, training=True)
    _of_the_first(run)
    examples = run.examples
    measured, found = evaluate(
        run.model,
        examples.test,
        classes=examples.classes,
        category_ids=examples.category_ids,
        precision=run.precision,
        device=run.device,
        workers=run.config.data.workers,
    )
    figures = {name: value for name, value in measured.items() if isinstance(value, (int, float))}
    record.point("test", run.iteration, **figures, images=len(examples.test), protocol=PROTOCOL)
    if main():
        for number, (example, boxes) in enumerate(zip(examples.test[:: world()], found, strict=False)):
            if number < PICTURES:
                record.picture(run.iteration, example.name, drawn(load(example), boxes, examples.classes, 0.5))
    if run.iteration == run.config.iterations:
        keys = ("backbone", "depth", "pyramid", "seed", "iterations", "batch_size", "lr", "min_size")
        values = {key: getattr(run.config, key) for key in keys}
        values |= {"data": run.config.data_label, "pretrained": run.backbone.pretrained or "no"}
        record.hyper_parameters(run.iteration, values, figures)
        from_main(lambda: write_json(run.directory / "test.json", {"iteration": run.iteration, **measured}))
    clock.lap(run, training=False)


def _save(run: Run, record: Record, clock: Clock) -> None:
    """Write last.pt; the one before becomes previous.pt."""
    clock.lap(run, training=True)
    _of_the_first(run)
    _require_finite(run)
    state, folder = run.state(), run.directory / "checkpoints"

    def write() -> None:
        record.flush()
        checkpoint.save(folder / "last.pt", state, keep_as=folder / "previous.pt")

    from_main(write)
    run.saved_at = run.iteration
    clock.lap(run, training=False)


def _require_finite(run: Run) -> None:
    check_finite(run.sums, run.model, run.iteration, run.directory, "lr=", run.precision)


def detect(config: DetectConfig, directory: Path) -> int:
    """Train a detector in `directory`, going on where a run there was cut, and test it. The exit code.

    0: finished; 128 and a signal's number: stopped by it, with a checkpoint. Raises UserError and RunError.
    """
    device = pick_device(config.device)
    with joined(device, config.timeout), contextlib.ExitStack() as held:
        restarts = int(total(torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))))
        before = from_main(lambda: before_restart(directory, restarts))
        if before == "finished":
            return 0
        resume = config.resume if before == "new" else "auto"
        config = dataclasses.replace(config, devices=world(), resume=resume)
        together(lambda: check_dealt(config.batch_size, world()))
        precision = together(lambda: pick_precision(config.precision, device))
        examples = together(lambda: read_examples(config))
        state = from_main(lambda: _begin(config, directory, examples, held))
        try:
            run = together(lambda: build(config, directory, examples, device, precision, state))
        except UserError:
            with contextlib.suppress(OSError):  # nothing is in it, if it was made for this run
                directory.rmdir()
            raise
        environment = from_main(lambda: _open(run, new=state is None))
        _announce(run, state)
        stop = Stop()
        names = {"data": config.data_label, "seed": config.seed}
        record = Record(directory if main() else None, names, run.iteration, config.iterations)
        run.seconds = record.seconds
        try:
            with contextlib.closing(record):
                loop(run, record, stop)
                if run.iteration == config.iterations and from_main(lambda: _lacks_test(run, record)):
                    _log_test(run, record, Clock(run.iteration))  # it was trained and tested, and the record was lost
            if run.iteration == config.iterations:
                from_main(lambda: _summarise(run, environment))
                return 0
        except RuntimeError as error:
            if world() > 1 and stop.signal and of_a_peer(error):
                sys.exit(1)  # another has died, and the launcher, which names it, ends this one
            raise
        if main():
            how = "the same command" if resume == "auto" else "the same command with resume=auto"
            say(f"stopped at iteration {run.iteration}, checkpoint written; {how} goes on from there")
        return 128 + stop.signal


def read_examples(config: DetectConfig) -> Examples:
    """The pictures and boxes that the configuration names. Raises UserError."""
    data = config.data
    assert data.root is not None  # check_detect has seen to it
    root = Path(data.root)
    if data.name == "coco":
        found = read_coco(root, train=data.train, test=data.test, broken=data.broken)
    else:
        found = read_voc(root, train=data.train, test=data.test, classes=data.classes, broken=data.broken)
    for example in (*found.train, *found.test):
        check_shape(str(example.path), (example.height, example.width), config.min_size, config.max_size)
    return found


def build(
    config: DetectConfig,
    directory: Path,
    examples: Examples,
    device: torch.device,
    precision: str,
    state: dict[str, Any] | None = None,
) -> Run:
    """The detector and its optimiser, from a checkpoint's `state`, if given, else as they begin. Raises UserError."""
    torch.manual_seed(generator(config.seed, "initialisation", 0).initial_seed())
    if state is not None:
        model, backbone = restored_detector(config, state)
        with checkpoint.fitting(f"the checkpoint to go on from in {directory}"):
            precision = precision_of(state)
    else:
        model, backbone = new_detector(config, len(examples.classes))
    model = placed(model, device, precision)
    net = _exchanging(model, precision) if world() > 1 else model
    run = Run(
        config=config,
        directory=directory,
        device=device,
        precision=precision,
        examples=examples,
        backbone=backbone,
        model=model,
        net=net,
        optimizer=torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad],
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=precision != "fp16",
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        sums=torch.zeros(world(), len(LOSSES), dtype=torch.float64, device=device),
    )
    if state is not None:
        with checkpoint.fitting(f"the checkpoint to go on from in {directory}"):
            run.load(state)
    return run


def _exchanging(model: Detector, precision: str) -> nn.Module:
    """`build.parallel` for a detector."""
    device = next(model.parameters()).device
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.ones(1, dtype=torch.int64)}

    def first(net: nn.Module) -> Tensor:
        with autocast(device, precision):
            losses = net(
                [torch.zeros(3, 64, 64, device=device)], [{key: value.to(device) for key, value in target.items()}]
            )
        return torch.stack([losses[name].float() for name in LOSSES]).sum()

    return parallel(model, first)


def new_detector(config: DetectConfig, classes: int) -> tuple[Detector, Backbone]:
    """The detector as training begins: around the weights of `init_from`, else around random ones. Raises UserError.

    With weights, batch norm stays as they have it (appendix A); random ones could not do without it.
    """
    plain = Backbone("B", "1x1", list(state_dicts.MEAN), list(IMAGENET_STD), None)
    if config.init_from is None:
        return _assembled(config, plain, classes)
    path = Path(config.init_from)
    if config.backbone == "vgg16":
        backbone = dataclasses.replace(plain, pretrained=f"VGG-16 of {path.name}")
        model, _ = _assembled(config, backbone, classes)
        _load_vgg(model, path)
        return model, backbone
    source = read_source(path)
    if source.family != "imagenet" or source.depth != config.depth:
        raise UserError(
            f"init_from={path}: holds {source.name}; "
            + (f"take depth={source.depth}" if source.family == "imagenet" else "detection takes an ImageNet net")
        )
    if source.arch != "resnet":
        advice = (
            "detection takes a residual net"
            if source.arch
            else "which may be a plain one; resnet-weights import FILE arch=resnet out=… says that it is not"
        )
        raise UserError(f"init_from={path}: holds {source.name}, {advice}")
    backbone = Backbone(
        shortcut=source.shortcut,
        bottleneck_stride=source.bottleneck_stride,
        mean=(source.mean.mean((0, 1)) / 255).tolist(),
        std=list(source.std),
        pretrained=f"{source.name} of {path.name}",
    )
    model, _ = _assembled(config, backbone, classes)
    _load_resnet(model, source.model, path)
    return model, backbone


def precision_of(state: dict[str, Any]) -> str:
    """The precision that a checkpoint was trained in. Raises KeyError and ValueError for none that there is."""
    precision = str(state["measure"]["precision"])
    if precision not in DTYPES:
        raise ValueError(f"precision {precision}")
    return precision


def restored_detector(config: DetectConfig, state: dict[str, Any]) -> tuple[Detector, Backbone]:
    """The detector that a checkpoint's `state` holds, its weights not yet in it. Raises UserError."""
    with checkpoint.fitting("the checkpoint"):
        backbone, classes = Backbone(**state["detector"]), len(state["classes"])
        checkpoint.check_net(state["model"], lambda: _assembled(config, backbone, classes)[0], config.depth)
        return _assembled(config, backbone, classes)


def _assembled(config: DetectConfig, backbone: Backbone, classes: int) -> tuple[Detector, Backbone]:
    frame = Frame(
        anchors=config.anchors,
        proposals=config.proposals,
        regions=config.regions,
        min_size=config.min_size,
        max_size=config.max_size,
        mean=backbone.mean,
        std=backbone.std,
    )
    if config.backbone == "vgg16":
        model = vgg_detector(classes, frame)
    else:
        net = imagenet_resnet(config.depth, backbone.shortcut, bottleneck_stride=backbone.bottleneck_stride)
        model = resnet_detector(net, classes, frame, pyramid=config.pyramid)
    model.freeze(config.freeze, norm=backbone.pretrained is not None)
    return model, backbone


def _load_resnet(model: Detector, weights: dict[str, Tensor], path: Path) -> None:
    """Put the weights of a net, but for its classifier, where the detector has them."""
    with checkpoint.fitting(f"init_from={path}"):
        places = [model.backbone, *([] if hasattr(model.backbone, "layer4") else [model.roi_heads.box_head])]
        for place in places:
            own = {name for name in place.state_dict() if not name.startswith("fpn.")}
            place.load_state_dict({name: weights[name] for name in own}, strict=not hasattr(place, "fpn"))


def _load_vgg(model: Detector, path: Path) -> None:
    """Put torchvision's VGG-16, but for its last layer, where the detector has it. Raises UserError."""
    weights = state_dicts.tensors(state_dicts.read(path), path)
    if "features.0.weight" not in weights or "features.1.running_mean" in weights:
        raise UserError(f"init_from={path}: is not torchvision's vgg16 (features.0.weight, …, classifier.6.bias)")
    with checkpoint.fitting(f"init_from={path}"):
        for place in (model.backbone, model.roi_heads.box_head):
            place.load_state_dict({name: weights[name] for name in place.state_dict()})


def _begin(
    config: DetectConfig, directory: Path, examples: Examples, held: contextlib.ExitStack
) -> dict[str, Any] | None:
    """Take the run's directory, until `held` closes; the checkpoint to go on from, if any. Raises UserError."""
    # Workers of a killed run hold on to it for some seconds.
    held.enter_context(claimed(directory, "run_dir", "training", patience=20))
    if run_state(directory) == "finished":
        raise UserError(f"run_dir={directory}: another process has finished the run there")
    if config.resume == "never":
        return None
    found = checkpoint.load_newest(directory / "checkpoints", detector=True)
    if found is None:
        return None
    path, state = found
    check_same_run(state["config"], config.plain(), str(path))
    check_same_data(state["config"]["data"], state["digest"], config.plain()["data"], examples.digest, str(path))
    return state


def _lacks_test(run: Run, record: Record) -> bool:
    """Whether what the last test gave is not all in the run's directory."""
    try:
        measured = read_object(run.directory / "test.json")
    except UserError:
        return True
    return measured.get("iteration") != run.iteration or record.lacks(run.iteration, "test")


def _open(run: Run, *, new: bool) -> dict[str, Any]:
    """Write what a run begins with: config.json and, given back, environment.json. Raises UserError.

    A new start removes what a run before left.
    """
    directory = run.directory
    check_space(directory, run.model)
    environment = environment_of("resnet-detect", run.device, run.examples.digest)
    try:
        begin_directory(directory, run.config.plain(), new=new)
        write_json(directory / "environment.json", environment)
    except OSError as error:
        raise UserError(f"run_dir={directory}: cannot be written: {error.strerror}") from error
    return environment


def _announce(run: Run, state: dict[str, Any] | None) -> None:
    if not main():
        return
    config, examples = run.config, run.examples
    say(
        f"{config.net} on {config.data_label}: {len(examples.train)} training images, {len(examples.test)} for the"
        f" test, {len(examples.classes)} classes; {config.iterations} iterations of {config.batch_size};"
        f" {run.precision} on {run.device}; {run.directory}"
    )
    if run.backbone.pretrained:
        frozen = f"; frozen up to {config.freeze}" if config.freeze else ""
        norm = "" if config.backbone == "vgg16" else "; batch norm stays as it has it"
        say(f"begins with {run.backbone.pretrained}{norm}{frozen}")
    else:
        print("begins with random weights, which the paper does not: the figures say nothing about its tables 7 and 8")
    for fault, count in examples.faults.items():
        say(f"warning: {count} {fault}")
    if state is not None:
        say(f"going on from iteration {run.iteration}")
        before = state["config"].get("devices")
        if before != world():
            say(f"note: begun on {before} devices; on {world()} other regions are sampled than there would have been")
    sys.stdout.flush()


def _summarise(run: Run, environment: dict[str, Any]) -> None:
    """summary.json, which marks the run as finished, one line to read, and the picture."""
    config, directory, examples = run.config, run.directory, run.examples
    measured = read_object(directory / "test.json")
    title = f"{config.net} on {config.data_label}, seed {config.seed}"
    metrics, picture = curves.read_metrics(directory / "metrics.jsonl"), directory / "curves.png"
    summary = {
        "task": "detection",
        "net": config.net,
        "data": config.data_label,
        "lists": {"train": config.data.train, "test": config.data.test},
        "images": {"train": len(examples.train), "test": len(examples.test)},
        "boxes": {
            part: int(sum(len(example.boxes) for example in getattr(examples, part))) for part in ("train", "test")
        },
        "faults": examples.faults,
        "recipe": config.recipe,
        "seed": config.seed,
        "iterations": config.iterations,
        "init_from": config.init_from,
        "backbone": dataclasses.asdict(run.backbone),
        "last": measured | {"protocol": PROTOCOL},
        "parameters": parameters(run.model),
        "seconds": run.seconds,
        "peak_memory_bytes": peak_memory(run.device),
        "precision": run.precision,
        **environment,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    write_json(directory / "summary.json", summary)
    drawn = curves.attempt(lambda: curves.draw_detection(metrics, title, picture), picture)
    say(
        f"{title}: {measured['map07']:.2f} % mAP by VOC 2007's rule, {measured['map10']:.2f} by VOC 2010's,"
        f" {measured['map']:.2f} by COCO's @[.5,.95], on {len(examples.test)} images at iteration {config.iterations},"
        " the last"
    )
    say(f"{f'curves: {picture}; ' if drawn else ''}tensorboard --logdir {shlex.quote(str(directory))}")
