"""Malformed command lines, made by hypothesis: exit code 2, one readable line, and nothing is left behind.

The lines are the same each time; `FUZZ_EXAMPLES=20000 pytest -m '' tests/test_fuzz.py` makes as many, and other ones.
"""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import forked
import pytest
from conftest import start
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from resnet_train import cli
from resnet_train.config.compose import compose
from resnet_train.config.keys import Range
from resnet_train.config.options import groups
from resnet_train.config.schema import flat, marked
from resnet_train.config.train import Config
from resnet_train.dispatch import main

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 250))  # of `make test-all`; the first of them are `make test`'s

# --- What is drawn: each line is malformed by the way in which it is made --------------------------------------------

# Pieces of Hydra's, OmegaConf's, YAML's, Python's and the shell's grammars, and what terminals and paths trip over.
PIECES = [*"'\"\\$&;|<>()[]{}*?#~`=,.:@/+-_ \t\n\r\0\x1b\x7f\x85\xa0\u2028\u202e\ufeff\udcff", "${", "}", "${nosuch}"]
PIECES += ["null", "true", "nan", "-inf", "1e999", "0x1F", "1_000", "[0.5,", "{a:", "???", "../..", "~nosuchuser", "%s"]
PIECES += ["{0}", "\\'", "key=", "int(", "range(1,", "choice(a,", "glob(*)", "!!python/object:os.system", "\x1b[2J"]
ODD = st.lists(st.sampled_from(PIECES) | st.characters(), max_size=8).map("".join)
TEXT = st.builds(str.__mul__, ODD, st.sampled_from([1] * 16 + [40, 40, 400]))
# With a "!", which stands in no number, no option, no path that exists and no word of ours.
WRONG = st.builds("{}!{}".format, TEXT, TEXT)
NAME = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)
OTHER = NAME.map("x_{}".format)  # a word that is none of ours

KEYS = flat(compose("train", ["schedule=plateau"]))
BOOLS = {key for key, value in KEYS.items() if isinstance(value, bool)}
LISTS = {"schedule.drops", "augment.shorter_side"}
FREE = {"init_from", "run_dir", "resume", "data.root", "recipe"}
RANGES = marked(Range, Config) | {"scale": Range(0, 1)}
NUMBERS = RANGES.keys() - LISTS
WORDS = KEYS.keys() - BOOLS - LISTS - FREE - NUMBERS
WHOLE = {"seed", "depth", "iterations", "batch_size", "timeout", "devices", "augment.pad", "data.size"}
BELOW = {key: int(found.low) for key, found in RANGES.items() if found.low is not None and key in NUMBERS}
ABOVE = {key: int(found.high) for key, found in RANGES.items() if found.high is not None and key in NUMBERS}


def items(keys, values):
    """KEY=VALUE for any of each; values that are no strategy are a list of texts, a word to each."""
    values = values if isinstance(values, st.SearchStrategy) else st.sampled_from(values)
    return st.builds("{}={}".format, st.sampled_from(sorted(keys)), values)


def too_small(key):
    return st.integers(max_value=BELOW[key] - 1).map(lambda value: f"{key}={value}")


def too_large(key):
    return st.integers(min_value=ABOVE[key] + 1).map(lambda value: f"{key}={value}")


NINES = st.integers(30, 6000).map(lambda digits: digits * "9")
NESTED = st.builds(
    lambda pair, depth, closed: pair[0] * depth + pair[1] * depth * closed,
    st.sampled_from(["[]", "{}", "()", ("{a:", "}"), ("[1,", "]"), ("int(", ")"), ("${", "}"), ("'${", "}'")]),
    st.integers(2, 500),
    st.booleans(),
)
REFERENCE = st.builds(
    "{}${{{}nosuch{}}}".format,
    st.sampled_from(["", "a", "'", "'x"]),
    st.sampled_from(["", ".", "..", "data.", "oc.env:", "hydra:", "x:", "${"]),
    ODD,
)
KINDS = {
    "no number": items(NUMBERS, WRONG)
    | items(NUMBERS, ["", "null", "true", "[]", "[1]", "{}", "{a:1}", "nan", "inf", "-inf", "'20'", '"1"', "1 2"]),
    "no whole number": items(WHOLE, st.floats(0.1, 1e6).filter(lambda value: value != int(value))),
    "too small": st.sampled_from(sorted(BELOW)).flatmap(too_small) | items(BELOW, NINES.map("-{}".format)),
    "too large": st.sampled_from(sorted(ABOVE)).flatmap(too_large) | items(ABOVE, NINES),
    "neither true nor false": items(BOOLS, WRONG) | items(BOOLS, ["", "null", "0", "1", "yes", "[]", "{}", "'true'"]),
    "no word of ours": items(WORDS, WRONG | OTHER),
    "no list": items(LISTS, WRONG)
    | items(LISTS, ["", "null", "0.5", "{}", "{a:1}", "[a]", "[[0]]", "[null]", "[0.5,0.4]", "[1e999]", "[-1,2]"]),
    "no text": items(FREE - {"recipe"}, ["", "' '", "[]", "[x]", "{}", "{a:1}", "true", "x" * 300, "'~nosuchuser/x'"])
    | items(FREE - {"recipe"}, ["'a\0b'", "'\udcff'", "'a/\ud800b'"]),
    "no option": items(groups("train"), WRONG | OTHER)
    | items(
        groups("train"),
        ["", "null", "[]", "{}", "[cifar10]", "1", "..", "/", "../data/cifar10", "a/b", "digits.yaml"],
    ),
    "no group of values": items({"augment", "warmup"}, ["0", "null", "[]", "x", "''", "{nosuch:1}", "{1:2}"])
    | items({"augment", "warmup"}, WRONG),
    "no key": st.builds(
        "{}{}nosuch_{}={}".format,
        st.sampled_from(["", "", "+", "++", "~"]),
        st.sampled_from(["", "augment.", "data.", "schedule.", "depth.", "data.root."]),
        NAME,
        TEXT,
    ),
    "no key but odd text": st.builds("{}!{}={}".format, TEXT, TEXT, TEXT),
    "no value": TEXT.map(lambda text: text.replace("=", "")).filter(lambda text: not text.startswith("~hydra")),
    "taken away": st.sampled_from(sorted(f"~{key}" for key in KEYS)),
    "put in place": st.sampled_from(
        ["+depth=20", "+data=digits", "++data=digits", "+schedule@x=step", "data@x=digits"]
    ),
    "of what is not": items(KEYS.keys() - {"data.name"}, REFERENCE),
    "of itself": st.sampled_from(sorted(f"{key}=${{{key}}}" for key in KEYS)),
    "nested": items({"depth", "augment", "schedule.drops", "data", "hydra.run.dir"}, NESTED),
    "Hydra's": items(
        {"hydra", "hydra.mode", "hydra.job.chdir", "hydra.job.num", "hydra.nosuch", "hydra.searchpath", "hydra.run"}
        | {"hydra/launcher", "hydra/sweeper", "hydra/job_logging", "hydra/nosuch", "hydra.sweeper.max_batch_size"},
        WRONG | OTHER,
    )
    | st.sampled_from(["hydra.run.dir=null", "~hydra", "~hydra.run", "hydra.mode=2"])
    | st.sampled_from(["hydra.sweeper.params.depth=20", "hydra.job_logging=null", "hydra.searchpath=[nosuch]"]),
}
# What is found wrong on the way to a run, and not where --cfg or -m keep from it.
AT_THE_START = (
    items({"run_dir", "hydra.run.dir", "hydra.output_subdir"}, NAME.map("/dev/null/{}".format))
    | items({"resume"}, WRONG)
    | st.sampled_from(
        ["hydra.run.dir=${nosuch}", "hydra.verbose={a:1}", "+hydra.callbacks.x=1", "hydra.run.dir=" + "x" * 300]
    )
)
CONTRADICTIONS = """
depth=21|depth=0|batch_size=7 devices=2|device_batch_size=48|bn_images=48|arch=plain shortcut=A|shortcut=none
nesterov=true momentum=0|schedule.drops=[0.75,0.5]|data.family=imagenet|data=imagenet|data=imagefolder
data.validation=50000 data=cifar10|data=digits data.root=.|data.size=64 data=cifar10|data.workers=3
device=cpu precision=fp16|schedule=cosine schedule.drops=[0.5]|arch=plain zero_gamma=true|schedule.name=cosine
+schedule.patience=0.5 schedule=step|device_batch_size=64 bn_images=all|~data=digits|~depth=21
"""
FLAGS = """
--nosuch|-x|---|-- depth=21|--cfg|--cfg nosuch|--info nosuch|-sc|-sc nosuch|-sc install=nosuch|-sc query=bash|-p
--config-name eval|--config-path .|-cd .|--config-dir=.|--experimental-rerun x|--conf eval|--help=x|--resolve
--cfg job -p nosuch|--cfg all -p [|-mx|--multirun=1|-m --cfg job
"""
# Right, and of keys that no other word asks for.
RIGHT = ["seed=3", "iterations=640", "eval_batch_size=50", "compile=false", "weight_decay=0", "init=fan_in"]
RIGHT += ["log_every=7", "warmup.lr=0.02", "augment.flip=true", "max_restarts=1", "decay=weights", "timeout=60"]


@st.composite
def lines(draw):
    """An entry point and a malformed command line."""
    kind = draw(st.sampled_from([*KINDS, *KINDS, "contradiction", "flag", "flag", "start", "eval", "eval", "bench"]))
    if kind == "eval":  # there is no checkpoint: anything is wrong
        words = items({"checkpoint", "data", "data.root", "split", "devices", "out"}, TEXT)
        return "evaluate", draw(st.lists(words | st.one_of(*KINDS.values()), max_size=4).filter(no_flags))
    if kind == "bench":
        return "bench", [
            "bench=step",
            *draw(st.lists(st.one_of(*KINDS.values()), min_size=1, max_size=2).filter(no_flags)),
        ]
    flags = draw(st.sampled_from([[], [], [], ["-m"], ["--cfg", "job"]]))
    if kind == "flag":
        flags, wrong = [], draw(st.sampled_from(listed(FLAGS)) | WRONG.map(lambda text: [f"--{text}"]))
    elif kind == "contradiction":
        wrong = draw(st.sampled_from(listed(CONTRADICTIONS)))
    elif kind == "start":
        flags, wrong = [], [draw(AT_THE_START)]
    else:
        wrong = [draw(KINDS[kind].filter(lambda text: no_flags([text])))]
    asked = {word.lstrip("+~").partition("=")[0] for word in wrong}
    right = [word for word in draw(st.lists(st.sampled_from(RIGHT), max_size=3)) if not asked & keys_of(word)]
    place = draw(st.integers(0, len(right)))
    return "train", [*flags, *right[:place], *wrong, *right[place:]]


def no_flags(words):
    return not any(word.startswith("-") for word in words)


def listed(text):
    return [line.split() for line in text.strip().replace("\n", "|").split("|")]


def keys_of(word):
    """The key of a word and the group that it is in."""
    key = word.partition("=")[0]
    return {key, key.partition(".")[0]}


# --- What they give --------------------------------------------------------------------------------------------------

each_line = settings(
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


def begins(*_):
    sys.exit("a malformed line has begun a run")


def attempt(entry, words):
    """What a command gives, in this process: exit code, stdout and stderr. No run is begun."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", [f"resnet-{entry}", *words])
        try:
            if entry == "evaluate":
                cli.evaluate()
            else:
                main(dataclasses.replace(cli.COMMANDS[entry], run=f"{__name__}:begins"))
            code = 0
        except SystemExit as ended:
            code = ended.code
    return code, out.getvalue(), err.getvalue()


def check(code, stdout, stderr):
    """One line that a terminal shows, says something, and is no internal of Python's."""
    assert (code, stdout) == (2, ""), stderr
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr[:-1].isprintable(), stderr
    assert len("error: x") < len(stderr) <= 1000
    assert "Traceback" not in stderr
    assert not os.listdir()


@pytest.mark.slow
@pytest.mark.timeout(300 + EXAMPLES)
@pytest.mark.parametrize("examples", [min(EXAMPLES, 40), pytest.param(EXAMPLES, marks=pytest.mark.long)])
def test_a_malformed_command_line_is_one_readable_line_and_leaves_nothing(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = set()

    @settings(each_line, max_examples=examples * 6 // 5)  # some are drawn twice
    @given(lines())
    def each(line):
        seen.add(str(line))
        check(*attempt(*line))

    each()
    assert len(seen) >= examples


@pytest.mark.slow
def test_so_is_a_malformed_command(tmp_path, monkeypatch):
    """Eight of them as processes, whose arguments can be any bytes but NUL."""
    monkeypatch.chdir(tmp_path)
    drawn = []

    @settings(each_line, max_examples=200, phases=[Phase.generate])
    @given(lines().filter(lambda line: typable("".join(line[1]))))
    def each(line):
        if line not in drawn:
            drawn.append(line)

    each()
    chosen = drawn[:: len(drawn) // 8][:8]
    assert len(chosen) == 8

    def run(line):
        return forked.run(start(*line[1], entry=line[0]), capture_output=True, text=True, stdin=subprocess.DEVNULL)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, chosen):
            check(done.returncode, done.stdout, done.stderr)


def typable(text):
    """Whether the system takes `text` as an argument."""
    with contextlib.suppress(UnicodeEncodeError):
        return "\0" not in text and len(text.encode(errors="surrogateescape")) < 100_000
    return False
