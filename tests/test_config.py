"""What may be asked for: the recipes are the paper's, every value can be changed, every wrong one is named."""

import ast
import copy
import dataclasses
import functools
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType, QuotedString

from resnet_train import cli, sweep
from resnet_train.config import commands, detection, images, localization
from resnet_train.config.commands import check_eval
from resnet_train.config.compose import compose
from resnet_train.config.detection import DetectConfig
from resnet_train.config.keys import Free, Range
from resnet_train.config.layout import class_folders
from resnet_train.config.options import CONFIG_DIR
from resnet_train.config.options import DATACLASSES as KINDS
from resnet_train.config.quoting import TEXTS
from resnet_train.config.run_dir import check_run_dir, check_same_run, plain_word, run_directory, run_state
from resnet_train.config.schema import as_list, flat, from_dict, keys_taking, marked, unread_keys
from resnet_train.config.train import Config, check_depth, check_train, config_from_checkpoint
from resnet_train.config.words import LISTS
from resnet_train.dispatch import prepare
from resnet_train.engine.schedule import Progress, learning_rate
from resnet_train.errors import UserError, nearest

PACKAGE = Path(cli.__file__).parent
CONFIGS = Path(CONFIG_DIR)
DATA = {path.stem: path for path in CONFIGS.glob("data/*.yaml")}
RECIPES = {path.stem: path for path in CONFIGS.glob("recipe/*.yaml")}
SCHEDULES = sorted(path.stem for path in CONFIGS.glob("schedule/*.yaml"))

# For each key that enters the mathematics two values that are not the default of data=cifar10.
OTHER = {
    "depth": ("26", "32"),
    "shortcut": ("B", "C"),
    "seed": ("3", "4"),
    "precision": ("bf16", "fp32"),
    "init": ("fan_out",),
    "zero_gamma": ("true",),
    "iterations": ("6400", "1e5"),
    "batch_size": ("64", "256"),
    "bn_images": ("16", "8"),
    "eval_batch_size": ("100", "1"),
    "momentum": ("0.8", "0"),
    "nesterov": ("true",),
    "weight_decay": ("0", "1e-3"),
    "decay": ("weights",),
    "warmup.depth": ("0", "20"),
    "warmup.lr": ("0.02", "1"),
    "warmup.error": ("70", "0.5"),
    "warmup.iterations": ("0", "500"),
    "augment.pad": ("0", "16"),
    "augment.flip": ("false",),
    "compile": ("false", "true"),
    "log_every": ("10", "1"),
    "eval_every": ("10", "1"),
    "init_from": ("/a.pt", "/b.safetensors"),
    "freeze": ("conv1", "layer3"),
    "data.validation": ("5000", "1"),
    "schedule.lr": ("0.05", "1e-9"),
    "schedule.factor": ("0.2", "1"),
    "schedule.drops": ("[]", "[0.4,0.6,0.9]"),
}
PLATEAU = {"schedule.patience": ("0.5", "1"), "schedule.threshold": ("0", "2"), "schedule.watch": ("val",)}
PHOTOS = {  # read for data.family=imagenet only
    "bottleneck_stride": ("3x3",),
    "normalise": ("channels", "standard"),
    "augment.shorter_side": ("[224,224]", "[256,300]"),
    "augment.colour_jitter": ("0.4", "1"),
    "augment.colour_noise": ("0", "1"),
}
# Not in the table: arch and augment.area (tested by name), and what the data set decides.
DECIDED_BY_DATA = {"arch", "augment.area", "recipe", "data.name", "data.family", "data.size", "schedule.name"}
FREE = {
    "run_dir": "x",
    "resume": "never",
    "checkpoint_every": "7",
    "keep_every": "7",
    "device": "cpu",
    "devices": "2",
    "device_batch_size": "16",
    "activation_checkpointing": "true",
    "max_restarts": "1",
    "timeout": "30",
    "data.root": None,
    "data.workers": None,  # read for data.family=imagenet only, as is the next
    "data.broken": None,
}
ODD = set(" '\"\\$&;|<>()[]{}*?!#~`=,%\n")  # of these some need quotes for Hydra, some for the shell
ALL_KEYS = OTHER.keys() | PLATEAU.keys() | PHOTOS.keys() | DECIDED_BY_DATA | FREE.keys()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Nothing is written outside the test's own folder."""
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


@functools.cache
def once(*overrides):
    return compose("train", list(overrides))


def composed(*overrides):
    """What compose gives, which takes 0.1 s: it is asked once for all that differ in values only."""
    parsed = [OverridesParser.create().parse_override(item) for item in overrides]
    values = {p.key_or_group: p for p in parsed if is_value(p)}
    found = copy.deepcopy(once(*(p.input_line for p in parsed if not is_value(p))))
    if not values.keys() <= flat(found).keys():
        return once(*overrides)
    for key, override in values.items():
        *groups, name = key.split(".")
        functools.reduce(dict.__getitem__, groups, found)[name] = to_plain(override.value())
    return found


def is_value(override):
    """Whether an override is KEY=VALUE with a value that depends on nothing else."""
    known = override.key_or_group in ALL_KEYS - {"recipe"}
    return known and override.type == OverrideType.CHANGE and "$" not in override.input_line


def to_plain(value):
    """A parsed value without the marks of its quotes."""
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    return value.text if isinstance(value, QuotedString) else value


def test_composed_is_compose():
    for words in ([f"{key}={value[0]}" for key, value in OTHER.items()], ["depth=[20]", "data.root=", "seed=1e400"]):
        assert composed("schedule=step", *words) == compose("train", ["schedule=step", *words])


def keys_of(overrides):
    return [item.lstrip("+").split("=")[0] for item in overrides]


def checked(*overrides):
    return check_train(composed(*overrides), keys_of(overrides))


def directory(*overrides):
    return run_directory(checked(*overrides), keys_of(overrides))


def base_of(key, tmp_path):
    """The words that make a key one that is read."""
    if key in PHOTOS or key in ("data.workers", "data.broken"):
        return needs_root("imagenet", tmp_path)
    if key == "freeze":
        return ["init_from=/a.pt"]
    return ["schedule=plateau", "data.validation=100"] if key in PLATEAU else []


def refusal(*overrides):
    with pytest.raises(UserError) as caught:
        checked(*overrides)
    return str(caught.value)


def tree(root, classes=("cat", "dog"), test="test"):
    """A train/<class>/*, test/<class>/* tree of (empty) images."""
    for part in ("train", test):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            (root / part / name / "0.png").touch()
    return root


def needs_root(data, tmp_path):
    return [f"data={data}"] + ([f"data.root={tree(tmp_path / 'images')}"] if data.startswith("image") else [])


# --- The recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("cifar10", ("cifar10", "A", 20, 64_000, 128, "step")),
        ("cifar100", ("cifar100", "A", 20, 64_000, 128, "step")),
        ("digits", ("digits", "A", 8, 400, 64, "step")),
        ("imagefolder", ("imagefolder", "A", 20, 12_800, 128, "step")),
        ("imagenet", ("imagenet", "B", 50, 600_000, 256, "plateau")),
    ],
)
def test_each_data_set_brings_its_recipe(data, expected, tmp_path):
    found = checked(*needs_root(data, tmp_path))
    recipe = (found.recipe, found.shortcut, found.depth, found.iterations, found.batch_size, found.schedule.name)
    assert recipe == expected
    assert found.data.name == data


def test_cifar10_is_the_default():
    assert checked() == checked("data=cifar10")


@pytest.mark.parametrize("order", [1, -1])
def test_a_recipe_and_a_schedule_that_are_asked_for_win(order, tmp_path):
    asked = ["data=digits", "recipe=cifar10", "schedule=cosine"][::order]
    found = checked(*asked)
    assert (found.data.name, found.recipe, found.iterations, found.schedule.name) == (
        "digits",
        "cifar10",
        64_000,
        "cosine",
    )
    asked = [*needs_root("imagenet", tmp_path), "schedule=step"][::order]
    assert checked(*asked).schedule.drops == [0.5, 0.75]
    assert composed("recipe=imagenet")["schedule"]["name"] == "plateau"


@pytest.mark.parametrize("files", [DATA, RECIPES], ids=["data", "recipe"])
def test_all_files_of_a_group_have_the_same_keys(files):
    keys = {name: set(flat(yaml.safe_load(path.read_text()))) - {"defaults"} for name, path in files.items()}
    assert all(found == keys["cifar10"] for found in keys.values()), keys


def test_every_data_set_has_a_recipe():
    assert DATA.keys() | {"torch2016", "torchvision"} == RECIPES.keys()


@pytest.mark.parametrize(
    ("recipe", "jitter", "noise", "nesterov"), [("torch2016", 0.4, 0.1, True), ("torchvision", 0, 0, False)]
)
def test_the_other_recipes_for_imagenet_are_those_of_their_sources(recipe, jitter, noise, nesterov, tmp_path):
    """fb.resnet.torch's opts.lua and datasets/imagenet.lua; torchvision's references/classification."""
    found = checked(*needs_root("imagenet", tmp_path), f"recipe={recipe}")
    assert (found.recipe, found.schedule.name, found.schedule.lr, found.schedule.factor) == (recipe, "step", 0.1, 0.1)
    plan = {"name": "step", "lr": found.schedule.lr, "warmup_lr": 0.0, "factor": 0.1, "drops": found.schedule.drops}
    marks = (0, 149_999, 150_000, 299_999, 300_000)
    rates = [learning_rate(iteration, found.iterations, Progress(warm=False), **plan) for iteration in marks]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])  # 150,000 batches of 256 are 30 passes
    assert (found.iterations, found.batch_size, found.shortcut, found.bottleneck_stride) == (450_000, 256, "B", "3x3")
    assert (found.momentum, found.nesterov, found.weight_decay, found.decay) == (0.9, nesterov, 1e-4, "all")
    assert (found.init, found.zero_gamma, found.normalise) == ("fan_out", False, "standard")
    augment = found.augment
    assert (augment.shorter_side, augment.area, augment.flip) == (None, [0.08, 1], True)
    assert (augment.colour_jitter, augment.colour_noise) == (jitter, noise)


@pytest.mark.parametrize(
    "words",
    [
        ["augment.area=[0.08,1]"],
        ["augment.shorter_side=null"],
        ["augment.shorter_side=null", "augment.area=[0.5]"],
        ["augment.shorter_side=null", "augment.area=[0,1]"],
        ["augment.shorter_side=null", "augment.area=[1,0.5]"],
    ],
)
def test_photographs_are_cut_in_one_way(words, tmp_path):
    assert refusal(*needs_root("imagenet", tmp_path), *words).startswith("augment.")


@pytest.mark.parametrize("data", DATA)
def test_the_numbers_are_the_papers(data, tmp_path):
    """Sections 3.4 and 4.2; the warm-up of 110 layers is CIFAR-10's."""
    found = checked(*needs_root(data, tmp_path))
    assert (found.schedule.lr, found.schedule.factor, found.momentum, found.weight_decay) == (0.1, 0.1, 0.9, 1e-4)
    assert (found.nesterov, found.decay, found.init, found.zero_gamma) == (False, "all", "fan_in", False)
    assert found.bottleneck_stride == "1x1"
    assert (found.warmup.lr, found.warmup.error, found.warmup.iterations) == (0.01, 80, 400)
    assert found.warmup.depth == (0 if data == "imagenet" else 110)
    if found.schedule.name == "step":
        assert found.schedule.drops == [0.5, 0.75]
        assert (found.augment.pad, found.augment.colour_noise) == (4, 0)
        assert found.augment.flip == (data != "digits")
    else:
        assert (found.augment.shorter_side, found.data.size, found.normalise) == ([256, 480], 224, "image")
        assert (found.augment.area, found.augment.colour_jitter, found.augment.colour_noise) == (None, 0, 0.1)


# --- Every value can be changed, and every key is read ---------------------------------------------------------------


def test_the_tables_above_hold_every_key():
    """A new key needs a line in OTHER, PLATEAU or FREE."""
    schedules = [flat(composed(f"schedule={name}")) for name in SCHEDULES]
    assert set().union(*schedules) == ALL_KEYS | {"scale"}
    assert FREE.keys() == marked(Free, Config).keys()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("which", [0, -1])
def test_every_value_can_be_changed(schedule, which):
    base = flat(composed(f"schedule={schedule}"))
    values = {key: value[which] for key, value in (OTHER | PLATEAU).items() if key in base}
    values |= {"momentum": "0.5"}
    values |= {key: value for key, value in FREE.items() if value}
    found = flat(checked(f"schedule={schedule}", *(f"{k}={v}" for k, v in values.items())).plain())
    for key, text in values.items():
        assert found[key] == to_plain(OverridesParser.create().parse_override(f"{key}={text}").value()), key
        assert found[key] != base[key], key


@pytest.mark.parametrize("key", [*PHOTOS, "data.workers", "data.broken"])
def test_what_photographs_need_can_be_changed(key, tmp_path):
    base = base_of(key, tmp_path)
    for text in PHOTOS.get(key, ("skip",) if key == "data.broken" else ("0", "7")):
        found = flat(checked(*base, f"{key}={text}").plain())[key]
        assert found == to_plain(OverridesParser.create().parse_override(f"{key}={text}").value())
        assert found != flat(composed(*base))[key]


@pytest.mark.parametrize(
    ("family", "key"),
    [(family, key) for family in ("cifar", "imagenet") for key in unread_keys(Config, family, *SCHEDULES)],
)
def test_what_a_family_does_not_read_is_refused(family, key, tmp_path):
    base = needs_root("imagenet", tmp_path) if family == "imagenet" else []
    value = (OTHER | PHOTOS | {"data.workers": ("7",), "data.broken": ("skip",), "augment.area": ("[0.08,1]",)})[key][0]
    told = refusal(*base, f"{key}={value}")
    here = f"data={'cifar10' if family == 'cifar' else family} (data.family={family})"
    photos = "imagefolder or data=imagenet" if key == "data.broken" else "imagenet"
    other = "cifar10" if family == "imagenet" else photos
    assert told == f"{key}: is for data={other}; {here} does not use it; remove it"
    assert not base_of(key, tmp_path / "other") or family == "cifar"


UNCOUNTED = ("check_train", "check_eval", "check_weights", "check_classify")


def reads():
    """(owner, name) of every attribute or string key that is read: config.data.root gives (data, root).

    Declarations and checks are no use of a value.
    """
    found = set()
    for path in PACKAGE.rglob("*.py"):
        module = ast.parse(path.read_text())
        if path.parent.name == "config":
            module.body = [n for n in module.body if getattr(n, "name", "") not in UNCOUNTED]
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add((_last_name(node.value), node.attr))
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                found.add((_last_name(node.value), node.slice.value))
    return found


def _last_name(node):
    return getattr(node, "attr", None) or getattr(node, "id", None)


def unread(keys):
    """The keys that no code reads: config.KEY, args.KEY (resnet-eval), self.KEY (Config's own) or GROUP.KEY."""
    found = reads()
    owners = {key: [key.split(".")[-2]] if "." in key else ["config", "args", "self"] for key in keys}
    return {key for key in keys if not any((owner, key.split(".")[-1]) in found for owner in owners[key])}


def test_every_key_is_read():
    keys = set().union(*(flat(composed(f"schedule={name}")) for name in SCHEDULES))
    keys |= set(flat(compose("eval", ["checkpoint=x"]) | compose("bench", [])))
    keys |= set(flat(compose("responses", ["checkpoint=x"]) | compose("report", [])))
    keys |= set(flat(compose("pack", [])))
    keys |= set(flat(compose("weights", []))) | compose("classify", ["checkpoint=x"]).keys()
    keys |= set(flat(compose("detect", []))) | compose("predict", ["checkpoint=x"]).keys()
    keys |= set(flat(compose("test", ["checkpoint=x"]))) | set(flat(compose("localize", ["init_from=x"])))
    keys |= set(flat(compose("localize_test", ["checkpoint=x"])))
    assert unread(keys) == {"scale"}  # which check_train multiplies the counts by: tests/test_experiments.py
    assert unread({"bn_wd", "schedule.nosuch", "seed"}) == {"bn_wd", "schedule.nosuch"}


RANGES = {  # key: least, most, without the least, without the most
    "anchors": (1, 4096, False, False),
    "augment.area": (0, 1, False, False),
    "augment.colour_jitter": (0, 1, False, False),
    "augment.colour_noise": (0, 1, False, False),
    "augment.pad": (0, 16, False, False),
    "augment.shorter_side": (0, 4096, False, False),
    "batch_size": (1, 1000000, False, False),
    "bn_images": (2, None, False, False),
    "checkpoint_every": (1, None, False, False),
    "data.size": (8, 1024, False, False),
    "crop": (16, 1024, False, False),
    "data.validation": (0, None, False, False),
    "data.workers": (0, 256, False, False),
    "depth": (None, 100000, False, False),
    "device_batch_size": (1, None, False, False),
    "devices": (1, 100000, False, False),
    "drops": (0, 1, False, False),
    "eval_batch_size": (1, 1000000, False, False),
    "eval_every": (1, None, False, False),
    "images": (2, None, False, False),
    "iterations": (1, 1000000000, False, False),
    "keep_every": (0, None, False, False),
    "log_every": (1, None, False, False),
    "lr": (0, None, True, False),
    "max_restarts": (0, 1000, False, False),
    "max_size": (32, 8192, False, False),
    "mean": (0, 1, False, False),
    "min_size": (32, 4096, False, False),
    "momentum": (0, 1, False, True),
    "precise_bn": (0, 1000000, False, False),
    "proposals": (1, 10000, False, False),
    "quality": (1, 100, False, False),
    "regions": (2, 10000, False, False),
    "rounds": (1, 1000, False, False),
    "schedule.drops": (0, 1, False, False),
    "schedule.factor": (0, 1, True, False),
    "schedule.lr": (0, None, True, False),
    "schedule.patience": (0, 1, True, False),
    "schedule.threshold": (0, 100, False, False),
    "scales": (32, 4096, False, False),
    "score": (0, 1, False, False),
    "seconds": (0, 3600, True, False),
    "seed": (0, 2**63 - 1, False, False),
    "shard_images": (1, 100000, False, False),
    "shorter_side": (8, 4096, False, False),
    "std": (0, 10, True, False),
    "steps": (2, 1000000000, False, False),
    "timeout": (1, 1000000, False, False),
    "warmup": (0, 1000000000, False, False),
    "warmup.depth": (0, None, False, False),
    "warmup.error": (0, 100, False, False),
    "warmup.iterations": (0, 1000000000, False, False),
    "warmup.lr": (0, None, True, False),
    "weight_decay": (0, None, False, False),
    "workers": (0, 256, False, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_ranges_are_these(kind):
    """Written out, for every other test reads a bound where the program has it."""
    for key, found in marked(Range, kind).items():
        assert (found.low, found.high, found.above, found.below) == RANGES[key], key


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_a_range(kind):
    assert keys_taking({int, float, list[int], list[float]}, kind) == marked(Range, kind).keys()


def test_every_text_and_every_list_is_known():
    """For these values Hydra's grammar is kept off, and a list is advised."""
    modules = (commands, detection, images, localization)
    assert {kind for module in modules for name, kind in vars(module).items() if name.endswith("Config")} == set(KINDS)
    assert {"run_dir", "data.root", "data.classes", "checkpoint", "classes", "resume"} < TEXTS
    assert {"schedule.drops", "augment.area", "anchors", "mean"} < LISTS
    assert not TEXTS & LISTS


def test_a_configuration_survives_json():
    found = checked("schedule=plateau", "weight_decay=1", "warmup.error=70")
    assert config_from_checkpoint(json.loads(json.dumps(found.plain()))) == found


@pytest.mark.parametrize("key", ["seed", "normalise", "augment.area", "warmup.iterations", "data.broken"])
def test_a_configuration_of_another_version_is_named(key):
    plain = checked().plain()
    *group, name = key.split(".")
    del functools.reduce(dict.__getitem__, group, plain)[name]
    with pytest.raises(UserError, match=rf"stored configuration.* {key}: is missing$"):
        config_from_checkpoint(plain)


# --- Wrong values are named ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "near"),
    [
        *[(21, 20), (24, 26), (3, 8), (0, 8), (-5, 8), (9, 8), (12, 14), (100, 98), (109, 110), (1201, 1202)],
        *[(1203, 1202), (1208, 1202), (99_998, 1202)],
    ],
)
def test_nearest_depth_for_cifar(depth, near):
    message = refusal(f"depth={depth}")
    assert message.startswith(f"depth={depth}: ")
    assert message.endswith(f"nearest: {near}")


@pytest.mark.parametrize(("depth", "near"), [(35, 34), (100, 101), (20, 18), (0, 18), (44, 50), (110, 101), (999, 152)])
def test_nearest_depth_for_imagenet(depth, near, tmp_path):
    message = refusal(*needs_root("imagenet", tmp_path), f"depth={depth}")
    assert message == f"depth={depth}: ImageNet nets have 18, 34, 50, 101, 152 layers; nearest: {near}"


@pytest.mark.parametrize("depth", [d for d in range(8, 1203, 6) if d % 36 == 8] + [1202])
def test_every_depth_of_6n_plus_2_is_taken(depth):
    check_depth(depth, "cifar")


@pytest.mark.parametrize(
    ("family", "depth", "near"), [("cifar", 99_998, 1202), ("cifar", 21, 20), ("imagenet", 20, 18)]
)
def test_nor_is_such_a_depth_taken_from_a_checkpoint(family, depth, near):
    """A line of text in a small file must not ask for memory without bounds."""
    plain = checked().plain() | {"depth": depth}
    plain["data"]["family"] = family
    with pytest.raises(UserError, match=rf"stored configuration.*depth={depth}: .*nearest: {near}"):
        config_from_checkpoint(plain)


# Command line, and what the message must hold beside the key and value of the last word.
WRONG = [
    ("depth=20.5", "whole number"),
    ("depth=abc", "whole number"),
    ("depth=true", "whole number"),
    ("depth=null", "whole number"),
    ("depth=", "whole number"),
    ("depth=[20]", "whole number"),
    ("depth=nan", "whole number"),
    ("depth=9999999999999999999", "at most"),
    ("++depth=x", "whole number"),
    ("shortcut=D", "A, B, C"),
    ("shortcut=a", "did you mean A?"),
    ("shortcut=noen", "did you mean none?"),
    ("shortcut=none", "arch=plain"),
    ("arch=plain shortcut=A", "arch=resnet"),
    ("arch=plane", "did you mean plain?"),
    ("arch=vgg", "resnet, plain"),
    ("seed=-1", "at least 0"),
    ("seed=99999999999999999999", "at most 9223372036854775807"),
    ("seed=0.5", "whole number"),
    ("seed=1e400", "whole number"),
    ("device=cpu precision=fp16", "bf16 or fp32"),
    ("devices=0", "at least 1"),
    ("devices=1.5", "whole number"),
    ("devices=many", "whole number or auto"),
    ("devices=atuo", "did you mean auto?"),
    ("devices=3 batch_size=128", "does not divide by 3 devices; nearest: 129"),
    ("devices=200 batch_size=128", "nearest: 200"),
    ("device_batch_size=48", "nearest: 32"),
    ("devices=2 device_batch_size=60", "the 64 images of a device; nearest: 64"),
    ("bn_images=48", "nearest: 32"),
    ("bn_images=256", "the 128 images that a device takes at once; nearest: 128"),
    ("devices=2 bn_images=128", "nearest: 64"),
    ("device_batch_size=16 bn_images=32", "nearest: 16"),
    ("bn_images=1", "at least 2"),
    ("bn_images=some", "whole number or device or all"),
    ("device_batch_size=64 bn_images=all", "remove device_batch_size="),
    ("activation_checkpointing=true bn_images=all", "would count recomputed statistics twice"),
    ("compile=true bn_images=all", "add compile=false"),
    ("max_restarts=-1", "at least 0"),
    ("timeout=0", "at least 1"),
    ("gpus=8", "did you mean devices?"),
    ("precision=fp8", "auto, bf16, fp16, fp32, fp64"),
    ("precision=bf61", "did you mean bf16?"),
    ("precision=bfloat16", "did you mean bf16?"),
    ("device=tpu", "auto, cpu, cuda"),
    ("device=gpu", "did you mean cuda?"),
    ("device=cuda:0", "did you mean cuda?"),
    ("iterations=0", "at least 1"),
    ("iterations=-5", "at least 1"),
    ("iterations=64k", "whole number"),
    ("iterations=inf", "whole number"),
    ("batch_size=0", "at least 1"),
    ("batch_size=-1", "at least 1"),
    ("batch_size=1.5", "whole number"),
    ("batch_size=abc", "whole number"),
    ("batch_size=true", "whole number"),
    ("batch_size=99999999999999999999", "at most"),
    ("eval_batch_size=0", "at least 1"),
    ("checkpoint_every=0", "at least 1"),
    ("keep_every=-1", "at least 0"),
    ("log_every=0", "at least 1"),
    ("eval_every=0", "at least 1"),
    ("momentum=1", "below 1"),
    ("momentum=-0.1", "at least 0"),
    ("momentum=0 nesterov=true", "momentum=0.9"),
    ("nesterov=1", "true or false"),
    ("nesterov=yes", "true or false"),
    ("weight_decay=-1", "at least 0"),
    ("weight_decay=nan", "a number"),
    ("decay=wieghts", "did you mean weights?"),
    ("init=fan", "fan_out, fan_in"),
    ("zero_gamma=2", "true or false"),
    ("arch=plain zero_gamma=true", "arch=resnet"),
    ("bottleneck_stride=2x2", "1x1, 3x3"),
    ("compile=perhaps", "must be true, false or auto"),
    ("schedule.lr=0", "above 0"),
    ("schedule.lr=-1", "above 0"),
    ("schedule.lr=nan", "a number"),
    ("schedule.lr=inf", "a number"),
    ("schedule.lr=true", "a number"),
    ("schedule.lr=fast", "a number"),
    ("schedule.factor=0", "above 0"),
    ("schedule.factor=2", "at most 1"),
    ("schedule.drops=0.5", "a list"),
    ("schedule.drops=null", "a list"),
    ("schedule.drops=[a]", "a number"),
    ("schedule.drops=[32000]", "at most 1"),
    ("schedule.drops=[0.75,0.5]", "must rise"),
    ("schedule.drops=[0.5,0.5]", "must rise"),
    ("schedule=plateau schedule.patience=0", "above 0"),
    ("schedule=plateau schedule.threshold=-1", "at least 0"),
    ("schedule=plateau schedule.watch=val", "data.validation=5000"),
    ("data=digits schedule=plateau schedule.watch=val", "data.validation=143"),
    ("batch_size=7 bn_images=2", "nearest: 7"),
    ("data=digits batch_size=1 bn_images=2", "the 1 images that a device takes at once; nearest: device"),
    ("batch_size=64 device_batch_size=1 bn_images=2", "the 1 images that a device takes at once; nearest: device"),
    ("bn_images=32 device_batch_size=17", "nearest: 32"),
    ("devices=66667 batch_size=1000000", "nearest: 933338"),
    ("resume=true", "auto, never or a checkpoint's file"),
    ("resume=null", "auto, never or a checkpoint's file"),
    ("schedule=plateau schedule.watch=test", "train, val"),
    ("schedule.name=stpe", "did you mean step?"),
    ("warmup.depth=x", "whole number"),
    ("warmup.lr=0", "above 0"),
    ("warmup.error=101", "at most 100"),
    ("warmup=0", "warmup.KEY=VALUE"),
    ("augment.pad=-1", "at least 0"),
    ("augment.pad=17", "at most 16"),
    ("augment.flip=2", "true or false"),
    ("augment.shorter_side=5", "such as [256,480]"),
    ("augment.colour_noise=-1", "at least 0"),
    ("data.validation=-1", "at least 0"),
    ("data.validation=0.1", "whole number"),
    ("data.validation=50000", "50000 images"),
    ("data=digits data.validation=1437", "1437 images"),
    ("data.size=64", "data=imagefolder"),
    ("data.size=7", "at least 8"),
    ("data.workers=-1", "at least 0"),
    ("data.family=imagent", "did you mean imagenet?"),
    ("data.family=imagenet", "not for data=cifar10"),
    ("data=digits data.family=imagenet", "not for data=digits"),
    ("data=imagenet data.family=cifar", "keeps images in memory, as data=imagefolder does"),
    ("data.name=cifar11", "did you mean cifar10?"),
    ("data.root=", "word"),
    ("data.root=nosuch", "no such file or folder"),
    ("data=digits data.root=.", "remove it"),
    ("run_dir=", "word"),
    ("resume=", "auto, never or a checkpoint's file"),
    ("data.root=" + 300 * "x", "too long"),
    ("run_dir=" + 300 * "x", "too long"),
    ("resume=" + 300 * "x", "too long"),
]


@pytest.mark.parametrize(("line", "advice"), WRONG, ids=[line[:40] for line, _ in WRONG])
def test_a_wrong_value_is_named_with_what_is_allowed(line, advice):
    message = refusal(*line.split())
    key, value = line.split()[-1].lstrip("+").split("=")
    first = value[:50].strip("[]").split(",")[0].replace("1e400", "inf")  # a list is shown whole or by its wrong item
    assert message.startswith((f"{key}={first}", f"{key}=[{first}"))
    assert advice in message
    assert "\n" not in message
    assert len(message) < 200


ADVICE = re.compile(r"(?:nearest: |\b(?:take|add) ([\w.]+)=)([\w.]+)\b(?!,| or)")


@pytest.mark.parametrize("line", [line for line, _ in WRONG])
def test_advice_is_taken_when_it_is_followed(line):
    """No message names a value that would be refused in its turn."""
    words = line.split()
    found = ADVICE.search(refusal(*words))
    if found is None:
        return
    key = found[1] or words[-1].partition("=")[0]
    if key == "data":  # which needs a place, too
        return
    checked(*(word for word in words if not word.startswith(f"{key}=")), f"{key}={found[2]}")


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("dept=20", "did you mean depth?"),
        ("schedule.lrr=1", "did you mean schedule.lr?"),
        ("root=x", "did you mean data.root?"),
        ("lr=0.1", "did you mean schedule.lr?"),
        ("DEPTH=20", "did you mean depth?"),
        ("epochs=164", "did you mean iterations?"),
        ("data=CIFAR10", "did you mean cifar10?"),
        ("+data=digits", "remove the +"),
        ("batchsize=8", "did you mean batch_size?"),
        ("warmup.dpeth=1", "did you mean warmup.depth?"),
        ("depth.x=1", "no key depth.x"),
        ("data=cifar11", "did you mean cifar10?"),
        ("data=", "cifar10, cifar100, digits, imagefolder, imagenet"),
        ("data=null", "cifar10, cifar100, digits, imagefolder, imagenet"),
        ("schedule=cos", "did you mean cosine?"),
        ("schedule=cosine schedule.drops=[0.5]", "schedule=cosine has no drops; there is one with schedule=step or"),
        ("schedule=plateau schedule.drops=[0.5]", "schedule=plateau has no drops"),
        ("recipe.iterations=5", "no key recipe.iterations"),
        ("recipe=torch", "cifar10, cifar100, digits, imagefolder, imagenet, torch2016, torchvision"),
        ("~nosuch", "no key nosuch"),
        ("schedule.l=1", "there is no key schedule.l; schedule has name, lr, factor, drops"),
        ("data=photos", "a folder of your own is data=imagefolder data.root=photos"),
        ("data=some/photos", "a folder of your own is data=imagefolder data.root=some/photos"),
        ("data=svhn", "a folder of your own is data=imagefolder data.root=svhn"),
        ("data.name=svhn", "a folder of your own is data=imagefolder data.root=svhn"),
    ],
)
def test_a_key_or_option_that_does_not_exist_is_named(line, advice):
    message = refusal(*line.split())
    assert message.startswith(f"{line.split()[-1]}: ")
    assert advice in message


@pytest.mark.parametrize(
    "key", ["optimizer", "augment.mixup", "augment.cutmix", "ema", "amp", "dropout", "label_smoothing", "num_classes"]
)
def test_nothing_is_suggested_where_nothing_is_near(key):
    others = "; augment has pad, flip, shorter_side, area, colour_jitter, colour_noise" if "." in key else ""
    assert refusal(f"{key}=1") == f"{key}=1: there is no key {key}{others}"


def test_a_folder_is_no_data_set_however_like_one_it_is_called(tmp_path):
    (tmp_path / "imagenett").mkdir()
    assert refusal("data=imagenett").endswith("; a folder of your own is data=imagefolder data.root=imagenett")
    assert refusal("data=imagenet1").endswith("; did you mean imagenet?")


@pytest.mark.parametrize(
    ("word", "near"),
    [
        *[("augmnt.flip", "augment.flip"), ("flp", "augment.flip"), ("eval_batch", "eval_batch_size")],
        *[("val", "validation"), ("noen", "none"), ("schedule.lrr", "schedule.lr"), ("timer", None), ("", None)],
        *[("noen", "none"), ("nnoe", "none"), ("x" * 100_000, None), ("train.lr", None), ("schedule.l", None)],
    ],
)
def test_what_is_near(word, near):
    allowed = ["augment.flip", "eval_batch_size", "validation", "none", "timeout", "schedule.lr", "schedule.name"]
    assert nearest(word, allowed) == (f"; did you mean {near}?" if near else "")


@pytest.mark.parametrize(("line", "key"), [("+nosuch=1", "nosuch"), ("++dept=1", "dept"), ("~depth", "~depth")])
def test_what_is_added_or_taken_away_is_named(line, key):
    assert refusal(line).startswith(f"{key}: ")


@pytest.mark.parametrize("value", ["${depth}", "${nosuch}", "${oc.env:NO_SUCH_NAME}"])
def test_an_interpolation_that_fails_names_its_key(value):
    assert refusal(f"depth={value}").startswith(f"depth={value}: ")


@pytest.mark.parametrize("line", ["+schedule.patience=0.5", "schedule.name=cosine", "schedule.name=plateau"])
def test_a_schedule_has_its_own_keys_only(line):
    """A key that its kind does not read is refused, not left unread."""
    assert refusal(line).startswith("schedule.")


@pytest.mark.parametrize("key", ["data.root", "run_dir", "resume"])
def test_the_home_of_nobody_is_named(key):
    with pytest.raises(UserError, match=f"^{key}=~nosuchuser/x: "):
        checked(f'{key}="~nosuchuser/x"')


def test_imagenet_sizes_are_multiples_of_32(tmp_path):
    root = needs_root("imagenet", tmp_path)
    assert "data.size=100" in refusal(*root, "data.size=100")
    assert "such as 96" in refusal(*root, "data.size=100")
    assert checked(*root, "data.size=192").data.size == 192


@pytest.mark.parametrize(
    ("line", "key", "nearest"),
    [
        ("batch_size=1", "batch_size=1", 2),
        ("batch_size=2 devices=2", "batch_size=2", 4),
        ("batch_size=8 device_batch_size=1", "device_batch_size=1", 2),
    ],
)
def test_a_batch_norm_over_one_value_is_refused(line, key, nearest, tmp_path):
    """Where the last maps are of 1x1 and one image at a time is on a device; of larger maps it is many values."""
    root = needs_root("imagenet", tmp_path)
    message = refusal(*root, "data.size=32", *line.split())
    assert message.startswith(f"{key}: batch norm needs two images at a time on a device where data.size=32 ")
    assert message.endswith(f"; nearest: {nearest}")
    assert checked(*root, "data.size=64", *line.split()).data.size == 64
    checked(*root, "data.size=32", *line.replace(key, f"{key.split('=')[0]}={nearest}").split())


def test_imagenet_crops_fit_into_the_shorter_side(tmp_path):
    base = needs_root("imagenet", tmp_path)
    for sides in ([200, 300], [300, 256], [256], [256, 300, 480]):
        message = refusal(*base, f"augment.shorter_side={str(sides).replace(' ', '')}")
        assert message.startswith(f"augment.shorter_side={sides}: ")
        assert "LOW,HIGH" in message
        assert "224" in message


@pytest.mark.parametrize("data", ["imagenet", "imagefolder"])
def test_a_tree_needs_its_place(data):
    assert refusal(f"data={data}").startswith("data.root: ")


def test_a_plain_net_has_no_shortcut():
    assert checked("arch=plain").shortcut == "none"
    assert checked("arch=plain", "shortcut=none").net == "plain-20"
    assert checked("shortcut=B").net == "resnet-20-B"


# --- Folders that a listing shows to be wrong ------------------------------------------------------------------------


def remove(path):
    return lambda root: (root / path).unlink()


def only_one_class(root):
    for part in ("train", "test"):
        (root / part / "dog" / "0.png").unlink()
        (root / part / "dog").rmdir()


def not_an_image(root):
    (root / "train" / "dog" / "0.png").rename(root / "train" / "dog" / "0.txt")


def a_class_of_training_alone(root):
    (root / "train" / "emu").mkdir()
    (root / "train" / "emu" / "0.png").touch()


def a_class_misspelt(root):
    (root / "test" / "dog").rename(root / "test" / "dgo")


def a_class_of_the_test_alone(root):
    (root / "test" / "emu").mkdir()
    (root / "test" / "emu" / "0.png").touch()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove("test/cat/0.png"), "test/cat/ has no images"),
        (not_an_image, "train/dog/ has no images"),
        (only_one_class, "has one class, cat"),
        (a_class_of_training_alone, "class emu is in train/ and not in test/"),
        (a_class_of_the_test_alone, "class emu is in test/ and not in train/"),
        (a_class_misspelt, "class dog is in train/ and not in test/; did you mean dgo?"),
        (lambda root: (root / "train").rename(root / "trian"), "has test/ and no train/, which is needed"),
        (lambda root: (root / "train").rename(root / "trian"), "; trian/ is not one: name it train/ if it is meant"),
        (lambda root: (root / "test").rename(root / "tset"), "; tset/ is not one: name it test/ if it is meant"),
        (lambda root: (root / "test").rename(root / "Testing"), "; Testing/ is not one: name it test/ if it is meant"),
        (lambda root: (root / "test").rename(root / "validation"), "; validation/ is not one: name it val/ if"),
    ],
)
def test_a_damaged_tree_is_named(damage, expected, tmp_path):
    root = tree(tmp_path / "images")
    assert checked("data=imagefolder", f"data.root={root}").data.root == str(root)
    damage(root)
    message = refusal("data=imagefolder", f"data.root={root}")
    assert message.startswith(f"data.root={root}: ")
    assert expected in message


def test_an_empty_folder_and_a_file_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert "empty" in refusal("data=imagefolder", "data.root=empty")
    assert "is a file" in refusal("data=imagefolder", "data.root=file")


def test_val_will_do_for_test_where_test_has_no_classes(tmp_path):
    """ImageNet's test/ is flat."""
    root = tree(tmp_path / "images", test="val")
    (root / "test").mkdir()
    (root / "test" / "0.png").touch()
    assert class_folders(root) == (["cat", "dog"], "val")


def test_a_part_of_a_set_is_not_taken_for_an_undivided_one(tmp_path):
    root = tree(tmp_path / "images")
    assert refusal("data=imagefolder", f"data.root={root}/train") == (
        f"data.root={root}/train: is a part of a set, with test/ beside it; name {root}"
    )
    shutil.rmtree(root / "test")
    (root / "test").mkdir()
    (root / "test" / "0.png").touch()  # without classes
    assert "is a part of a set" not in refusal("data=imagefolder", f"data.root={root}/train")


# --- Where a run goes ------------------------------------------------------------------------------------------------


def test_the_directory_of_the_papers_experiment():
    assert str(directory("depth=110", "data=cifar10")) == "runs/cifar10/resnet-110-A/seed-0"
    assert str(directory("arch=plain", "depth=56", "seed=3")) == "runs/cifar10/plain-56/seed-3"
    assert str(directory("iterations=6400")) == "runs/cifar10/resnet-20-A/iterations-6400+seed-0"


def test_long_names_are_cut_and_tell_seeds_and_values_apart():
    asked = [
        "data.validation=500",
        "schedule.lr=0.0123456789",
        "augment.pad=3",
        "batch_size=96",
        "weight_decay=0.000123",
    ]
    names = [directory(*asked, *more).name for more in (["seed=0"], ["seed=1"], ["seed=1", "momentum=0.8"])]
    assert [name.rpartition("+")[2] for name in names] == ["seed-0", "seed-1", "seed-1"]
    assert [len(name) for name in names] == 3 * [100]
    assert names[0].removesuffix("+seed-0") == names[1].removesuffix("+seed-1")
    assert names[1] != names[2]


def test_the_order_of_the_command_line_does_not_matter():
    asked = ["iterations=640", "depth=32", "schedule.lr=0.05", "schedule=cosine", "data.validation=5000", "seed=2"]
    assert directory(*asked) == directory(*asked[::-1]) == directory(*asked)


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["iterations=64_00"], ["iterations=6400"]),
        (["++iterations=6400"], ["iterations=6400"]),
        (["iterations=7", "iterations=6400"], ["iterations=6400"]),
        (["compile=False"], ["compile=false"]),  # Hydra writes it so in a sweep
        (["schedule.drops=[0.4, 0.6]"], ["schedule.drops=[0.4,0.6]"]),
    ],
)
def test_the_spelling_does_not_matter(words, same):
    assert checked(*words) == checked(*same)
    assert directory(*words) == directory(*same)


def test_long_lists_tell_runs_apart():
    drops = [f"{place / 100:.2f}" for place in range(40)]
    assert directory(f"schedule.drops=[{','.join(drops[:-1])}]") != directory(f"schedule.drops=[{','.join(drops)}]")


def test_hydras_own_words_do_not_move_a_run():
    words = ["hydra.verbose=true", "++hydra.verbose=true"]
    assert prepare(cli.COMMANDS["train"], compose("train", words), words, False)[1] == directory()


def test_the_last_of_two_words_counts():
    assert directory("iterations=6", "iterations=7") != directory("iterations=7", "iterations=6")


UNNAMED = ("compile", "log_every", "eval_every")


@pytest.mark.parametrize("key", [key for key in OTHER | PLATEAU | PHOTOS if key not in UNNAMED])
def test_another_value_is_another_directory(key, tmp_path):
    base = base_of(key, tmp_path)
    asked = [base] + [[*base, f"{key}={value}"] for value in (OTHER | PLATEAU | PHOTOS)[key]]
    found = [directory(*words) for words in asked]
    assert len(set(found)) == len(found) >= 2


def test_free_keys_do_not_move_a_run():
    free = [f"{key}={value}" for key, value in FREE.items() if value and key != "run_dir"]
    assert directory(*free) == directory()
    assert directory(*(f"{key}={OTHER[key][0]}" for key in UNNAMED)) == directory()
    assert directory("schedule=plateau", "log_every=10") != directory("schedule=plateau")


def test_one_file_of_weights_is_one_run_however_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    names = ("w.pth", "./w.pth", f"{tmp_path}/w.pth", f"../{tmp_path.name}/w.pth", "link/w.pth")
    assert len({directory(f"init_from={name}") for name in names}) == 1
    (tmp_path / "net.safetensors").symlink_to("blob")  # its name says of which format it is, and what lies beside it
    assert checked("init_from=net.safetensors").init_from == str(tmp_path / "net.safetensors")


def test_a_file_that_is_begun_with_is_named_without_its_folders(tmp_path):
    found = [directory(f"init_from=/{folder}/resnet18.pth").name for folder in ("a/b/c", "a/b/d")]
    assert found[0] != found[1]
    assert all(re.fullmatch(r"init_from-resnet18-[0-9a-f]{6}\+seed-0", name) for name in found)


def test_run_dir_is_taken_as_it_is(tmp_path):
    assert directory(f"run_dir={tmp_path}/x", "depth=32", "iterations=6") == tmp_path / "x"


@pytest.mark.parametrize(
    "asked",
    [
        [],
        ["schedule.drops=[0.5, 0.75]"],
        ["++warmup.depth=0", "schedule.lr=1e-3"],
        ["schedule=plateau", "schedule.threshold=0", "schedule.watch=train", "weight_decay=1e-3"],
    ],
    ids=len,
)
def test_a_directory_needs_no_quotes_on_a_later_command_line(asked):
    checkpoint = f"{directory(*asked)}/checkpoints/last.pt"
    assert compose("eval", [f"checkpoint={checkpoint}"])["checkpoint"] == checkpoint
    assert not set(checkpoint) & ODD


@pytest.mark.parametrize("name", ["my pictures", "50% (a, b)", "größe", "图片", "a'b", "x=y", "[1]"])
def test_nor_does_one_named_after_a_folder_with_odd_characters(name, tmp_path):
    root = tree(tmp_path / name)
    found = check_train(once() | {"data": once("data=imagefolder")["data"] | {"root": str(root)}})
    assert found.data_label == name
    assert not set(str(run_directory(found, []))) & ODD
    assert run_directory(found, []).parts[-2:] == ("resnet-20-A", "seed-0")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        *[("größe", "größe"), ("图片", "图片"), ("हिन्दी", "हिन्दी"), ("e\u0301", "é"), ("Ελλάδα 2", "Ελλάδα-2")],
        *[("a\u202eb", "a-b"), ("a\x1b[2Jb", "a-2Jb"), ("a--b, (c)", "a--b-c"), ("$$", ""), ("50% ö", "50-ö")],
    ],
)
def test_letters_of_any_language_stay_in_the_name_of_a_folder(text, word):
    assert plain_word(text) == word


def test_a_folder_of_other_letters_is_another_run(tmp_path):
    names = ("größe", "图片", "图像", "gr e")
    found = [directory("data=imagefolder", f'data.root="{tree(tmp_path / name)}"') for name in names]
    assert [place.parts[1] for place in found] == ["größe", "图片", "图像", "gr-e"]


def test_a_name_of_long_letters_is_as_short_as_a_file_system_asks():
    found = [directory(f'init_from="/{50 * "图片/"}{number}.pt"') for number in range(2)]
    assert found[0] != found[1]
    assert all(len(os.fsencode(part)) <= 255 for place in found for part in place.parts)
    assert all(os.fsencode(place).decode() == str(place) for place in found)


def many(**changed):
    """40 words."""
    values = {key: value[0] for key, value in OTHER.items()} | {"momentum": "0.5"}
    words = [f"{key}={value}" for key, value in (values | changed).items()]
    return words + [f"++{word}" for word in words[: 40 - len(words)]]


def test_forty_words_are_a_short_name_and_still_tell_runs_apart():
    found = directory(*many())
    assert len(many()) == 40
    assert all(len(part) <= 100 for part in found.parts)
    assert found == directory(*many()[::-1])
    assert found != directory(*many(zero_gamma="false"))
    assert found != directory(*many(**{"warmup.error": "71"}))


def test_a_tree_of_images_goes_by_its_folders_name(tmp_path):
    root = tree(tmp_path / "cifar10_photos")
    for data in ("cifar10", "imagefolder"):
        found = checked(f"data={data}", f"data.root={root}")
        assert found.data_label == "cifar10_photos"
        assert directory(f"data={data}", f"data.root={root}").parts[:2] == ("runs", "cifar10_photos")


@pytest.mark.parametrize("data", ["cifar10", "imagefolder"])
@pytest.mark.parametrize("suffix", ["", "/", "/.", "/train/.."])
def test_a_tree_of_images_is_never_called_cifar10(data, suffix, tmp_path):
    root = tree(tmp_path / "cifar10")
    assert checked(f"data={data}", f"data.root={root}{suffix}").data_label == "cifar10-folder"


def test_a_tree_of_images_is_not_called_digits(tmp_path):
    """data=digits is, and runs/digits is its folder."""
    root = tree(tmp_path / "digits")
    assert checked("data=imagefolder", f"data.root={root}").data_label == "digits-folder"


@pytest.mark.parametrize("place", ["", "cifar-10-batches-py", "archive.tar.gz"])
def test_the_official_files_are_cifar10_wherever_they_lie(place, tmp_path):
    batches = tmp_path / "x" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    (batches / "data_batch_1").touch()
    (tmp_path / "x" / "archive.tar.gz").touch()
    assert checked(f"data.root={tmp_path / 'x' / place}").data_label == "cifar10"


def test_the_root_is_kept_absolute(tmp_path):
    tree(tmp_path / "images")
    assert checked("data=imagefolder", "data.root=images").data.root == str(tmp_path / "images")


# --- A directory that cannot take the run ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", OTHER | PLATEAU | PHOTOS)
def test_a_run_does_not_go_on_with_another_value(key, tmp_path):
    base = base_of(key, tmp_path)
    changed = checked(*base, f"{key}={(OTHER | PLATEAU | PHOTOS)[key][0]}")
    with pytest.raises(UserError, match="here") as caught:
        check_same_run(checked(*base).plain(), changed, "here")
    assert str(caught.value).startswith(f"{key}=")


def test_what_enters_no_mathematics_may_change():
    found = checked(*(f"{key}={value}" for key, value in FREE.items() if value))
    found = dataclasses.replace(
        found, data=dataclasses.replace(found.data, root="/elsewhere", workers=7, broken="skip")
    )
    old, new = flat(checked().plain()), flat(found.plain())
    assert {key for key in old if old[key] != new[key]} == FREE.keys()
    check_same_run(checked().plain(), found, "here")


@pytest.mark.parametrize("command", ["train", "detect"])
def test_every_other_key_enters_the_mathematics(command):
    values = compose("detect", [])
    values["data"]["train"] = as_list(values["data"]["train"])
    found = checked() if command == "train" else from_dict(DetectConfig, values)
    refused = set()
    for key in flat(found.plain()):
        old = found.plain()
        *groups, name = key.split(".")
        functools.reduce(dict.__getitem__, groups, old)[name] = "another"
        try:
            check_same_run(old, found, "here")
        except UserError as error:
            refused.add(str(error).split("=")[0])
    assert refused == flat(found.plain()).keys() - FREE.keys()


def run_in(folder, found, *, finished=False):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(found.plain()))
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


def blocked(folder, found):
    with pytest.raises(UserError) as caught:
        check_run_dir(folder, found)
    assert str(caught.value).splitlines() == [str(caught.value)]
    return str(caught.value)


def test_a_new_or_an_empty_directory_will_do(tmp_path):
    check_run_dir(tmp_path / "a" / "b", checked())
    (tmp_path / "empty").mkdir()
    check_run_dir(tmp_path / "empty", checked())
    assert os.listdir(tmp_path) == ["empty"]


def test_a_finished_run_is_not_run_again(tmp_path):
    folder = run_in(tmp_path / "run", checked(), finished=True)
    assert run_state(folder) == "finished"
    for resume in ("auto", "never"):
        message = blocked(folder, checked(f"resume={resume}"))
        assert f"run_dir={folder}: " in message
        assert "finished" in message


def test_another_seed_is_no_advice_where_the_folder_is_named(tmp_path):
    message = blocked(run_in(tmp_path / "run", checked(), finished=True), checked(f"run_dir={tmp_path}/run"))
    assert message.endswith("or use another run_dir=")
    assert blocked(run_in(tmp_path / "b", checked(), finished=True), checked()).endswith("another seed= or run_dir=")


def test_another_directory_is_no_advice_for_a_checkpoint_of_another_run():
    old, new = checked().plain(), checked("momentum=0.5")
    for otherwise in ("another run_dir=", "init_from= in place of resume="):
        with pytest.raises(UserError, match=re.escape(f"has momentum=0.9; use that, or {otherwise}") + "$"):
            check_same_run(old, new, "here", otherwise)


def test_a_sweep_skips_a_finished_run_of_the_same_configuration_only(tmp_path, monkeypatch):
    folder = run_in(tmp_path / "run", checked(), finished=True)
    (folder / "summary.json").write_text('{"digest": "0"}')
    monkeypatch.setitem(sweep.DIGESTS, json.dumps(checked().plain()["data"]), "0")  # as if they had been read
    words = [f"run_dir={folder}", "checkpoint_every=5"]
    assert prepare(cli.COMMANDS["train"], compose("train", words), words, True)[1] == folder
    words += ["iterations=5"]
    with pytest.raises(UserError, match=r"^iterations=5: "):
        prepare(cli.COMMANDS["train"], compose("train", words), words, True)


def test_an_unfinished_run_goes_on_with_the_same_values_only(tmp_path):
    folder = run_in(tmp_path / "run", checked())
    assert run_state(folder) == "unfinished"
    check_run_dir(folder, checked("checkpoint_every=3", "device=cpu"))
    message = blocked(folder, checked("schedule.lr=0.05"))
    assert message.startswith("schedule.lr=0.05: ")
    assert "schedule.lr=0.1" in message
    check_run_dir(folder, checked("schedule.lr=0.05", "resume=never"))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    assert blocked(tmp_path / "thesis", checked("resume=never")).startswith(f"run_dir={tmp_path}/thesis: ")


def test_a_file_and_what_lies_below_it_are_no_directory(tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/run", "file/a/b"):
        assert blocked(tmp_path / place, checked()).startswith(f"run_dir={tmp_path / place}: ")


def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("permission bits do not bind here")
    assert "write" in blocked(tmp_path / "locked" / "run", checked())


def test_a_damaged_run_is_named(tmp_path):
    folder = run_in(tmp_path / "run", checked())
    for text in ('{"depth": 2', "[]", ""):
        (folder / "config.json").write_text(text)
        assert blocked(folder, checked()).startswith(f"{folder}/config.json: ")


@pytest.mark.parametrize("resume", ["nver", "nosuch.pt", "always"])
def test_resume_takes_two_words_or_a_file(resume, tmp_path):
    message = blocked(tmp_path / "run", checked(f"resume={resume}"))
    assert message.startswith(f"resume={resume}: must be auto, never or a checkpoint's file")
    assert ("did you mean never?" in message) == (resume == "nver")
    (tmp_path / resume).touch()
    check_run_dir(tmp_path / "run", checked(f"resume={resume}"))


# --- resnet-eval -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "checkpoint: is needed"),
        ("checkpoint=nosuch.pt", "checkpoint=nosuch.pt: there is no such file"),
        ("checkpoint=", "checkpoint=: must be"),
        ("checkpoint=.", "is a folder"),
        ("checkpoint=[]", "checkpoint=[]: name at least one"),
        ("checkpoint=[last.pt,last.pt]", "checkpoint=last.pt: is named twice"),
        ("checkpoint=last.pt protocol=10-crop", "protocol=10-crop: allowed are center, tencrop, multiscale; did you"),
        ("checkpoint=last.pt precise_bn=-1", "precise_bn=-1: must be at least 0"),
        ("checkpoint=" + 300 * "x", "too long"),
        ("checkpoint=last.pt split=tst", "split=tst: allowed are test, val, train; did you mean test?"),
        ("checkpoint=last.pt split=validation", "split=validation: allowed are test, val, train; did you mean val?"),
        ("checkpoint=last.pt device=gpu", "device=gpu: allowed are auto, cpu, cuda"),
        ("checkpoint=last.pt data.name=cifar11", "did you mean cifar10?"),
        ("checkpoint=last.pt data.root=nosuch", "data.root=nosuch: there is no such file or folder"),
        ("checkpoint=last.pt out=", "out=: must be"),
        ("checkpoint=last.pt out=.", "out=.: is not a file"),
        ("checkpoint=last.pt out=last.pt/x", "out=last.pt/x: is not a file"),
        ("checkpoint=last.pt data.name=imagefolder", "data.root: data=imagefolder needs one"),
        (f"checkpoint={__file__}", "test_config.py: is cut short or not a checkpoint"),
        ("checkpoint=last.pt depth=20", "depth=20: there is no key depth"),
        ("chekpoint=last.pt", "did you mean checkpoint?"),
    ],
)
def test_a_wrong_word_for_eval_is_named(line, expected, tmp_path):
    zipfile.ZipFile(tmp_path / "last.pt", "w").close()  # what torch.save writes is a zip archive
    with pytest.raises(UserError) as caught:
        check_eval(compose("eval", line.split()))
    assert expected in str(caught.value)


def test_eval_takes_the_checkpoints_own_data_unless_told_otherwise(tmp_path):
    zipfile.ZipFile(tmp_path / "last.pt", "w").close()  # what torch.save writes is a zip archive
    found = check_eval(compose("eval", ["checkpoint=last.pt"]))
    assert (found.data.name, found.data.root, found.split, found.out) == ("same", None, "test", None)
    found = check_eval(compose("eval", ["checkpoint=last.pt", "data.root=."]))
    assert found.data.root == str(tmp_path)
