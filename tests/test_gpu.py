"""What only a GPU can show. A minute on one; `scripts/gpu.sh` runs it on a machine that has nothing else."""

import contextlib
import functools
import itertools
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import metrics, needs, start
from test_sets import photograph

from resnet_train.classification.evaluate import count_errors
from resnet_train.classification.run import build, compile_task
from resnet_train.classification.step import CapturedStep, step
from resnet_train.config.compose import compose
from resnet_train.config.localization import check_localize
from resnet_train.config.train import check_train
from resnet_train.data.views import BatchOrder
from resnet_train.detection import run as detection
from resnet_train.engine.compute import compute_logits, pick_device
from resnet_train.localization import run as localization
from resnet_train.models import imagenet_resnet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs("sklearn")
DIGITS = ["data=digits", "depth=8", "device=cuda", "schedule.lr=0.01"]


def opened(*words):
    """A run on the GPU, compiled where `words` say so."""
    run = build(check_train(compose("train", [*DIGITS, "compile=false", *words])))
    if "compile=true" in words:
        compile_task(run)
    return run


@contextlib.contextmanager
def waits_refused():
    """Within, an operation that waits for the GPU raises an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def take_step(run, *batch_and_lr):
    """A step as the loop takes it."""
    *batch, lr = batch_and_lr
    run.step(tuple(batch), lr)


def trained(run, take, batches, count, lr=0.01):
    """The loss of each of `count` steps."""
    losses = []
    for batch in itertools.islice(batches, count):
        run.metrics.reset()
        take(*batch, lr)
        losses.append(run.metrics.loss.item() / run.config.batch_size)
    return losses


def plainly(run, count):
    """The losses of steps that are launched kernel by kernel, or as one CPU runs them."""
    order = BatchOrder(0, run.config.batch_size, run.config.augment, run.iteration)
    batches = run.dataset.train_batches(run.mean, run.device, order)
    return trained(run, lambda *batch: step(run, *batch), batches, count)


@pytest.mark.parametrize(
    "words",
    [
        ["precision=bf16"],
        ["precision=bf16", "compile=true"],
        ["precision=fp32"],
        ["precision=fp64"],
        ["precision=fp16"],
        ["bn_images=16"],
        ["device_batch_size=16"],
        ["bn_images=32", "activation_checkpointing=true"],
        ["nesterov=true", "decay=weights"],
    ],
    ids=" ".join,
)
def test_nothing_waits_for_the_gpu_within_a_step(tmp_path, words):
    run = opened(*words)
    batches, take = run.batches(), functools.partial(take_step, run)
    alone = not {"precision=fp16", "device_batch_size=16", "activation_checkpointing=true"} & set(words)
    assert isinstance(run.captured, CapturedStep) == alone
    for batch in itertools.islice(batches, 6):
        take(*batch, 0.01)
    with waits_refused():
        for batch in itertools.islice(batches, 3):
            take(*batch, 0.01)
    assert run.iteration == 9
    assert run.metrics.state()["seen"] == 9 * 64
    assert all(group["lr"] == 0.01 for group in run.optimizer.param_groups)


@pytest.mark.parametrize("words", [[], ["bn_images=16"], ["arch=plain"], ["shortcut=C", "nesterov=true"]], ids=str)
def test_float64_losses_are_the_same_on_cpu_and_gpu_eager_compiled_and_captured(tmp_path, monkeypatch, words):
    """To the rate's rounding: the captured step reads it from a float32 tensor."""
    words = ["precision=fp64", *words]
    runs = {
        "cpu": opened(*words, "device=cpu"),
        "eager": opened(*words),
        "compiled": opened(*words, "compile=true"),
    }
    losses = {name: plainly(run, 12) for name, run in runs.items()}
    for compiled, whole in (("false", 56), ("true", 56), ("true", 0)):  # the last: block by block
        monkeypatch.setattr("resnet_train.models.compile.WHOLE_CAPTURED", whole)
        run = opened(*words, f"compile={compiled}")
        assert run.blocks == (not whole)
        batches, take = run.batches(), functools.partial(take_step, run)
        assert isinstance(run.captured, CapturedStep)
        losses[f"captured, compile={compiled}, nets to {whole} layers whole"] = trained(run, take, batches, 12)
        assert run.captured.graph is not None
    for name, found in losses.items():
        assert found == pytest.approx(losses["cpu"], rel=1e-6), name


def test_a_captured_step_takes_the_rate_of_its_iteration():
    losses = []
    for device in ("cpu", "cuda"):
        run = opened("precision=fp64", f"device={device}")
        batches, take = run.batches(), functools.partial(take_step, run)
        losses.append([loss for lr in (2**-6, 2**-4, 2**-9) for loss in trained(run, take, batches, 5, lr)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(("compiled", "whole"), [("false", 56), ("true", 56), ("true", 0)])
def test_an_evaluation_between_replays_disturbs_nothing(tmp_path, monkeypatch, compiled, whole):
    monkeypatch.setattr("resnet_train.models.compile.WHOLE_CAPTURED", whole)
    words = ["precision=bf16", f"compile={compiled}"]
    states, counts = [], []
    for tested in (False, True):
        run = opened(*words)
        batches, take = run.batches(), functools.partial(take_step, run)
        for _ in range(4):
            trained(run, take, batches, 5)
            if tested:
                views = run.dataset.eval_batches("test", run.mean, run.device, 120)
                counts.append(count_errors(run.model, views, run.precision, 360))
        states.append({name: value.clone() for name, value in run.model.state_dict().items()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=name)
    assert run.model.training
    assert counts[-1].seen == 360


def test_the_batch_norms_count_the_steps_once_each(tmp_path):
    run = opened("compile=true")
    batches, take = run.batches(), functools.partial(take_step, run)
    trained(run, take, batches, 7)
    counts = [value.item() for name, value in run.model.state_dict().items() if "num_batches" in name]
    assert counts == [7] * len(counts)


def test_no_two_logits_of_an_image_are_equal(tmp_path):
    run = opened("precision=bf16")
    batches, take = run.batches(), functools.partial(take_step, run)
    trained(run, take, batches, 100, lr=0.05)
    run.model.eval()
    with torch.no_grad():
        for images, _ in run.dataset.eval_batches("test", run.mean, run.device, 120):
            best, second = compute_logits(run.model, images, "bf16").topk(2).values.T
            assert (best > second).all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_killed_stopped_and_resumed_runs_end(tmp_path, precision):
    """By SIGKILL after a checkpoint, then by SIGTERM; the metrics are seamless."""
    words = ["data=digits", "depth=8", "iterations=2000", "checkpoint_every=50", "log_every=50", "eval_every=500"]
    words += [f"precision={precision}", "compile=false", "device=cuda", "run_dir=run"]
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    for ending, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = subprocess.Popen(start(*words), cwd=tmp_path, stdout=subprocess.DEVNULL)
        while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == before):
            time.sleep(0.02)
        process.send_signal(ending)
        assert process.wait(timeout=60) == code
    done = subprocess.run(start(*words), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    points = [line["iteration"] for line in metrics(tmp_path / "run") if line["split"] == "train"]
    assert points == list(range(50, 2001, 50))


def script(tmp_path, text, processes=0):
    """Run Python text in a process of its own, or in several by torchrun."""
    (tmp_path / "job.py").write_text(text)
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *launcher, str(tmp_path / "job.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_both_backends_and_the_first_pass_of_ddp_in_one_process(tmp_path):
    told = script(
        tmp_path,
        """
import os
import torch
import torch.distributed as dist
from resnet_train.engine.compute import compute_logits, wrap_ddp
from resnet_train.models import cifar_resnet
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29511")
torch.cuda.set_device(0)
dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", 0))
for device in ("cpu", "cuda"):
    values = torch.ones(3, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    assert values.sum() == 3
found = [None]
dist.all_gather_object(found, {"a": 1})
model = cifar_resnet(8).cuda().to(memory_format=torch.channels_last)
images = torch.randn(64, 3, 32, 32, device="cuda")
net = wrap_ddp(model, lambda net: compute_logits(net, images, "bf16").sum())
net(images).sum().backward()
torch.nn.SyncBatchNorm.convert_sync_batchnorm(cifar_resnet(8)).cuda()(images)
print(found, all(p.grad is not None for p in model.parameters()))
dist.destroy_process_group()
""",
    )
    assert told.strip().endswith("[{'a': 1}] True")


TWO_ON_ONE = """
import sys
import torch
from resnet_train import cli
from resnet_train.engine import compute
compute.local_rank = lambda: 0
start = torch.distributed.init_process_group
def over_gloo(backend, **options):
    options.pop("device_id", None)
    return start("gloo", **options)
torch.distributed.init_process_group = over_gloo
sys.argv = ["resnet-train", *WORDS]
cli.train()
"""


def test_two_processes_on_one_gpu_train_as_one_does(tmp_path):
    """CUDA tensors through gloo, since NCCL wants a GPU for each; batch norm over the same groups in both."""
    words = ["data=digits", "depth=8", "iterations=10", "batch_size=64", "bn_images=32", "compile=false", "log_every=1"]
    words += ["precision=fp64", "device=cuda", "schedule.lr=0.01"]
    script(tmp_path, TWO_ON_ONE.replace("WORDS", repr([*words, "run_dir=two"])), processes=2)
    done = subprocess.run(start(*words, "run_dir=one"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = {
        name: [line["loss"] for line in metrics(tmp_path / name) if line["split"] == "train"] for name in ("one", "two")
    }
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_two_gpus_train_as_one_does(compiled, tmp_path):
    """Over NCCL, by the command that a user types."""
    words = ["data=digits", "depth=8", "iterations=10", "batch_size=64", "bn_images=32", "log_every=1", "device=cuda"]
    words += ["precision=fp64", "schedule.lr=0.01", f"compile={compiled}"]
    losses = []
    for devices in (1, 2):
        done = subprocess.run(
            start(*words, f"devices={devices}", f"run_dir={devices}"), cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        losses.append([line["loss"] for line in metrics(tmp_path / str(devices)) if line["split"] == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are several GPUs")
def test_more_devices_than_gpus_are_refused_in_one_line(tmp_path):
    words = ["data=digits", "devices=2", "device=cuda", "iterations=3", "run_dir=run"]
    done = subprocess.run(start(*words), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "devices=2: torch sees 1 here" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_out_of_memory_is_one_line(tmp_path):
    words = ["data=digits", "depth=110", "device=cuda", "compile=false", "precision=fp64", "iterations=1"]
    words += ["batch_size=1400", "data.size=64", "run_dir=run"]
    text = f"""
import sys
import torch
from resnet_train import cli
torch.cuda.set_per_process_memory_fraction(0.02)
sys.argv = ["resnet-train", *{words!r}]
cli.train()
"""
    (tmp_path / "job.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "job.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory; ")
    assert done.stderr.count("\n") == 1


def photographs(folder):
    """Words that name a net for a dozen photographs, which are written."""
    for part, name, index in itertools.product(("train", "val"), ("cat", "dog"), range(6)):
        photograph(folder / "photos" / part / name / f"{index}.jpg", (80, 100), seed=index)
    words = ["data=imagenet", f"data.root={folder}/photos", "depth=18", "data.size=32", "augment.shorter_side=[36,48]"]
    return [*words, "batch_size=8", "data.workers=2", "compile=false", "device=cuda"]


def test_photographs_end_to_end(tmp_path):
    words = [*photographs(tmp_path), "iterations=6", "log_every=2", "eval_every=3", "run_dir=run"]
    done = subprocess.run(start(*words), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tested = [line for line in metrics(tmp_path / "run") if line["split"] == "test"]
    assert [(line["iteration"], line["seen"]) for line in tested] == [(3, 12), (6, 12)]


@pytest.mark.parametrize("words", [[], ["augment.colour_jitter=0.4"], ["device_batch_size=4"]], ids=str)
def test_steps_on_photographs_wait_for_nothing_and_give_the_losses_of_the_cpu(tmp_path, words):
    """In float64, of images in float32, whose rounding a net of random weights magnifies from step to step."""
    words = [*photographs(tmp_path), "data.size=64", "augment.shorter_side=[72,96]", "precision=fp64", *words]
    losses = {}
    for device in ("cpu", "cuda"):
        run = build(check_train(compose("train", [*words, f"device={device}"])))
        batches, take = run.batches(), functools.partial(take_step, run)
        assert run.captured is None
        losses[device] = trained(run, take, batches, 3, lr=0.001)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-5)
    with waits_refused():
        for batch in itertools.islice(batches, 3):
            take(*batch, 0.001)
    assert run.iteration == 6


def localizer(folder, *words):
    """An RPN in training on digits, around a net with random weights."""
    from digits_boxes import make_digits

    if not (folder / "digits").exists():
        make_digits(folder / "digits", train=24, test=3, classes=3, side=(48, 64), digit=(16, 30))
        torch.manual_seed(0)
        torch.save(imagenet_resnet(18, init="fan_out").state_dict(), folder / "r18.pth")
    words = [f"data.root={folder}/digits", f"init_from={folder}/r18.pth", "data.workers=0", *words]
    words += ["recipe=short", "crop=64", "anchors=[16,32]", "iterations=9", "batch_size=8"]
    config = check_localize(compose("localize", words))
    return localization.build(config, localization.open_data(config), pick_device(config.device))


def detector_of_masks(folder, *words):
    """A detector in training on shapes with masks, from random weights."""
    from test_detection_masks import configured, make_tree

    if not (folder / "shapes").exists():
        make_tree(folder / "shapes")
    config = configured(folder / "shapes", "iterations=9", "regions=1000", *words)  # all: a GPU draws others
    return detection.build(config, detection.read_examples(config), pick_device(config.device))


def losses_of(task, batches):
    """The losses of a step with each of `batches`."""
    found = []
    for batch in batches:
        task.losses.zero_()
        task.step(batch, 0.001)
        found.append(task.losses.sum(0).tolist())
    return found


@pytest.mark.parametrize(("make", "steps", "near"), [(localizer, 4, 1e-3), (detector_of_masks, 1, 2e-2)])
def test_losses_of_boxes_and_masks_are_those_of_the_cpu(tmp_path, make, steps, near):
    """Of the detector those of its first step: what its rounding moves is sampled otherwise later."""
    pytest.importorskip("faster_coco_eval")
    cpu, gpu = (make(tmp_path, "precision=fp32", f"device={device}") for device in ("cpu", "cuda"))
    wanted, found = (losses_of(task, itertools.islice(task.batches(), steps)) for task in (cpu, gpu))
    for one, other in zip(wanted, found, strict=True):
        assert other == pytest.approx(one, rel=near)
    half = make(tmp_path, "precision=bf16", "device=cuda")
    assert all(math.isfinite(loss) for row in losses_of(half, half.batches()) for loss in row)


def test_nothing_waits_for_the_gpu_within_a_step_of_a_localizer(tmp_path):
    """A detector's waits: torchvision asks how many boxes are left."""
    task = localizer(tmp_path, "precision=bf16", "device=cuda")
    batches = list(task.batches())
    for batch in batches[:6]:
        task.step(batch, 0.001)
    with waits_refused():
        for batch in batches[6:]:
            task.step(batch, 0.001)
    assert task.iteration == 9
    assert task.losses.isfinite().all()


def test_a_detector_with_frozen_norms_trains(tmp_path):
    pytest.importorskip("faster_coco_eval")
    from test_detection import WORDS, make_tree

    make_tree(tmp_path / "tree")
    torch.save(imagenet_resnet(18).state_dict(), tmp_path / "r18.pth")
    words = [word for word in WORDS if not word.startswith(("device=", "precision="))]
    done = subprocess.run(
        # random weights under fixed norms: at the recipe's rate the loss is not finite after six iterations, everywhere
        start(*words, "device=cuda", "init_from=r18.pth", "freeze=layer1", "lr=0.0001", "run_dir=run", entry="detect"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["split"] == "train"]
    assert all(loss > 0 for loss in losses)
