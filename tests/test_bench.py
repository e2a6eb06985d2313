"""The benchmark: its figures hang together, its references are what they are called, a wrong command is one line."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import forked
import pytest
import torch
import yaml
from PIL import Image

from resnet_train import cli
from resnet_train.bench import baseline, loader, subject, suite, timing
from resnet_train.config.commands import FIXED_BY_BENCH, BenchConfig, check_bench
from resnet_train.config.compose import compose, known_keys
from resnet_train.config.options import groups
from resnet_train.config.schema import flat
from resnet_train.config.words import requested_keys
from resnet_train.data.image_set import ImageSet
from resnet_train.data.pack import pack
from resnet_train.errors import RunError, UserError
from resnet_train.models.build import build_network

NAMES = ["step", "loop", "loader", "eval", "startup", "memory"]
TINY = ["depth=8", "data=imagefolder", "data.size=8", "batch_size=12", "log_every=3", "compile=false", "device=cpu"]
TINY += ["rounds=2", "seconds=0.02", "steps=7", "precision=bf16"]
LESS = {"eval": ["data=digits"], "startup": ["rounds=1"]}  # fewer images, fewer processes
# The rows of each, and its values beside those that all have. Memory first: to the system a new process has been as
# large as the one that starts it.
PROMISED = {
    "memory": (
        [
            *(f"{way}, {when}" for way in ("checkpointing", "plain") for when in ("peak", "step 3", "step 7")),
            "checkpointing, step",
            "plain, step",
        ],
        {"ratio_to_plain", "peak_bytes", "growth_bytes", "step_time_ratio"},
    ),
    "step": (["bf16 eager", "fp32 eager", "classic"], {"ratio_to_classic", "first_step_seconds"}),
    "loop": (["loop", "bare", "classic"], {"ratio_to_classic", "ratio_to_bare", "shares"}),
    "loader": (
        ["ours, one thread", "classic, one thread", "ours, all threads", "bare"],
        {"ratio_to_classic", "share_of_step"},
    ),
    "eval": (["ours", "classic"], {"ratio_to_classic", "images"}),
    "startup": (
        [
            "resnet-train --help",
            "resnet-train --cfg job",
            "resnet-train depth=21",
            "python -c pass",
            "python -c 'import torch'",
            "first step, eager",
        ],
        {"ratio_to_python", "ratio_to_import_torch"},
    ),
}
# One process measures all, one after another: importing torch takes longer than the work.
DRIVER = """
import sys
from resnet_train import cli
if __name__ == "__main__":
    for line in sys.stdin.read().splitlines():
        sys.argv = ["resnet-bench", *line.split()]
        try:
            cli.bench()
        except SystemExit as ended:
            assert ended.code == 0, line
"""
ALWAYS = {"bench", "title", "rows", "machine", "versions", "git_commit", "measured", "settings"}
CPU = torch.device("cpu")


def checked(*overrides):
    """The two checked configurations of a command line."""
    return check_bench(compose("bench", list(overrides)), requested_keys(list(overrides)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The output and the JSON of each sub-benchmark by its name; they leave nothing else."""
    pytest.importorskip("sklearn")
    folder, temporary = tmp_path_factory.mktemp("bench"), tmp_path_factory.mktemp("temporary")
    lines = [" ".join([name, *TINY, *LESS.get(name, []), f"out=new/{name}.json"]) for name in PROMISED]
    done = forked.run(
        [sys.executable, "-c", DRIVER],
        cwd=folder,
        input="\n".join(lines),
        env=os.environ | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.rglob("*")) == sorted(["new", *(f"{name}.json" for name in PROMISED)])
    assert not list(temporary.rglob("resnet-bench-*"))
    texts = re.split("^(?=resnet-bench )", done.stdout, flags=re.MULTILINE)[1:]
    return {
        name: (text, json.loads((folder / "new" / f"{name}.json").read_text()))
        for name, text in zip(PROMISED, texts, strict=True)
    }


# --- Each sub-benchmark ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_json_holds_what_is_promised(measured, name):
    rows, keys = PROMISED[name]
    _, found = measured[name]
    assert found.keys() == ALWAYS | keys
    assert [row["name"] for row in found["rows"]] == rows
    assert found["bench"] == name
    assert found["machine"].keys() >= {"processor", "cores", "threads", "memory_bytes", "device"}
    assert found["versions"]["torch"] == torch.__version__
    settings = found["settings"]
    assert (settings["seconds"], settings["random_images"]) == (0.02, name != "eval")
    assert (settings["config"]["depth"], settings["config"]["precision"]) == (8, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_figures_hang_together(measured, name):
    """A ratio is, round by round, the quotient of its rows; so that of their medians lies within its spread."""
    _, found = measured[name]
    rows = {row["name"]: row for row in found["rows"]}
    for row in rows.values():
        assert 0 < row["min"] <= row["median"] <= row["max"], row
        assert len(row["rounds"]) == (1 if row["unit"] == "MB" else found["settings"]["rounds"])
        for ratio in row["ratios"].values():
            assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"], row
    references = {
        "classic": "classic, one thread" if name == "loader" else "classic",
        "bare": "bare",
        "python": "python -c pass",
        "import_torch": "python -c 'import torch'",
        "eager": "first step, eager",
    }
    for row in rows.values():
        for key, ratio in row["ratios"].items():
            reference = rows[references[key] if name != "memory" else row["name"].replace("checkpointing", "plain")]
            quotients = [a / b for a, b in zip(row["rounds"], reference["rounds"], strict=True)]
            assert ratio["rounds"] == pytest.approx(quotients)
            assert ratio["min"] * 0.999 <= row["median"] / reference["median"] <= ratio["max"] * 1.001
    for key, ratio in found["rows"][0]["ratios"].items():
        assert found[f"ratio_to_{key}"] == ratio["median"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_table_says_of_what(measured, name):
    text, found = measured[name]
    title, heading, *lines = text.splitlines()
    assert title == found["title"]
    for part in (
        f"resnet-bench {name}: ",
        "resnet-8-A",
        "batch 12",
        "bf16 eager",
        "digits" if name == "eval" else "random images",
        "cpu",
        "threads",
    ):
        assert part in title
    assert f"torch {torch.__version__}" in title
    assert heading.split()[:3] == ["median", "min", "max"]
    for row, line in zip(found["rows"], lines, strict=False):
        assert line.startswith(row["name"] + "  ")
        assert row["unit"] in line


@pytest.mark.slow
def test_shares_of_the_loop_are_all_of_it(measured):
    shares = measured["loop"][1]["shares"]
    assert list(shares) == ["data", "step", "record"]
    assert all(share > 0 for share in shares.values())
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.slow
def test_memory_is_a_process_s_own(measured):
    """Its peak is above what it holds later, and holds at least the random images."""
    found = measured["memory"][1]
    early, late = (row["median"] * 1e6 for row in found["rows"] if row["name"].startswith("plain, step "))
    assert found["peak_bytes"]["plain"] >= max(early, late)
    assert found["peak_bytes"]["plain"] > 50_000 * 8 * 8 * 3
    assert found["growth_bytes"]["plain"] == pytest.approx(late - early, abs=1)


def test_a_step_of_an_imagenet_net_can_be_measured(tmp_path):
    words = "data=imagenet depth=18 data.size=32 augment.shorter_side=[32,32] batch_size=4 rounds=1 seconds=0.01"
    asked, training = checked("bench=step", *words.split(), "device=cpu", "compile=false", "precision=fp32")
    with timing.threads(1):
        found = suite.steps(asked, training, tmp_path, CPU)
    assert [row["name"] for row in found.rows] == ["fp32 eager", "bf16 eager", "classic"]


# --- Taking turns ----------------------------------------------------------------------------------------------------


def test_jobs_take_turns():
    turns = []
    jobs = {name: lambda name=name: turns.append(name) or float(len(turns)) for name in "ABC"}
    assert timing.run_interleaved(jobs, 3) == {"A": [1, 4, 7], "B": [2, 5, 8], "C": [3, 6, 9]}
    assert "".join(turns) == "ABCABCABC"


def test_what_is_measured_comes_after_one_that_is_not_and_is_whole_units():
    done = {"free": [], "bound": []}
    works = {
        "free": timing.Work(lambda count: done["free"].append(count), 2),
        "bound": timing.Work(lambda count: done["bound"].append(count), 2, least=7),
    }
    found = timing.measure_speeds(works, 1e-5, 3, CPU)
    for name, counts in done.items():
        assert counts[:2] == [1, 1]
        assert counts[2:] == [1, counts[3]] * 3
        assert counts[3] >= 1
        assert len(found[name]) == 3
    assert done["bound"][3] % 7 == 0


def test_a_row_is_divided_round_by_round():
    row = timing.row("ours", "s", [2.0, 9.0, 4.0], theirs=[1.0, 3.0, 4.0])
    assert (row["median"], row["min"], row["max"]) == (4, 2, 9)
    assert row["ratios"]["theirs"] == {"median": 2, "min": 1, "max": 3, "rounds": [2, 3, 1]}


def test_a_table_is_aligned():
    rows = [timing.row("a", "s", [1234.5]), timing.row("longer", "images/s", [0.5], a=[1234.5])]
    assert timing.table(rows) == [
        "        median    min    max                                        / a",
        "a        1,234  1,234  1,234  s",
        "longer     0.5    0.5    0.5  images/s  0.000405 (0.000405 to 0.000405)",
    ]


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_environment_is_given_back(monkeypatch):
    monkeypatch.delenv("RESNET_X", raising=False)
    for before in (None, "old"):
        if before:
            monkeypatch.setenv("RESNET_X", before)
        with timing.environment("RESNET_X", "new"):
            assert os.environ["RESNET_X"] == "new"
        assert os.environ.get("RESNET_X") == before


@pytest.mark.slow
def test_a_process_that_is_killed_is_told_of():
    """As the system kills one that takes too much memory."""
    code = (
        "import os, signal\nfrom resnet_train import errors\nfrom resnet_train.bench import timing\n"
        "if __name__ == '__main__':\n    try: timing.in_new_process(os.abort)\n"
        "    except errors.RunError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "the process that was measured was killed; is there enough memory?\n"
    assert issubclass(RunError, UserError)


def test_photographs_are_read_and_decoded_on_one_core(tmp_path, monkeypatch, capsys):
    """From files and packed, beside the classic recipe and decoding; each ratio is to the classic of the same round."""
    pytest.importorskip("litdata", reason="needs the extra `streaming`")
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "cache"))
    for part, name, number in itertools.product(("train", "val"), "ab", range(4)):
        (tmp_path / "tree" / part / name).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (70, 60 + number, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "tree" / part / name / f"{number}.JPEG")
    settings = {"shorter_side": 40, "quality": 90, "images": 3, "workers": 0, "broken": "stop"}
    pack(root=str(tmp_path / "tree"), out=tmp_path / "packed", **settings)
    words = [f"data.root={tmp_path / 'tree'}", f"packed={tmp_path / 'packed'}", f"out={tmp_path / 'found.json'}"]
    words += ["bench=loader", "data=imagenet", "depth=18", "data.size=32", "augment.shorter_side=[36,60]"]
    suite.bench(*checked(*words, "batch_size=4", "rounds=2", "seconds=0.02", "device=cpu"))
    found = json.loads((tmp_path / "found.json").read_text())
    names = ["ours, files", "ours, packed", "classic, files", "decoding alone, files", "decoding alone, packed"]
    assert [row["name"] for row in found["rows"]] == names
    classic_, alone = found["rows"][2]["rounds"], found["rows"][3]["rounds"]
    for row in found["rows"]:
        assert row["ratios"]["classic"]["rounds"] == [a / b for a, b in zip(row["rounds"], classic_, strict=True)]
        assert row["ratios"]["decoding"]["rounds"] == [a / b for a, b in zip(row["rounds"], alone, strict=True)]
    assert found["ratio_of_packed"] == found["rows"][1]["ratios"]["classic"]["median"]
    assert "images: 8 (files), 8 (packed)" in capsys.readouterr().out
    for wrong in (f"packed={tmp_path / 'tree'}", f"data.root={tmp_path / 'packed'}"):
        with pytest.raises(UserError, match=r"^packed="):
            checked(*words, wrong)


def test_batches_are_doubled_until_they_take_long_enough(monkeypatch):
    """Of a worker's CPU time, of which its start takes half a second here and each batch a hundredth."""
    used, counts = 0.0, []

    def batches(count):
        nonlocal used
        counts.append(count)
        used += 0.5 + 0.01 * count
        return []

    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_utime=used, ru_stime=0.0))
    measure = loader._per_core(batches, 8, seconds=0.25)
    assert counts == [1, 1, 2, 4, 8, 16, 32]
    assert measure() == pytest.approx(32 * 8 / 0.82)


# --- What is measured ------------------------------------------------------------------------------------------------


def test_random_images_stand_in_for_data_that_have_no_place():
    sets = subject.make_dataset(checked("bench=loop")[1])
    assert (sets.sizes, len(sets.classes)) == ({"train": 50_000, "val": 0, "test": 10_000}, 10)
    assert sets.parts["train"].images.shape == (50_000, 32, 32, 3)
    assert set(sets.parts["test"].labels.tolist()) == set(range(10))


def test_random_images_of_many_pixels_are_few():
    sets = subject.make_dataset(checked("bench=step", "data=imagenet", "depth=18")[1])
    assert (sets.sizes["train"], len(sets.classes)) == (1020, 1000)


def test_the_loop_runs_as_asked_logs_and_leaves_no_checkpoint(tmp_path):
    _, training = checked("bench=loop", *TINY)
    run = subject.build_task(training, subject.make_dataset(training))
    with subject.open_logger(run, tmp_path) as record:
        for count in (1, 6, 1):
            subject.train_steps(run, tmp_path, record, count)
    assert run.iteration == 8
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["iteration"]) for line in lines] == [("train", 3), ("train", 6)]
    assert not (tmp_path / "checkpoints").exists()


def test_bare_is_our_step_on_one_batch(tmp_path):
    _, training = checked("bench=loop", *TINY)
    run = subject.build_task(training, subject.make_dataset(training))
    work = subject.bare_step(run)
    work.do(3)
    assert work.images == 12
    assert (run.iteration, run.metrics.seen) == (3, 36)


def pictures(count):
    """A few random images."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.arange(count) % 10)


def test_the_classic_pictures_are_torchvision_s():
    data = pictures(3)
    image, label = baseline.TransformedImages(data, train=False)[2]
    mean, std = torch.tensor(baseline.NORMALISE.mean), torch.tensor(baseline.NORMALISE.std)
    expected = ((data.images[2] / 255 - mean) / std).permute(2, 0, 1)
    assert label == 2
    assert torch.allclose(image, expected, atol=1e-6)
    names = [type(step).__name__ for step in baseline.TransformedImages(data, train=True).transform.transforms]
    assert names == ["RandomCrop", "RandomHorizontalFlip", "ToTensor", "Normalize"]


def test_the_classic_trainer_trains_and_counts():
    data = pictures(20)
    _, training = checked("bench=loop", *TINY)
    trainer = baseline.Trainer(build_network(training, 10), CPU)
    before = [p.clone() for p in trainer.net.parameters()]
    images, labels = data.images.permute(0, 3, 1, 2).float() / 255, data.labels
    trainer.steps(iter([(images, labels)] * 3), 3)
    assert all(not torch.equal(p, old) for p, old in zip(trainer.net.parameters(), before, strict=True))
    assert trainer.right == int(trainer.right) <= 60
    trainer.right = 0
    trainer.evaluate([(images, labels)])
    assert trainer.net.training
    trainer.net.eval()
    assert trainer.right == (trainer.net(images).argmax(1) == labels).sum()


def test_the_classic_step_computes_as_pytorch_does_by_itself():
    """Also where our fp32 has switched TF32 off."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        with baseline.defaults():
            assert torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


# --- The command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", NAMES),
        ("depth=20", NAMES),
        ("lop", ["bench=lop", *NAMES, "did you mean loop?"]),
        ("loop depth=21", ["depth=21", "nearest: 20"]),
        ("loop dept=20", ["dept=20", "did you mean depth?"]),
        ("loop data=cifar11", ["data=cifar11", "did you mean cifar10?"]),
        ("loop step", ["'step'", "key=value"]),
        ("loop rounds=0", ["rounds=0", "at least 1"]),
        ("loop seconds=0", ["seconds=0", "above 0"]),
        ("loop rounds=x", ["rounds=x", "whole number"]),
        ("memory steps=1", ["steps=1", "at least 2"]),
        ("loop devices=2", ["devices=2", "one"]),
        ("loop run_dir=x", ["run_dir=x", "is not used by"]),
        ("loop resume=never", ["resume=never", "is not used by"]),
        ("loop iterations=100", ["iterations", "is not used by"]),
        ("loop eval_every=100", ["eval_every", "is not used by"]),
        ("loop data.validation=5000", ["data.validation", "is not used by"]),
        ("loop experiment=fig6", ["experiment=fig6: there is no key experiment"]),
        ("loop data.root=nosuch", ["data.root=nosuch", "no such file"]),
        ("loop packed=x", ["packed=x", "loader data=imagenet"]),
        ("loader packed=x", ["packed=x", "loader data=imagenet"]),
        ("loop out=/dev/null/x", ["out=/dev/null/x"]),
        ("loop out=.", ["out=."]),
        ("loop bench=step,loop -m", ["-m"]),
        ("loop hydra.mode=MULTIRUN", ["-m"]),
        ("loop --nosuch", ["--nosuch", "--help"]),
        *((f"{name} data=imagenet", ["data=imagenet", name]) for name in ("loop", "loader", "eval", "memory")),
    ],
)
def test_a_wrong_command_line_is_one_line(line, parts, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["resnet-bench", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.bench()
    text = capsys.readouterr()
    assert (ended.value.code, text.out) == (2, "")
    assert text.err.startswith("error: ")
    assert text.err.count("\n") == 1
    assert all(part in text.err for part in parts), text.err
    assert not list(tmp_path.iterdir())


def test_a_wrong_command_line_is_found_without_torch(tmp_path):
    code = "import atexit, sys\nfrom resnet_train import cli\natexit.register(lambda: print('torch' in sys.modules))\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "cli.bench()", "loop", "depth=21"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr


def test_a_launcher_s_processes_are_refused(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["resnet-bench", "loop"])
    with pytest.raises(SystemExit):
        cli.bench()
    assert "without torchrun" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_found_before_the_work(tmp_path):
    """A folder may look as if it could be written to, and not be: to root all do."""
    (tmp_path / f"found.json.{os.getpid()}.part").mkdir()
    asked, training = checked("bench=loop", f"out={tmp_path}/found.json")
    with pytest.raises(UserError, match=r"^out=.*found\.json: cannot be written"):
        suite.bench(asked, training)


def test_help_lists_the_six_and_each_is_a_command(command):
    done = command("--help", entry="bench")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("  resnet-bench ")]
    assert [line[1] for line in lines][:6] == NAMES
    for _, name, *rest in lines:
        assert checked(f"bench={name}", *[word for word in rest if "=" in word])[0].bench == name


def test_help_has_only_keys_that_are_taken(command):
    shown = command("--help", entry="bench").stdout.partition("== Values (key=value) ==\n")[2]
    assert sorted({*flat(yaml.safe_load(shown)), *groups("bench")}) == sorted({*known_keys("bench")})


def test_it_takes_what_training_takes():
    """The keys of configs/train.yaml but those that mean nothing here, with the same values."""
    own = {field.name for field in dataclasses.fields(BenchConfig)}
    ours, theirs = (compose(name, []) for name in ("bench", "train"))
    assert ours.keys() - own == theirs.keys() - FIXED_BY_BENCH.keys() | {"iterations", "eval_every"}
    assert all(ours[key] == theirs[key] for key in ours.keys() & theirs.keys())
    assert yaml.safe_load(yaml.safe_dump(ours)) == ours
