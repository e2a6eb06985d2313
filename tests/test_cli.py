"""The commands as they are typed: a wrong one is one line on stderr, exit code 2, and nothing else."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import forked
import pytest
import yaml
from conftest import start
from hydra.core.override_parser.overrides_parser import OverridesParser

from resnet_train import __version__, cli, sweep
from resnet_train.__main__ import COMMANDS
from resnet_train.config.compose import compose
from resnet_train.config.quoting import as_text, as_typed
from resnet_train.config.words import jobs_of, with_jobs
from resnet_train.dispatch import prepare

CFG = "depth=110 data=digits schedule=cosine schedule.lr=0.05 arch=plain"
HELP = [(entry, "--help") for entry in ("evaluate", "classify", "features", "report", "responses", "weights", "pack")]
HELP += [("detect", "--help"), ("detect", "predict --help"), ("detect", "test --help"), ("bench", "--help")]
HELP += [("localize", "--help"), ("localize", "test --help")]
RIGHT = ["--help", "--version", f"{CFG} --cfg job", "-sc install=bash"]
# Command line, and what its error names.
WRONG = [
    ("depth=21", ["depth=21", "nearest: 20"]),
    ("dept=20", ["dept=20", "did you mean depth?"]),
    ("schedule.lrr=1", ["schedule.lrr=1", "did you mean schedule.lr?"]),
    ("data=cifar11", ["data=cifar11", "did you mean cifar10?"]),
    ("data=[cifar10,digits]", ["data=[cifar10,digits]"]),
    ("schedule={lr:1}", ["schedule={lr:1}", "schedule.KEY=VALUE"]),
    ("batch_size=abc", ["batch_size=abc", "whole number"]),
    ("data=imagenet depth=20 data.root=.", ["depth=20", "nearest: 18"]),
    ("data=imagefolder data.root=.", ["data.root=", "empty"]),
    ("data.root=~/cifar", ["data.root=~/cifar: there is no such file"]),
    ("depth", ["'depth'", "key=value"]),
    ("depth=20 32", ["'32'", "key=value"]),
    ("depth=[", ["depth=["]),
    ("iterations=1,000", ["iterations=1,000: several values are a sweep", "; a number has no comma, as 1000 or 0.01"]),
    ("depth=20,32", ["depth=20,32", "-m"]),
    ("depth=${nosuch}", ["depth", "nosuch"]),
    ("run_dir=/dev/null/x", ["run_dir=/dev/null/x"]),
    ("hydra.nosuch=1", ["hydra.nosuch"]),
    ("--nosuch", ["--nosuch", "--help"]),
    ("--depth 20", ["--depth: values are written KEY=VALUE, as in depth=20; --help"]),
    ("--lr=0.1", ["--lr=0.1: values are written KEY=VALUE, as in schedule.lr=0.1; --help"]),
    ("--num-workers 3 seed=1", ["--num-workers: values are written KEY=VALUE, as in data.workers=3"]),
    ("list", ["'list': is not key=value, as depth=20 is; --help"]),
    ("digits depth=20", ["'digits'", "did you mean data=digits?"]),
    ("~run_dir", ["~run_dir: nothing can be taken away; write run_dir=VALUE"]),
    ("~depth=20", ["~depth=20: nothing can be taken away; write depth=VALUE"]),
    ("+depth=20", ["+depth=20: is there already; remove the +"]),
    ("run_dir=${hydra:runtime.cwd}", ["run_dir=${hydra:runtime.cwd}: ${…} gives nothing here"]),
    ("depth=glob(*)", ["depth=glob(*): is not written out here", "-m depth=A,B"]),
    ("-m depth=interval(1,2)", ["depth=interval(1,2): is not written out here"]),
    ("-m depth=range(1,2,0)", ["depth=range(1,2,0): gives no values"]),
    ("-m depth=choice()", ["depth=choice(): must be a whole number"]),
    ("depth=20€", ["depth=20€: must be a whole number"]),
    ("data=größe", ["data=größe: allowed are cifar10, "]),
    ("depth=20 -m seed=0,x", ["seed=x: must be a whole number"]),
    ("schedule=cosine schedule.drops=[0.5]", ["schedule=cosine has no drops", "schedule=step"]),
    ("--cfg jbo", ["jbo", "job"]),
    ("-cn eval", ["--config-name"]),
    ("-m depth=20,21", ["depth=21", "nearest: 20"]),
    ("-m depth=20,20", ["share runs/cifar10/resnet-20-A/seed-0; leave out a value named twice, or"]),
    ("-m seed=0,1 run_dir=x", ["share x; leave out run_dir="]),
    ("-m seed=0,1 run_dir=x/${now:%S}-${seed}", ["run_dir=x/${now:%S}-${seed}: the time is another one in each job"]),
    ("-m seed=0,1 depth=21 hydra.sweep.dir=x/${now:%S}", ["error: depth=21", "nearest: 20"]),
    ("-m seed=0,1 run_dir=x/${hydra:job.num}", ["error: run_dir=x/${hydra:job.num}: ${…} gives nothing here"]),
    ("data=digits augment={colour_jitter:0.5}", ["augment.colour_jitter: is for data=imagenet"]),
    ("data=digits recipe=imagenet", ["recipe=imagenet: sets augment.shorter_side=[256,480], which data=digits"]),
    (
        "data=digits data.size=32 recipe=torchvision",
        ["recipe=torchvision: sets augment.area="],
    ),
    ("-m experiment=fig1,fig6", ["experiment=fig1,fig6: takes one experiment at a time"]),
    ("-m experiment=fig1 job=choice(plain-20,plain-57)", ["job=plain-57: experiment=fig1 has plain-20, plain-56"]),
    ('experiment="fig1"', ['experiment="fig1": has 2 jobs; add -m for all']),
    ("-m data=glob(*)", ["data=glob(*): is not written out here"]),
    ("-m seed=range(3,0)", ["seed=range(3,0)", "has no job"]),
    ("-m depth=20,32 seed=range(3,0)", ["error: seed=range(3,0)", "has no job"]),
    ("-m hydra.sweeper.params.depth=20", []),
    ("hydra.mode=MULTIRUN depth=21", ["depth=21"]),
    ("data=digits data.validation=5000", ["data.validation=5000", "1437"]),
    ("data.root=/" + 300 * "x", ["data.root=/xxx", "too long"]),
    ("depth=21 --cfg job", ["depth=21", "nearest: 20"]),
]
WRONG_EVAL = [
    ("", ["checkpoint", "checkpoint="]),
    ("nosuch.pt", ["checkpoint=nosuch.pt", "no such file"]),
    (f"{__file__} nosuch.pt", [f"checkpoint={__file__}"]),
    (f"{__file__} checkpoint={__file__}", [__file__, "two ways"]),
    ("--checkpoint nosuch.pt", ["as in checkpoint=nosuch.pt"]),
    ("checkpoint=größe.pt", ["checkpoint=größe.pt: there is no such file"]),
    ("checkpoint=[~/größe.pt,b.pt]", ["checkpoint=~/größe.pt: there is no such file"]),
    ("checkpoint=nosuch.pt", ["checkpoint=nosuch.pt", "no such file"]),
    ("checkpoint=a.pt,b.pt", ["no such file; where several are taken, they are a list: [FILE,FILE]"]),
    (f"checkpoint={__file__} data=cifar11", ["cifar11", "did you mean cifar10?"]),
    (f"-m checkpoint={__file__}", ["-m"]),
    (f"hydra.mode=MULTIRUN checkpoint={__file__}", ["-m"]),
    ("chekpoint=x", ["chekpoint=x", "did you mean checkpoint?"]),
]
# Of `resnet-detect`, whose first word may be another command's, and of `resnet-report`.
WRONG_FIRST = [
    ("detect", "tset last.pt", ["'tset': is not key=value; did you mean test?"]),
    ("detect", "predicts a.jpg", ["'predicts': is not key=value; did you mean predict?"]),
    ("detect", "data=VOCdevkit", ["; a folder of your own is data=voc data.root=VOCdevkit"]),
    ("report", "complexty", ["complexty: there is no such folder; did you mean complexity?"]),
]
# What torch or the data must judge, within the job.
LATE = [("data=imagefolder data.root=../tree device=cpu", ["tree/train/cat/0.png", "not an image"])]
LATE_EVAL = [(f"checkpoint={__file__}", [__file__])]
# Runs each command line in a child that begins where `from resnet_train import cli` ends, in a folder of its own.
DRIVER = """
import atexit, json, os, sys
from pathlib import Path
from resnet_train import cli
for number, (entry, line) in enumerate(json.load(sys.stdin)):
    os.mkdir(str(number))
    child = os.fork()
    if not child:
        break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    Path(f"{number}.code").write_text(str(code))
else:
    sys.exit()
os.chdir(str(number))
for stream in (1, 2):
    os.dup2(os.open(f"../{number}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
atexit.register(lambda: Path(f"../{number}.torch").write_text(str("torch" in sys.modules)))
sys.argv = ["resnet-eval" if entry == "evaluate" else f"resnet-{entry}", *line.split()]
getattr(cli, entry)()
"""


@dataclass
class Outcome:
    """What a command line gave: exit code, output, the files it left, and whether it loaded torch."""

    code: int
    stdout: str
    stderr: str
    left: list[str]
    torch: bool


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of every (entry point, command line) above, from one process and its children."""
    folder = tmp_path_factory.mktemp("commands")
    for part in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (folder / "tree" / part).mkdir(parents=True)
        (folder / "tree" / part / "0.png").write_text("no image")
    lines = [("train", line) for line in [*RIGHT, *(line for line, _ in WRONG)]]
    lines += [("evaluate", line) for line, _ in WRONG_EVAL]
    lines += HELP
    lines += [(entry, line) for entry, line, _ in WRONG_FIRST]
    subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(lines),
        cwd=folder,
        env=os.environ | {"RESNET_TRAIN_DATA": str(folder / "data")},
        check=True,
        text=True,
    )
    found = {
        line: Outcome(
            int((folder / f"{number}.code").read_text()),
            (folder / f"{number}.1").read_text(),
            (folder / f"{number}.2").read_text(),
            os.listdir(folder / str(number)),
            (folder / f"{number}.torch").read_text() == "True",
        )
        for number, line in enumerate(lines)
    }
    for entry, line in [*(("train", line) for line, _ in LATE), *(("evaluate", line) for line, _ in LATE_EVAL)]:
        (folder / entry).mkdir()
        words = start(*line.split(), entry=entry)
        done = forked.run(words, cwd=folder / entry, capture_output=True, text=True)
        found[entry, line] = Outcome(done.returncode, done.stdout, done.stderr, os.listdir(folder / entry), torch=True)
    return found


def output(found):
    """The output of a command that has nothing to complain of."""
    assert (found.code, found.stderr, found.left, found.torch) == (0, "", [], False)
    return found.stdout


def error(found):
    """The one line of a command that is refused and leaves nothing."""
    assert found.code == 2
    assert found.stderr.count("\n") == 1, found.stderr
    assert found.stderr.startswith("error: ")
    assert (found.stdout, found.left) == ("", [])
    return found.stderr


# --- Help, configuration, completion ---------------------------------------------------------------------------------


def test_help_shows_examples_groups_and_values(outcomes):
    text = output(outcomes["train", "--help"])
    assert "resnet-train depth=110 data=cifar10" in text
    assert "resnet-train -m " in text
    for group, options in {
        "data": "cifar10, cifar100, digits, imagefolder, imagenet",
        "experiment": "demo, fig1, fig4, fig6, fig7, longer, table3, table4, table5",
        "recipe": "cifar10, cifar100, digits, imagefolder, imagenet, torch2016, torchvision",
        "schedule": "cosine, plateau, step, thirds",
    }.items():
        assert f"{group}: {options}\n" in text
    assert "shortcut: A\n" in text


@pytest.mark.parametrize(("entry", "line"), [("train", "--help"), *HELP])
def test_no_line_of_help_is_broken_by_a_terminal_of_80_columns(entry, line, outcomes):
    assert [text for text in output(outcomes[entry, line]).splitlines() if len(text) > 80] == []


def test_help_has_each_comment_of_a_key_above_it(outcomes):
    """From the command's own file and those of the chosen options, and no key has that of another."""
    text = output(outcomes["train", "--help"])
    assert "\n# resnet | plain\narch: resnet\n" in text
    assert "\n# CIFAR nets: 6n+2\ndepth: 20\n" in text
    assert (
        "  # training images held out by a fixed permutation; 5000 gives the paper's\n  # 45k/5k\n  validation: 0\n"
        in text
    )
    assert "\nseed: 0\n" in text
    assert "README" not in text
    described = output(outcomes["evaluate", "--help"])
    assert "or several, as [one.pt,two.pt]: an ensemble, which averages their softmax\n" in described.replace(
        "\n# ", " "
    )
    assert text.index("== Values") < text.index("# resnet | plain")


def test_every_example_of_the_help_is_a_command_that_works(outcomes, tmp_path, monkeypatch):
    """Those that name no file of the reader's own."""
    monkeypatch.chdir(tmp_path)
    examples = [
        line.split("   ")[0].split()[1:]
        for line in re.sub(r" +\\\n +", " ", outcomes["train", "--help"].stdout).splitlines()
        if line.startswith("  resnet-train ") and "data.root" not in line
    ]
    assert len(examples) >= 4
    for words in examples:
        overrides = [word for word in words if "=" in word]
        monkeypatch.setattr("sys.argv", ["resnet-train", *words])
        for job in jobs_of("train", with_jobs(overrides, "-m" in words), "-m" in words):
            prepare(cli.COMMANDS["train"], compose("train", job), job, "-m" in words)


def test_eval_has_help_of_its_own(outcomes):
    assert "resnet-eval checkpoint=" in output(outcomes["evaluate", "--help"])


def test_cfg_prints_the_whole_configuration(outcomes):
    found = yaml.safe_load(output(outcomes["train", f"{CFG} --cfg job"]))
    assert found == compose("train", CFG.split())
    assert (found["depth"], found["recipe"], found["arch"]) == (110, "digits", "plain")
    assert found["schedule"] == {"name": "cosine", "lr": 0.05}


def test_the_version_is_ours(outcomes):
    assert output(outcomes["train", "--version"]) == f"resnet-train {__version__}\n"


def test_the_package_is_a_command(tmp_path):
    def run(*words):
        done = subprocess.run(
            [sys.executable, "-m", "resnet_train", *words], capture_output=True, text=True, cwd=tmp_path
        )
        return done.returncode, done.stdout, done.stderr

    entries = {
        entry.name: entry.load() for entry in entry_points(group="console_scripts") if entry.module == cli.__name__
    }
    assert entries == {f"resnet-{name}": command for name, command in COMMANDS.items()}
    code, told, _ = run()
    assert (code, [name in told for name in COMMANDS]) == (0, [True] * len(COMMANDS))
    assert run("eval", "x.pt")[2].startswith("error: checkpoint=x.pt: there is no such file")
    assert run("depth=21")[2].startswith("error: depth=21: CIFAR nets have 6n+2 layers")
    assert run("tain", "depth=20")[::2] == (
        2,
        f"error: tain: is no command; there are {', '.join(COMMANDS)}; did you mean train?\n",
    )
    assert os.listdir(tmp_path) == []


# --- Text that is no word of Hydra's ---------------------------------------------------------------------------------

NAMES = [
    "~/x",
    "a b",
    "a=b",
    "a,b",
    "größe",
    "图片",
    "photos (1)",
    "2026_11",
    "007",
    "1e3",
    "a'b",
    'a"b',
    "a\\",
    "[a",
    "a]{b",
]
NAMES += [
    "a$b",
    "50%",
    "#1",
    "é\u0301",
    "choice(1,2)",
    "glob(*)",
    "a: b",
    "&;|<>",
    "`x`",
    "-x",
    "🙂",
    "a@b",
    "x" * 300,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_taken_as_it_is_typed(name):
    """Whatever Hydra's grammar would make of it, alone or in a list."""

    def value(item):
        return OverridesParser.create().parse_override(item).value()

    assert value(as_text(f"run_dir={name}", False)) == name
    assert as_typed(as_text(f"++data.root={name}", False)) == f"++data.root={name}"
    if not set(name) & set(",[]{}()'\"\\") and not name[0].isdigit():
        assert value(as_text(f"checkpoint=[{name},b.pt]", False)) == [name, "b.pt"]
        jobs = jobs_of("train", [as_text(f"run_dir={name},b", True)], True)
        assert [value(item) for (item,) in jobs] == [name, "b"]


@pytest.mark.parametrize(
    ("item", "sweep"),
    [
        *[("depth=20", False), ("depth=20,56", True), ("schedule.drops=[0.5,0.75]", False), ("data.root=null", False)],
        *[("data.root=${oc.env:HOME}/x", False), ('run_dir="a b"', False), ("run_dir='a,b',c", True), ("depth", False)],
        *[("checkpoint=[a.pt,b.pt]", False), ("hydra.run.dir=~/x", False), ("data={root:x}", False)],
        ("seed=range(3)", True),
    ],
)
def test_what_hydra_reads_as_it_is_meant_stays_as_it_is(item, sweep):
    assert as_text(item, sweep) == item


def test_completion_is_a_script(outcomes):
    text = output(outcomes["train", "-sc install=bash"])
    assert "complete " in text
    assert "resnet-train" in text


# --- Wrong command lines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "line", "parts"),
    [("train", *row) for row in WRONG] + [("evaluate", *row) for row in WRONG_EVAL] + WRONG_FIRST,
)
def test_a_wrong_command_line_is_one_line_without_torch_and_leaves_nothing(outcomes, entry, line, parts):
    """A sweep with one wrong job begins none of them."""
    text = error(outcomes[entry, line])
    assert all(part in text for part in parts), text
    assert not outcomes[entry, line].torch


@pytest.mark.parametrize(
    ("entry", "line", "parts"),
    [("train", *row) for row in LATE] + [("evaluate", *row) for row in LATE_EVAL],
)
def test_what_only_the_job_finds_out_is_one_line_too(outcomes, entry, line, parts):
    """Hydra adds none of its own. Training has said that it starts."""
    found = outcomes[entry, line]
    lines = found.stdout.splitlines()
    assert all(text.endswith(": starting") for text in lines), lines
    text = error(dataclasses.replace(found, stdout="") if entry == "train" else found)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("evaluate", "broken.pt device=cpu"),
        ("responses", "broken.pt device=cpu"),
        ("classify", "0.png checkpoint=broken.pt device=cpu"),
        ("detect", "predict 0.png checkpoint=broken.pt device=cpu"),
        ("weights", "export broken.pt out=x.pth"),
        ("pack", "data.root=tree out=packed workers=0"),
    ],
)
def test_a_command_that_takes_torch_says_at_once_that_it_starts(entry, line, tmp_path, monkeypatch, capsys):
    """On stderr, beside which there is the one line of its error."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("broken.pt", "w") as archive:
        archive.writestr("broken/version", "3")
    Path("0.png").write_text("no image")
    for part in ("train/cat", "train/dog", "val/cat", "val/dog"):
        Path("tree", part).mkdir(parents=True)
        Path("tree", part, "0.png").write_text("no image")
    monkeypatch.setattr(sys, "argv", ["resnet-x", *line.split()])
    with pytest.raises(SystemExit) as ended:
        getattr(cli, entry)()
    out, err = capsys.readouterr()
    name = {"evaluate": "eval", "detect": "detect predict"}.get(entry, entry)
    assert (ended.value.code, out) == (2, "")
    assert re.fullmatch(f"resnet-{name}: starting\nerror: .+\n", err), err


# --- Sweeps ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_trains_what_is_missing(tmp_path):
    pytest.importorskip("sklearn")

    def sweep():
        words = "-m depth=8,14 data=digits iterations=6 log_every=3 eval_every=6 compile=false device=cpu"
        done = forked.run(
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
    assert first.splitlines()[-1] == "2 runs; side by side: resnet-report runs/digits out=report"
    runs = {path.parent.parent.name: path.parent for path in Path(tmp_path).glob("runs/digits/*/*/summary.json")}
    assert runs.keys() == {"resnet-8-A", "resnet-14-A"}
    summaries = {net: json.loads((run / "summary.json").read_text()) for net, run in runs.items()}
    assert [summaries[net]["net"] for net in ("resnet-8-A", "resnet-14-A")] == ["resnet-8-A", "resnet-14-A"]
    for run in runs.values():
        assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["iteration"] == 6

    cut, whole = runs["resnet-14-A"], runs["resnet-8-A"]
    (cut / "summary.json").unlink()
    before = (whole / "summary.json").read_bytes()
    again = sweep()
    assert [line for line in again.splitlines() if "skipped" in line] == [
        f"{whole.relative_to(tmp_path)}: finished, skipped"
    ]
    assert "resuming from iteration 6" in again
    assert (whole / "summary.json").read_bytes() == before
    assert json.loads((cut / "summary.json").read_text())["last"] == summaries["resnet-14-A"]["last"]


@pytest.mark.parametrize(
    ("places", "other", "words"),
    [
        (["runs/digits/a", "runs/digits/b"], "runs/c", "runs/digits"),
        (["runs/digits/a", "runs/digits/b"], "runs/digits/c/seed-1", "runs/digits/a runs/digits/b"),
        (["runs/digits/a", "runs/digits/b"], "link", "runs/digits/a runs/digits/b"),
        (["runs/a b/0", "runs/a b/1"], "c", "'runs/a b'"),
        (["-x/0", "-x/1"], "c", "./-x"),
        (["../r/0", "r/1"], "c", "../r/0 r/1"),
        (["0", "1"], "c", "0 1"),
    ],
)
def test_a_sweeps_last_line_names_its_runs_and_no_folder_of_others(places, other, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in [*places, other]:
        Path(place).mkdir(parents=True)
        Path(place, "config.json").touch()
        Path(place, "summary.json").write_text("{}")
    if other == "link":
        Path("runs/digits/link").symlink_to(tmp_path / "here/link")
    sweep.conclude([Path(place) for place in places])
    assert capsys.readouterr().out == f"2 runs; side by side: resnet-report {words} out=report\n"


@pytest.mark.long
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
    assert "1 of 2 jobs of the sweep did not finish: runs/digits/" in done.stderr.splitlines()[-1]
    assert "resnet-report" not in done.stdout
    assert [path.parent.name for path in Path(tmp_path).glob("runs/digits/*/*/summary.json")] == [
        path.name for path in Path(tmp_path).glob("runs/digits/*/*schedule.lr-0.1*")
    ]
    assert len(list(Path(tmp_path).glob("runs/digits/*/*/summary.json"))) == 1
