"""The report: means by hand, verdicts with reasons, nothing in a row that does not belong there, no source touched."""

import contextlib
import csv
import dataclasses
import hashlib
import html
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from resnet_train import cli, paper
from resnet_train.config.compose import compose
from resnet_train.config.options import CONFIG_DIR
from resnet_train.config.schema import flat, unread_keys
from resnet_train.config.train import Schedule, check_train
from resnet_train.engine.metrics import read_metrics
from resnet_train.errors import UserError
from resnet_train.report import curves, detection, figures, localization, page, runs, tables, values, verdict
from resnet_train.report import report as report_command
from resnet_train.report.complexity import complexity_table
from resnet_train.report.folders import name_weights, tell_apart

ROOT = Path(__file__).resolve().parent.parent
RESULTS = [place.parent for place in sorted((ROOT / "results").glob("*/runs"))]
CONFIG = check_train(compose("train", ["data=cifar10"]), needs_data=False).plain()


def make(folder, net="resnet-20-A", seed=0, test=10.0, train=5.0, data="cifar10", until=64_000, gain=0.01, **changes):
    """A run as a folder, made by hand: the training error is `train` in its last twentieth, `gain` more before."""
    arch, depth, *shortcut = net.split("-")
    changes = {"iterations": 64_000, "precision": "fp32", "bn_images": 64} | changes
    values = CONFIG | {"arch": arch, "depth": int(depth), "shortcut": (shortcut or ["none"])[0], "seed": seed} | changes
    length = values["iterations"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    lines = []
    for tick in range(1, 41):
        at = tick * length // 40
        point = {"iteration": at, "data": data, "seed": seed, "loss": 1.0}
        lines.append({**point, "split": "train", "error": train + (gain if tick <= 38 else 0), "protocol": "augmented"})
        if tick % 4 == 0:
            lines.append({**point, "split": "test", "error": test + (40 - tick), "protocol": "single view"})
    text = "".join(json.dumps(line) + "\n" for line in lines if line["iteration"] <= until)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def row(table, net):
    """The cells of a net's row by their header."""
    found = next(cells for cells in table.rows if cells[0] == net)
    return dict(zip(table.header, found, strict=True))


def found(*folders):
    """The runs in folders, without notes."""
    kept, _, notes = runs.find(folders)
    assert notes == []
    return kept


def digest(folder):
    """Of all files in a folder: names, bytes and times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files]


# --- Figures and means -----------------------------------------------------------------------------------------------


def test_mean_and_std_over_seeds_by_hand(tmp_path):
    for seed, error in enumerate([8.0, 9.0, 10.0]):
        make(tmp_path / str(seed), seed=seed, test=error, train=seed)
    table = tables.errors_table(found(tmp_path), "table 6", "")
    cells = row(table, "resnet-20-A")
    assert cells["ours, last (single view)"] == (9.0, 1.0, 3)
    assert cells["paper"] == 8.75
    assert cells["difference"] == 0.25
    assert cells["best seed"] == "8.00 (seed 0)"
    assert cells["training error at the end"] == (1.0, 1.0, 3)
    assert "| 9.00 ± 1.00 (n=3) | +0.25 |" in page.markdown_table(table)
    (line,) = csv.DictReader(table.csv().splitlines())
    assert [line["ours, last (single view)" + end] for end in ("", ": std", ": n")] == ["9.0", "1.0", "3"]
    assert not any("Not comparable" in note for note in table.notes)
    explained = (
        "best seed: for comparison, not as a result; single view: each test image once, as it is; training error"
    )
    assert any(explained in note for note in table.notes)


def test_110_layers_are_held_against_the_mean_of_the_papers_five(tmp_path):
    make(tmp_path / "a", "resnet-110-A", test=6.43)
    cells = row(tables.errors_table(found(tmp_path), "table 6", ""), "resnet-110-A")
    assert cells["difference"] == pytest.approx(6.43 - 6.61)
    assert cells["ours, last (single view)"] == (6.43, None, 1)
    assert cells["best seed"] is None  # of one


def test_best_is_chosen_by_the_validation_part_alone(tmp_path):
    folder = make(tmp_path / "a", test=10, data="cifar10")
    cells = row(tables.errors_table(found(folder), "table 6", ""), "resnet-20-A")
    assert "best, by validation error" not in cells
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in [line for line in lines if line["split"] == "test"]:
        # The lowest validation error is at 32,000 iterations, where the test error is neither lowest nor last.
        lines.append(line | {"split": "val", "error": 5 + abs(line["iteration"] - 32_000) / 1000})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cells = row(tables.errors_table(found(folder), "table 6", ""), "resnet-20-A")
    assert cells["best, by validation error"] == (30.0, None, 1)
    assert cells["ours, last (single view)"] == (10.0, None, 1)


def test_training_error_counts_each_batch_once():
    """Points of 100, 100 and 6 iterations: a short last one has a small say."""
    points = [(100, 90.0, None), (3800, 50.0, None), (3900, 20.0, None), (3906, 40.0, None)]
    assert runs.mean_error(points, 3800, 3906) == pytest.approx((100 * 20 + 6 * 40) / 106)
    assert math.isnan(runs.mean_error(points, 5000, 6000))


def test_unfinished_runs_stand_in_no_mean(tmp_path):
    make(tmp_path / "a", seed=0, test=8)
    make(tmp_path / "b", seed=1, test=8, until=40_000)
    table = tables.errors_table(found(tmp_path), "table 6", "")
    assert row(table, "resnet-20-A")["ours, last (single view)"] == (8.0, None, 1)
    assert any("seed 1: unfinished, at iteration 40,000 of 64,000" in note for note in table.notes)


def test_a_run_before_its_first_test_is_called_so(tmp_path, monkeypatch, capsys):
    make(tmp_path / "runs" / "a", "plain-20", until=4_000)
    make(tmp_path / "runs" / "b", "plain-56", until=4_000)
    text = report_of(tmp_path / "runs", monkeypatch)
    assert "plain-20, seed 0: unfinished, at iteration 3,200 of 64,000; not yet tested; in no mean" in text
    assert "plain-20, seed 0: not yet tested, unfinished (3,200 iterations)" in text
    assert "(figure-1.png)" in text
    assert "warning" not in "".join(capsys.readouterr())
    for file in ("report.md", "index.html"):
        assert "nan %" not in (tmp_path / "runs" / "out" / file).read_text()


def test_a_training_curve_that_was_lost_is_no_number(tmp_path, monkeypatch):
    folder = make(tmp_path / "runs" / "a", "plain-20")
    make(tmp_path / "runs" / "b", "plain-56")
    last = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[-1]
    (folder / "metrics.jsonl").write_text(last)  # the test at the end, as a run resumed after its last iteration has it
    text = report_of(tmp_path / "runs", monkeypatch)
    assert "(training error not recorded, test error +0.00 points)" in text
    none = tables.NOTHING
    assert f"| plain-20 | {none} | 10.00 (n=1) |" in text
    assert f"| plain-56 | 5.00 (n=1) | 10.00 (n=1) | plain-20 | {none} | {none} | +0.00 | {none} | no |" in text
    for file in ("report.md", "depth.csv", "table-6.csv"):
        assert not re.search(r"\bnan\b", (tmp_path / "runs" / "out" / file).read_text()), file


def test_a_net_before_its_first_test_is_named_by_its_training_curve(tmp_path):
    make(tmp_path / "a", "plain-20")
    make(tmp_path / "b", "plain-56", until=4_000)
    made = drawn(tmp_path)
    names = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in made["figure-6"][1]]
    assert names == [["plain-20", "plain-56, unfinished"]]
    assert [axes.get_legend() is None for axes in made["figure-1"][1]] == [False, False]


def test_half_a_line_at_the_end_is_a_run_that_is_being_written(tmp_path):
    folder = make(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 64100, "spl')
    (run,) = found(tmp_path)
    assert run.finished


def test_one_run_in_two_places_is_one_seed(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", until=32_000)
    kept, _, notes = runs.find([tmp_path])
    assert [run.folder.name for run in kept] == ["a"]
    top = tmp_path.name  # and not where that lies
    assert notes == [f"{top}/b: is the same run as {top}/a (resnet-20-A, seed 0), left out"]


# --- What folders are called -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ({"/x/a/seed-0": 1, "/x/a/seed-1": 1}, ["seed-0", "seed-1"]),
        ({"/x/a/seed-0": 1, "/x/b/seed-0": 1, "/x/c": 1}, ["a/seed-0", "b/seed-0", "c"]),
        ({"/x/a/r/seed-0": 2, "/x/b/r/seed-0": 2, "/x/b/r/seed-1": 2}, ["a/r/seed-0", "b/r/seed-0", "r/seed-1"]),
        ({"/x/r": 1, "/r": 1, "/y/x/r": 1}, ["/x/r", "/r", "y/x/r"]),
        ({"a/seed-0": 1, "seed-0": 1}, ["a/seed-0", "seed-0"]),
        ({"": 2, "/": 2}, ["", "/"]),
    ],
)
def test_a_name_has_as_much_of_a_path_as_tells_it_apart(paths, names):
    assert list(tell_apart({Path(path): count for path, count in paths.items()}).values()) == names


def test_folders_of_one_name_are_told_apart_wherever_they_are_shown(tmp_path, monkeypatch, capsys):
    """Runs, roots of runs, and an absolute folder beside a relative one."""
    for place in ("a", "b"):
        for name, seed in (("runs/seed-0", 0), ("seed-0", 1)):
            make(tmp_path / place / name, seed=seed + 2 * (place == "b"), batch_size=64 if place == "b" else 128)
    monkeypatch.chdir(tmp_path / "a")
    words = ["seed-0", str(tmp_path / "b/seed-0"), str(tmp_path / "a/runs"), str(tmp_path / "b/runs")]
    monkeypatch.setattr("sys.argv", ["resnet-report", *words, f"out={tmp_path}/out"])
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.report()
    names = ["a/runs/seed-0", "a/seed-0", "b/runs/seed-0", "b/seed-0"]  # by seed
    rows = list(csv.DictReader((tmp_path / "out/runs.csv").read_text().splitlines()))
    assert [row["folder"] for row in rows] == names
    text = (tmp_path / "out/report.md").read_text()
    assert "(a/runs/seed-0, … and b/runs/seed-0, …) are not in one row" in capsys.readouterr().out
    assert all(f"; {name}: `" in text for name in names)
    assert "Made by `resnet-report a/seed-0 b/seed-0 a/runs b/runs out=out`" in text


def test_a_folder_is_called_as_on_the_command_line_where_no_other_is(tmp_path, monkeypatch):
    for name in ("runs/a/seed-0", "runs/b/seed-0"):
        make(tmp_path / name, seed=len(name) + ord(name[5]))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    for folder, names in {
        ".": ["a/seed-0", "b/seed-0"],
        "../runs": ["runs/a/seed-0", "runs/b/seed-0"],
        tmp_path / "runs": ["runs/a/seed-0", "runs/b/seed-0"],
        tmp_path / "runs/a/seed-0": ["seed-0"],
    }.items():
        assert [run.display_path for run in found(Path(folder))] == names
    monkeypatch.chdir(tmp_path / "runs/a/seed-0")
    assert [run.display_path for run in found(Path())] == ["seed-0"]


def test_links_to_runs_are_followed_and_a_run_is_read_once(tmp_path):
    make(tmp_path / "runs/a", seed=0)
    make(tmp_path / "runs/b", seed=1)
    make(tmp_path / "big/net/c", seed=2)
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    for name, target in (("one", "runs/b"), ("again", "runs/b"), ("nets", "big"), ("round", "chosen")):
        (chosen / name).symlink_to(tmp_path / target)
    (tmp_path / "runs/a/up").symlink_to(tmp_path)
    assert sorted((run.seed, run.display_path.split("/")[-1]) for run in found(chosen)) == [(1, "again"), (2, "c")]
    assert sorted(run.seed for run in found(tmp_path / "runs", chosen)) == [0, 1, 2]
    (tmp_path / "big/again").symlink_to(tmp_path / "big/net/c")
    assert [run.display_path for run in found(tmp_path / "big")] == ["big/net/c"]


# --- What may stand together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data": "cifar10_jpeg"}, ("data", "cifar10", "cifar10_jpeg")),
        ({"iterations": 6400, "until": 6400}, ("iterations", "64000", "6400")),
        ({"batch_size": 256}, ("batch_size", "128", "256")),
        ({"precision": "bf16"}, ("precision", "fp32", "bf16")),
    ],
)
def test_other_data_or_recipe_is_another_row_and_the_report_says_why(tmp_path, changes, why):
    make(tmp_path / "a", seed=0)
    make(tmp_path / "b", seed=1)
    make(tmp_path / "c", seed=2, **changes)
    groups = runs.groups(found(tmp_path))
    assert [len(group) for group in groups] == [2, 1]
    assert runs.differences(*groups) == [why]


def test_other_images_in_a_folder_of_the_same_name_are_another_row(tmp_path):
    for seed, digest in enumerate(("a" * 64, "a" * 64, "b" * 64, "c" * 64)):
        for data in ("photos", "cifar10"):  # which is told by its images
            folder = make(tmp_path / data / str(seed), seed=seed, data=data)
            change(folder / "config.json", data__root=f"/d/{'mine' if seed < 2 else 'others'}/photos")
            (folder / "environment.json").write_text(json.dumps({"digest": digest}))
    assert [len(group) for group in runs.groups(found(tmp_path / "cifar10"))] == [4]
    groups = runs.groups(found(tmp_path / "photos"))
    assert [len(group) for group in groups] == [2, 1, 1]
    assert runs.differences(*groups[:2]) == [("images", "mine/photos", "others/photos")]
    assert runs.differences(groups[0], groups[2]) == [("images", "mine/photos", "others/photos (state 2)")]


def test_a_folder_read_as_small_pictures_and_as_photographs_is_not_called_changed(tmp_path):
    """Its digest is another, being of other sizes."""
    for family, digest in (("cifar", "a" * 64), ("imagenet", "b" * 64)):
        folder = make(tmp_path / family, data="photos")
        change(folder / "config.json", data__root="/d/photos", data__family=family)
        (folder / "environment.json").write_text(json.dumps({"digest": digest}))
    assert ["images" in run.setting for run in found(tmp_path)] == [False, False]


def test_other_images_in_a_folder_of_another_name_are_told_by_that(tmp_path):
    for data in ("cats", "dogs"):
        (make(tmp_path / data, data=data) / "environment.json").write_text(json.dumps({"digest": data[0] * 64}))
    assert runs.differences(*runs.groups(found(tmp_path))) == [("data", "cats", "dogs")]


def test_nets_of_both_families_in_one_folder_are_two_sections(tmp_path, command_here):
    """As a first try and then a fine-tuning on one's own photographs leave them."""
    for net, name in (("resnet-20-A", "small"), ("resnet-32-A", "smaller")):
        make(tmp_path / "runs" / name, net, data="photos", batch_size=64)
    photos(tmp_path / "runs/large", "resnet-18-B", 27.0)
    change(tmp_path / "runs/small" / "config.json", augment__pad=3)
    printed = command_here("report", "runs", "out=report")
    assert "they differ in data (imagenet and photos)" in printed
    report = (tmp_path / "report/report.md").read_text()
    assert "augment.pad=3" in report
    assert "and None)" not in printed


def test_another_split_or_protocol_is_another_row(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", seed=1, data="cifar10")
    held_out = json.loads((tmp_path / "b" / "config.json").read_text())
    held_out["data"]["validation"] = 5000
    (tmp_path / "b" / "config.json").write_text(json.dumps(held_out))
    make(tmp_path / "c", seed=2)
    text = (tmp_path / "c" / "metrics.jsonl").read_text().replace("single view", "10-crop")
    (tmp_path / "c" / "metrics.jsonl").write_text(text)
    groups = runs.groups(found(tmp_path))
    assert sorted(len(group) for group in groups) == [1, 1, 1]
    whole = next(group for group in groups if group[0].seed == 0)
    why = {group[0].seed: runs.differences(whole, group) for group in groups if group is not whole}
    assert why == {1: [("data.validation", "0", "5000")], 2: [("protocol", "single view", "10-crop")]}


def test_deviations_are_named_with_the_papers_value(tmp_path):
    (run,) = found(make(tmp_path / "a"))
    assert runs.deviations(run) == []
    (run,) = found(make(tmp_path / "b", data="cifar10_jpeg", iterations=6400, weight_decay=5e-4, until=6400))
    assert runs.deviations(run) == [("weight_decay", "0.0005", "0.0001")]  # other data have no length of the paper's
    for number, (dealt, images) in enumerate(
        [
            ({"devices": 1}, 128),
            ({"devices": 2}, 64),
            ({"devices": 4}, 32),
            ({"devices": 2, "device_batch_size": 16}, 16),
        ]
    ):
        (run,) = found(make(tmp_path / f"c{number}", bn_images="device", **dealt))
        assert runs.deviations(run) == ([] if images == 64 else [("bn_images", str(images), "64")])
    (run,) = found(make(tmp_path / "d", bn_images="all", devices=2))
    assert runs.deviations(run) == [("bn_images", "128", "64")]
    cosine = {"name": "cosine", "factor": 1.0, "drops": []}  # as a run stores what its schedule does not read
    (run,) = found(make(tmp_path / "e", schedule=CONFIG["schedule"] | cosine))
    assert runs.deviations(run) == [("schedule.name", "cosine", "step")]


def test_the_keys_of_a_schedule_are_those_that_it_reads():
    every = set(itertools.chain(*runs.SCHEDULE_KEYS.values()))
    assert runs.SCHEDULE_KEYS.keys() == set(typing.get_args(typing.get_type_hints(Schedule)["name"]))
    for name, keys in runs.SCHEDULE_KEYS.items():
        assert every - keys == {f"schedule.{key}" for key in unread_keys(Schedule, name)}


@pytest.mark.parametrize(("key", "value"), [("init_from", 5), ("init_from", ["x"]), ("precision", ["x"])])
def test_values_that_are_no_text_are_refused_in_one_line(key, value, tmp_path):
    make(tmp_path / "a", precision="auto")
    change(make(tmp_path / "b", seed=1) / "config.json", **{key: value})
    with pytest.raises(UserError, match=f"{tmp_path}/b: holds other things than a run"):
        runs.find([tmp_path])


def test_deviations_say_on_which_data_and_in_which_section(tmp_path):
    for data in ("cats", "dogs"):
        make(tmp_path / data, data=data, precision="bf16")
    for place in ("mine", "others"):  # images of one label
        (make(tmp_path / place, data="photos", precision="bf16") / "environment.json").write_text(
            json.dumps({"digest": place[0] * 64})
        )
        change(tmp_path / place / "config.json", data__root=f"/d/{place}/photos")
    for seed in range(2):
        make(tmp_path / f"seed-{seed}", seed=seed, data="photos", precision="bf16", batch_size=64)
    table = tables.deviations_table(runs.groups(found(tmp_path)))
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    places = [(row["section"], row["runs"], row["data"]) for row in rows if row["what"] == "precision"]
    assert places == [
        ("1", "all 2", "photos"),
        ("2", "resnet-20-A seed 0", "cats"),
        ("3", "resnet-20-A seed 0", "dogs"),
        ("4", "resnet-20-A seed 0", "photos, images of mine/photos"),
        ("5", "resnet-20-A seed 0", "photos, images of others/photos"),
    ]


def test_runs_from_other_weights_are_no_seeds_of_one_recipe(tmp_path):
    """From scratch, from a file, from a run's checkpoint, and with frozen stages: four rows, each with its reason."""
    weights = {"scratch": {}, "file": {"init_from": "/d/r18.pth"}, "run": {"init_from": "/d/a/checkpoints/last.pt"}}
    weights["frozen"] = {"init_from": "/d/r18.pth", "freeze": "layer2"}
    for seed, (place, changes) in enumerate(weights.items()):
        make(tmp_path / place, seed=0 if place == "file" else seed, data="photos", **changes)
    groups = runs.groups(found(tmp_path))
    assert [len(group) for group in groups] == [1] * 4
    rows = [
        dict(zip(("section", "runs", "data", "what", "here", "paper"), row, strict=True))
        for row in tables.deviations_table(groups).rows
    ]
    named = {(row["what"], row["here"], row["paper"]) for row in rows if row["what"] in ("init_from", "freeze")}
    assert named == {("init_from", "r18.pth", "null"), ("init_from", "a/last.pt", "null"), ("freeze", "layer2", "null")}


def test_weights_in_a_run_and_beside_its_checkpoints_are_two_recipes():
    assert len({*name_weights(["/a/run/checkpoints/last.pt", "/a/run/last.pt"]).values()}) == 2


def test_weights_of_one_name_in_two_places_are_two_recipes(tmp_path):
    for seed, place in enumerate("de"):
        make(tmp_path / place, seed=seed, data="photos", init_from=f"/{place}/r18.pth")
    groups = runs.groups(found(tmp_path))
    assert sorted(group[0].setting["init_from"] for group in groups) == ["d/r18.pth", "e/r18.pth"]


@pytest.mark.parametrize(("family", "data"), [("cifar", "cifar10"), ("imagenet", "imagenet")])
def test_the_papers_recipe_is_the_programs(family, data):
    """But for what the README calls a deviation of its own: precision, and the images of batch norm."""
    composed = flat(compose("train", [f"data={data}"]))
    schedule = {f"schedule.{key}": value for key, value in (("patience", 1.0), ("threshold", 0.0), ("watch", "train"))}
    composed = schedule | {"schedule.drops": []} | composed
    recipe = {key: value for key, value in paper.RECIPES[family].items() if key not in ("precision", "bn_images")}
    assert {key: composed[key] for key in recipe} == recipe


# --- Verdicts --------------------------------------------------------------------------------------------------------


def pair(folder, shallow, deep, kind="plain", **changes):
    """The comparison of runs of 20 and 56 layers with these (training, test) errors, one for each seed."""
    nets = (f"{kind}-20", f"{kind}-56") if kind == "plain" else (f"{kind}-20-A", f"{kind}-56-A")
    for net, errors in zip(nets, (shallow, deep), strict=True):
        for seed, (train, test) in enumerate(errors):
            make(folder / net / str(seed), net, seed, test, train, **changes)
    (group,) = runs.groups(runs.find([folder])[0])
    (one,) = verdict.comparisons(group)
    return one, next(cells for cells in verdict.table(group).formatted() if cells[0] == nets[1])[-1]


def seeds(train, test, count=3, step=0.1):
    """Errors of some seeds about these."""
    return [(train + step * number, test + step * number) for number in range(count)]


def test_three_seeds_show_a_difference_that_is_wider_than_its_spread(tmp_path):
    one, said = pair(tmp_path, seeds(5, 9), seeds(6, 10))
    assert (one.train.word, one.test.word, said) == ("worse", "worse", "yes, worse in both")
    assert one.train.points == pytest.approx(1.0)
    assert one.train.spread == pytest.approx(math.sqrt(2) * 0.1)  # the std of the difference of two runs


def test_a_better_deep_net_is_called_so(tmp_path):
    assert pair(tmp_path, seeds(5, 9), seeds(2, 7), "resnet")[1] == "yes, better in both"


@pytest.mark.parametrize(
    ("count", "more", "shown"), [(1, 2.0, False), (2, 2.0, False), (1, 2.1, True), (2, 2.1, True), (3, 0.4, True)]
)
def test_shown_is_said_of_three_seeds_or_of_more_than_two_points(tmp_path, count, more, shown):
    _, said = pair(tmp_path, seeds(5, 9, count), seeds(5 + more, 9 + more, count))
    assert said == ("yes, worse in both" if shown else "no")


def test_the_net_with_fewer_seeds_counts(tmp_path):
    assert pair(tmp_path, seeds(5, 9), seeds(6, 10, 1))[1] == "no"


def test_not_shown_where_the_spread_is_too_large(tmp_path):
    _, said = pair(tmp_path, [(5.0, 9.0), (5.2, 12.0)], [(8.0, 13.0), (8.2, 10.0)])
    assert said == "worse in training"


def test_training_and_test_may_disagree(tmp_path):
    _, said = pair(tmp_path, seeds(5, 13), seeds(8, 9))
    assert said == "worse in training, better in the test"
    words = verdict.sentence(runs.find([tmp_path])[0])
    assert "56 layers has a higher training error and a lower test error than that of 20" in words


def test_not_shown_where_it_is_not_known_whether_the_error_falls(tmp_path):
    for net in ("plain-20", "plain-56"):
        file = make(tmp_path / net, net, train=10.0 if net == "plain-56" else 5.0) / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [line for line in lines if line["split"] == "test" or not 57_600 < line["iteration"] <= 60_800]
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    (one,) = verdict.comparisons(found(tmp_path))
    assert (one.train.word, one.falling) == ("", "it has no points to tell its fall in the last 5 % of the iterations")


def test_not_shown_where_the_error_still_falls_by_more(tmp_path):
    _, said = pair(tmp_path, seeds(5, 9), seeds(8, 13), gain=4.0)
    assert said == "worse in the test"
    note = verdict.table(runs.find([tmp_path])[0]).notes[-1]
    assert note == "plain-56: training is not shown, it still fell by 4.00 points in the last 5 % of the iterations."


def test_unfinished_runs_are_not_compared(tmp_path):
    make(tmp_path / "a", "plain-20", until=40_000)
    make(tmp_path / "b", "plain-56")
    group = found(tmp_path)
    assert (verdict.comparisons(group), verdict.table(group), verdict.sentence(group)) == ([], None, "")


def test_the_sentence_holds_plain_and_residual_nets_together(tmp_path):
    for net, train in (("plain-20", 10), ("plain-56", 25), ("resnet-20-A", 8), ("resnet-56-A", 6.5)):
        make(tmp_path / net, net, train=train, test=train + 1)
    make(tmp_path / "110", "resnet-110-A", train=1, test=2)  # deeper than any plain net
    assert verdict.sentence(found(tmp_path)) == (
        "After 64,000 iterations, the plain net of 56 layers is worse than that of 20 (training error +15.00 points,"
        " test error +15.00); the residual net of 56 layers is not shown to be better or worse than that of 20"
        " (training error -1.50 points, test error -1.50)."
    )


def test_the_sentence_has_a_clause_for_each_kind_of_shortcut(tmp_path):
    """And the same with plain nets beside them or not."""
    for shortcut, train in (("A", 6.0), ("B", 9.0)):
        for depth, more in ((20, 0), (56, train)):
            make(tmp_path / "residual" / f"{depth}{shortcut}", f"resnet-{depth}-{shortcut}", train=train + more)
    words = verdict.sentence(found(tmp_path))
    for shortcut, train in (("A", "+6.00"), ("B", "+9.00")):
        assert f"the residual net of 56 layers with shortcuts {shortcut} has a higher training error" in words
        assert f"(training error {train} points" in words
    for depth in (20, 56):
        make(tmp_path / f"plain-{depth}", f"plain-{depth}")
    assert verdict.sentence(found(tmp_path)).endswith(words.partition("iterations, ")[2])


def test_the_sentence_on_shortened_runs_says_how_little_it_says(tmp_path):
    for net, error in (("plain-20", 5.0), ("plain-56", 20.0)):
        make(tmp_path / net, net, iterations=6400, until=6400, train=error, test=error)
    words = verdict.sentence(found(tmp_path))
    assert words.startswith(
        "After 6,400 of the paper's 64,000 iterations, which do not tell what all would give, the plain"
    )


# --- Figures ---------------------------------------------------------------------------------------------------------


def drawn(*folders):
    """The figures of the first group: name, caption, axes."""
    group = runs.groups(found(*folders))[0]
    return {one.name: (one.caption, one.draw().axes) for one in figures.plan(group)}


def test_figure_6_is_the_mean_of_the_seeds_with_a_band_and_a_net_has_one_colour(tmp_path):
    for seed, error in enumerate((8.0, 9.0, 10.0)):
        make(tmp_path / f"plain-20-{seed}", "plain-20", seed, test=error)
        make(tmp_path / f"resnet-20-{seed}", "resnet-20-A", seed, test=error - 1)
    make(tmp_path / "plain-56", "plain-56", test=13)
    make(tmp_path / "resnet-110", "resnet-110-A", test=6)
    made = drawn(tmp_path)
    assert list(made) == ["figure-1", "figure-6"]
    caption, axes = made["figure-6"]
    assert [one.get_title() for one in axes] == ["plain nets", "residual nets"]  # no third panel without 1202 layers
    assert "band of ± one standard deviation" in caption
    lines = {line.get_label(): line for one in axes for line in one.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["plain-20", "plain-56", "resnet-20-A", "resnet-110-A"]
    assert lines["plain-20"].get_ydata()[-1] == pytest.approx(9.0)
    (band,) = [one for one in axes[0].collections if one.get_paths()[0].vertices[:, 1].min() == pytest.approx(8.0)]
    assert band.get_facecolor()[0][3] < 0.5
    colours = {line.get_color() for line in lines.values()}
    assert len(colours) == 4
    one = {line.get_color() for axes in made["figure-1"][1] for line in axes.lines if line.get_label() == "plain-56"}
    assert one == {lines["plain-56"].get_color()}


def test_nine_nets_of_one_seed_have_colours_of_their_own_and_no_band(tmp_path):
    nets = [net for net in paper.TABLES["table 6"] if net != "resnet-1202-A"]
    for number, net in enumerate(nets):
        make(tmp_path / net, net, test=5 + number)
    caption, axes = drawn(tmp_path)["figure-6"]
    assert "one seed each" in caption
    assert "axis" not in caption  # the paper's
    assert not [band for one in axes for band in one.collections]
    lines = [line for one in axes for line in one.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == nets
    assert len({line.get_color() for line in lines}) == 9
    assert all(axis.get_ylim() == (0, 20) for axis in axes)


def test_the_third_panel_of_figure_6_is_of_1202_layers(tmp_path):
    make(tmp_path / "a", "resnet-110-A")
    make(tmp_path / "b", "resnet-1202-A")
    assert [one.get_title() for one in drawn(tmp_path)["figure-6"][1]][1:] == ["residual nets, 110 and 1202 layers"]


def test_a_short_last_interval_is_no_spike_and_one_test_is_a_marker(tmp_path):
    folder = make(tmp_path / "a", test=8)
    line = {"split": "train", "data": "cifar10", "seed": 0, "loss": 1.0}
    errors = [(at, 20.0) for at in range(100, 64_000, 100)] + [(63_903, 90.0)]  # three iterations
    lines = [{**line, "iteration": at, "error": error} for at, error in sorted(errors)]
    lines.append({**line, "split": "test", "iteration": 64_000, "error": 8.0, "protocol": "single view"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    train, test = drawn(tmp_path)["figure-6"][1][0].lines
    assert max(train.get_ydata()) < 21
    assert train.get_xdata()[-1] == pytest.approx(6.3903)
    assert (len(test.get_xdata()), test.get_marker(), train.get_marker()) == (1, "o", "None")


def single_point(folder, *splits, **options):
    """A run whose curves of these splits have their last point alone."""
    make(folder, **options)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["split"] not in splits or line["iteration"] == 64_000]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def test_a_single_point_is_a_ring_for_training_and_a_dot_for_the_test(tmp_path):
    """As a very short run leaves them: told apart, in every figure, and explained in the caption."""
    single_point(tmp_path / "a", "train", "test")
    caption, (axes,) = drawn(tmp_path)["figure-6"]
    ring, dot = axes.lines
    assert [line.get_marker() for line in (ring, dot)] == ["o", "o"]
    assert [line.get_markerfacecolor() for line in (ring, dot)] == ["none", dot.get_color()]
    assert ring.get_markersize() > dot.get_markersize() + 2 * ring.get_markeredgewidth()  # both are seen at one place
    assert "; a single point is a ring (training) or a dot (test)" in caption
    plot = page.plot(found(tmp_path))
    points = [one.glyph for one in plot.renderers if type(one.glyph).__name__ == "Scatter"]
    assert [one.fill_color for one in points] == [None, curves.colour("resnet-20-A")]
    assert plot.x_range.start == 0
    single_point(tmp_path / "b", "test", seed=1)
    assert drawn(tmp_path / "b")["figure-6"][0].endswith("one seed each; a single point is a dot (test).")
    make(tmp_path / "c")
    assert "single point" not in drawn(tmp_path / "c")["figure-6"][0]


def test_the_spread_of_a_single_point_is_seen(tmp_path):
    for seed in range(2):
        single_point(tmp_path / str(seed), "train", "test", seed=seed, test=8.0 + seed)
    _, (axes,) = drawn(tmp_path)["figure-6"]
    assert [band.get_linewidth().item() > 0 for band in axes.collections] == [True, True]


def test_interval_means_are_those_of_the_iterations():
    points = [(10, 50.0, None), (20, 30.0, None), (22, 90.0, None)]
    assert curves.interval_means(points, [0, 5, 15, 22]) == pytest.approx([50, 40, (5 * 30 + 2 * 90) / 7])
    assert curves.edges(points) == pytest.approx([0, 22 / 3, 44 / 3, 22])


def test_pictures_have_no_words_of_a_run_in_them_and_take_dollars_for_dollars(tmp_path):
    make(tmp_path / "a$_$b", data="a$_$b")
    caption, (axes,) = drawn(tmp_path)["curves"]
    assert "on a$_$b;" in caption
    assert axes.figure.get_suptitle() == ""
    figure = figures.plan(found(tmp_path))[0].draw()
    figure.axes[0].set_title("a$_$b")
    figures.save(figure, tmp_path / "figure")
    detector_run(tmp_path / "detectors", source="/w/a$_$b.pt")
    assert detection.sections(detection.find(runs.find([tmp_path / "detectors"])[1]))


# --- Data that the paper does not have -------------------------------------------------------------------------------


def test_other_data_have_curves_and_a_table_of_their_own_and_none_of_the_papers_words(tmp_path, monkeypatch, capsys):
    for net, error in (("plain-20", 2.0), ("plain-56", 60.0), ("resnet-20-A", 1.5)):
        make(tmp_path / net, net, data="digits", iterations=1000, until=1000, test=error, train=error)
    csv_of(tmp_path, [("plain-20", "digits", 0, index, 1.0, "SHORTENED: 1,000 of") for index in range(19)])
    text = report_of(tmp_path, monkeypatch)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"curves.png", "plain-nets.svg", "errors.csv", "depth.csv"} <= names
    assert not {name for name in names if name.startswith(("table", "figure-6", "figure-1"))}
    for word in ("SHORTENED", "not CIFAR-10", "Table 6", "Figure", "Not run here", "Maxout", "the paper's 64,000"):
        assert word not in text, word
    assert "After 1,000 iterations, the plain net of 56 layers is worse than that of 20" in text
    assert f"| plain-56 | {tables.NOTHING} | 60.00 (n=1) | 60.00 (n=1) |" in text


def test_shortened_runs_of_the_papers_data_are_called_so(tmp_path, monkeypatch):
    make(tmp_path / "a", iterations=16_000, until=16_000)
    text = report_of(tmp_path, monkeypatch)
    assert "# **SHORTENED: 16,000 of the paper's 64,000 iterations (25 %)**" in text
    assert "Table 6: error in %, cifar10" in text
    assert '<p class="warning">SHORTENED' in (tmp_path / "out" / "index.html").read_text()
    for picture in figures.plan(found(tmp_path / "a")):
        assert picture.draw().get_suptitle() == "SHORTENED: 16,000 of the paper's 64,000 iterations (25 %)"


def test_a_point_without_an_error_is_no_point_of_a_curve(tmp_path):
    make(tmp_path / "a")
    whole = found(tmp_path / "a")[0].curves
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "split": "train", "data": "cifar10", "seed": 0, "loss": 1.0}\n')
    assert found(tmp_path / "a")[0].curves == whole


# --- ImageNet: what only resnet-eval can say -------------------------------------------------------------------------


def photos(folder, net, error, view=None):
    """A finished run on ImageNet, and perhaps what resnet-eval has found for it."""
    make(folder, net, test=error, data="imagenet", iterations=600_000, until=600_000)
    values = json.loads((folder / "config.json").read_text())
    values["data"] |= {"family": "imagenet", "name": "imagenet"}
    (folder / "config.json").write_text(json.dumps(values))
    change(folder / "environment.json", digest="of these images")
    text = (folder / "metrics.jsonl").read_text().replace("single view", "center crop")
    (folder / "metrics.jsonl").write_text(text)
    if view:
        result = {"net": net, "data": "imagenet", "split": "test", "protocol": view, "seed": 0, "iteration": 600_000}
        (folder / "checkpoints").mkdir()
        told = json.dumps(result | {"wrong": 12_500, "seen": 50_000, "error": 25.0, "error5": 7.5})
        (folder / "checkpoints" / "last-tencrop-test.json").write_text(told)


@pytest.mark.parametrize(("seen", "label"), [(None, "imagenet"), (49_990, "imagenet"), (300, "imagenet-folder")])
def test_a_folder_called_imagenet_is_imagenet_if_it_has_as_many_test_images(tmp_path, seen, label):
    photos(tmp_path / "a", "resnet-34-A", 28.0, "10-crop")
    for file in (tmp_path / "a/metrics.jsonl", tmp_path / "a/checkpoints/last-tencrop-test.json"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        more = {} if seen is None else {"seen": seen}
        file.write_text("".join(json.dumps(line | more) + "\n" for line in lines))
    (run,) = found(tmp_path)
    assert (run.data, run.published) == (label, label == "imagenet")
    assert [result["data"] for result in run.results] == [label]


def test_ten_crop_errors_come_from_resnet_eval_and_stay_apart_from_the_center_crop(tmp_path):
    photos(tmp_path / "a", "resnet-34-A", 28.0, "10-crop")
    photos(tmp_path / "b", "resnet-34-B", 27.0)
    table = tables.errors_table(found(tmp_path), "table 3", "")
    one, other = row(table, "resnet-34-A"), row(table, "resnet-34-B")
    assert one["ours, last (10-crop)"] == (25.0, None, 1)
    assert one["ours, top-5 (10-crop)"] == (7.5, None, 1)
    assert one["ours, last (center crop)"] == (28.0, None, 1)
    assert one["difference"] == pytest.approx(25.0 - 25.03)
    assert other["ours, last (10-crop)"] is None
    command = f"resnet-eval protocol=tencrop checkpoint={tmp_path.name}/b/checkpoints/last.pt"
    assert any(note.endswith(f"`{command}`") for note in table.notes)
    table = tables.errors_table(found(tmp_path), "table 4", "")
    assert row(table, "resnet-34-B")["ours, last (multi-scale)"] is None
    assert [note for note in table.notes if "protocol=multiscale" in note]
    ensembles = tables.tables(found(tmp_path), "")[-1]
    assert ensembles.title == "Table 5: ensembles, imagenet"
    assert "protocol=multiscale checkpoint=" in ensembles.notes[-1]


@pytest.mark.parametrize(
    "other",
    [
        {"iteration": 300_000},
        {"batch_norm": "averages over 200 training batches"},
        {"data": "imagenet-v2"},
        {"digest": "of other images"},
        {"split": "val"},
        {"protocol": "multi-scale"},
        {"members": []},
        {"net": "resnet-50-B"},
        {"seed": 1},
    ],
)
def test_an_evaluation_of_something_else_is_not_the_runs_error(tmp_path, other):
    photos(tmp_path / "a", "resnet-34-B", 27.0, "10-crop")
    right = tmp_path / "a/checkpoints/last-tencrop-test.json"
    told = json.loads(right.read_text())
    wrong = {"batch_norm": "moving averages"} | told | {"error": 1.0, "error5": 1.0} | other
    (right.parent / "a-test.json").write_text(json.dumps(wrong))  # which is read first
    cells = row(tables.errors_table(found(tmp_path), "table 3", ""), "resnet-34-B")
    assert (cells["ours, last (10-crop)"], cells["ours, top-5 (10-crop)"]) == ((25.0, None, 1), (7.5, None, 1))
    right.unlink()
    table = tables.errors_table(found(tmp_path), "table 3", "")
    assert row(table, "resnet-34-B")["ours, last (10-crop)"] is None
    assert any("protocol=tencrop checkpoint=" in note for note in table.notes)


def test_a_result_on_images_without_a_digest_or_of_a_run_within_is_not_the_runs(tmp_path):
    """A folder of the same name with a test part alone, and a run in another run's folder."""
    outer = make(tmp_path / "a", data="mine", test=30.0)
    inner = make(tmp_path / "a" / "fine", data="mine", test=20.0, seed=1)
    result = {"net": "resnet-20-A", "data": "mine", "split": "test", "protocol": "10-crop", "iteration": 64_000}
    for folder in (outer, inner):
        (folder / "checkpoints").mkdir()
        change(folder / "environment.json", digest="of these images")
    for name, digest, error in (("a-test.json", None, 77.0), ("b-test.json", "of these images", 11.0)):
        change(inner / "checkpoints" / name, **result, seed=1, digest=digest, error=error)
    first, second = found(tmp_path)
    assert tables.final_error(first, "10-crop") is None
    assert tables.final_error(second, "10-crop") == 11.0


def test_an_ensemble_before_its_end_or_with_other_batch_norm_is_left_out(tmp_path):
    folder = make(tmp_path / "a", data="mine")
    (folder / "checkpoints").mkdir()
    member = {"net": "resnet-20-A", "seed": 0, "iteration": 64_000, "iterations": 64_000}
    result = {"net": "ensemble of 2", "data": "mine", "split": "test", "protocol": "single view", "error": 5.0}
    for number, (changes, unlike) in enumerate(
        [
            ({}, {}),
            ({"batch_norm": "averages over 2 training batches"}, {}),
            ({"split": "val"}, {}),
            ({}, {"iteration": 9}),
        ]
    ):
        path = folder / "checkpoints" / f"{number}-test.json"
        change(path, **result | changes, members=[member, member | unlike])
    (table,) = tables.tables(found(tmp_path), "")[1:]
    assert [cells[2] for cells in table.rows] == [5.0]


def test_a_sweeps_command_names_the_values_of_its_job(tmp_path):
    """Those of the swept keys, so that no two jobs have one command; an unfinished run has no error in runs.csv."""
    swept = "resnet-train -m depth=20,32 shortcut=A,B schedule.lr=0.1,0.05 'data.test=[a,b]' seed=0 data.root=/h/a,/h/b"
    for shortcut, until in (("A", 64_000), ("B", 32_000)):
        folder = make(tmp_path / shortcut, f"resnet-20-{shortcut}", until=until)
        change(folder / "environment.json", command=swept)
        change(folder / "config.json", data__root="/home/alice/a")
    table = tables.runs_table(found(tmp_path))
    lines = list(csv.DictReader(table.csv().splitlines()))
    assert [line["command"].partition(" # ")[2] for line in lines] == [
        f"arch=resnet depth=20 shortcut={shortcut} seed=0 schedule.lr=0.1 data.root=a" for shortcut in "AB"
    ]
    assert [line["test error"] for line in lines] == ["10.0", ""]


def test_what_the_validation_part_chose_stands_in_the_tables(tmp_path):
    folder = make(tmp_path / "a", data="mine")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines += [
        line | {"split": "val", "error": 5 + abs(line["iteration"] - 32_000) / 1000}
        for line in lines
        if line["split"] == "test"
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (line,) = csv.DictReader(tables.runs_table(found(tmp_path)).csv().splitlines())
    assert [line[key] for key in ("lowest validation error", "at iteration", "test error there")] == [
        "5.0",
        "32000",
        "30.0",
    ]
    cells = row(tables.tables(found(tmp_path), "")[0], "resnet-20-A")
    assert (cells["lowest validation error"], cells["test error there"]) == ((5.0, None, 1), (30.0, None, 1))


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ('data.root="/home/müller/x"', "x"),
        ('run_dir="/home/a/lr=0.1"', "lr=0.1"),
        ("init_from=~alice/x.pt", "init_from=x.pt"),
        ("checkpoint=[/a/b.pt,'/c/d e.pt']", "d e.pt"),
    ],
)
def test_folders_of_a_command_stay_out_of_the_report(word, shown):
    found = tables.strip_folders(shlex.join(["resnet-train", word]))
    assert "/" not in found
    assert "~" not in found
    assert shown in found


def test_underscores_around_words_are_no_emphasis():
    assert page.markdown_table(tables.Table("a", "__mine__, _cat_, a_b", ["net"])).startswith(
        r"### \_\_mine\_\_, \_cat\_, a_b"
    )


# --- The command -----------------------------------------------------------------------------------------------------


def csv_of(folder, rows, iteration=64_000):
    """Rows of the tables that resnet-responses leaves, below what is there: net, data, seed, layer, value, note."""
    header = ["net", "data", "seed", "iteration", "finished", "index", "layer"]
    for name, columns in (("responses", ["std"]), ("gradients", ["by_response", "by_weights"])):
        path = folder / f"{name}.csv"
        first = [] if path.exists() else [[*header, *columns, "split", "images", "note"]]
        lines = [
            [*row[:3], iteration, iteration == 64_000, row[3], "bn", *[row[4]] * len(columns), "test", 9, row[5]]
            for row in rows
        ]
        with path.open("a", newline="") as file:
            csv.writer(file).writerows([*first, *lines])


def report_of(folder, monkeypatch):
    """What resnet-report says of a folder of runs, in this process."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("sys.argv", ["resnet-report", folder.name, f'out="{folder.name}/out"'])
    with contextlib.suppress(SystemExit):
        cli.report()
    return (folder / "out" / "report.md").read_text()


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Runs by hand and what is made of them, with what a child found: no torch, sources untouched."""
    place = tmp_path_factory.mktemp("report")
    for seed in range(3):
        make(place / "runs" / f"plain-20-{seed}", "plain-20", seed, test=9 + seed / 10)
        make(place / "runs" / f"resnet-20-{seed}", "resnet-20-A", seed, test=8 + seed / 10)
    make(place / "runs" / "plain-56", "plain-56", test=13, train=9)
    make(place / "runs" / "resnet-56", "resnet-56-A", precision="bf16")
    for folder in (place / "runs").iterdir():
        command = f"resnet-train data.root=/home/me/set run_dir='/tmp/my runs/{folder.name}' init_from=~/w/r18.pt"
        environment = {"command": command, "device": "a GPU"}
        environment |= {"before": [{"device": "a CPU", "until": 9}]} if folder.name == "plain-56" else {}
        (folder / "environment.json").write_text(json.dumps(environment))
    csv_of(place / "runs", [("plain-20", "cifar10", seed, index, 1.0, "") for seed in (0, 1) for index in range(19)])
    before = digest(place / "runs")
    code = "import sys; from resnet_train import cli\ntry: cli.report()\nfinally: assert 'torch' not in sys.modules"
    words = [sys.executable, "-W", "error", "-c", code, str(place / "runs"), f"out={place / 'out'}"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "Qt4Agg"})
    assert (done.returncode, done.stderr) == (0, "")
    assert digest(place / "runs") == before
    return place / "out"


def test_what_a_report_is_made_of(reported):
    names = {path.name for path in reported.iterdir()}
    assert {
        "index.html",
        "report.md",
        "table-6.csv",
        "table-6-2.csv",
        "deviations.csv",
        "runs.csv",
        "depth.csv",
    } <= names
    assert {f"figure-{number}.{kind}" for number in (1, 6, 7) for kind in ("png", "svg")} <= names
    assert "gradients.png" in names
    assert not [name for name in names if name.startswith(".")]
    text = (reported / "report.md").read_text()
    assert "runs and" not in text
    assert "not in one row or figure: they differ in precision (fp32 and bf16)" in text


def test_commands_are_folded_away_and_do_not_say_where_things_lay(reported):
    for name in ("index.html", "report.md", "runs.csv"):
        text = html.unescape((reported / name).read_text())
        assert "resnet-train data.root=set run_dir=plain-20-0 init_from=r18.pt" in text, name
        for place in ("/home/me", "/tmp/my", str(reported.parent)):
            assert place not in text, (name, place)
        assert text.count("a CPU, then a GPU") == 1, name
    for name in ("index.html", "report.md"):
        assert "<details><summary>The command of each curve</summary>" in (reported / name).read_text()


@pytest.mark.parametrize("results", RESULTS, ids=lambda place: place.name)
def test_the_errors_of_the_committed_runs_are_those_of_their_summaries(results):
    kept, _, _ = runs.find([results])
    for run in kept:
        if not run.finished:  # of such the report says so
            assert not (run.folder / "summary.json").exists()
            continue
        summary = json.loads((run.folder / "summary.json").read_text())
        assert run.test_error == summary["last"]["test"]["error"]


def test_the_page_needs_no_network(reported):
    page = (reported / "index.html").read_text()
    assert not re.findall(r"""<(?:script|img|link)[^>]*(?:src|href)=["'](?!data:)""", page)
    assert "Bokeh" in page
    assert len(page) < 3_000_000


def test_the_same_runs_give_the_same_figures(reported, monkeypatch):
    report_of(reported.parent / "runs", monkeypatch)
    again = reported.parent / "runs" / "out"
    for name in ("figure-1.svg", "figure-6.svg", "figure-7.svg", "table-6.csv", "deviations.csv"):
        assert (again / name).read_bytes() == (reported / name).read_bytes(), name
    shutil.rmtree(again)


def test_a_picture_that_fails_is_a_warning_and_not_in_the_page(tmp_path, monkeypatch, capsys):
    make(tmp_path / "runs" / "plain-20", "plain-20")
    make(tmp_path / "runs" / "plain-56", "plain-56")
    detector_run(tmp_path / "runs")
    csv_of(tmp_path / "runs", [("plain-20", "cifar10", 0, index, 1.0, "") for index in range(19)])
    out = tmp_path / "runs" / "out"
    for name in ("figure-6.svg", "figure-7.png", "detection.png", "gradients.png"):
        (out / name).mkdir(parents=True)
    (out / "report.md").write_text("Made by `resnet-report runs`.")  # an earlier one, which is replaced
    text = report_of(tmp_path / "runs", monkeypatch)
    told, errors = capsys.readouterr()
    assert errors == ""
    for name in ("figure-6", "figure-7", "detection", "gradients"):
        assert f"warning: runs/out/{name}: cannot be drawn (" in told
        assert f"({name}.png)" not in text
    assert "(figure-1.png)" in text
    assert (out / "index.html").read_text().count("<figure>") == 1
    assert {"table-6.csv", "runs.csv", "table-7.csv"} <= {path.name for path in out.iterdir()}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_result_that_is_a_pipe_is_not_waited_for(tmp_path):
    (run,) = found(make(tmp_path / "run"))
    assert run.results == []
    (tmp_path / "run" / "checkpoints").mkdir()
    os.mkfifo(tmp_path / "run" / "checkpoints" / "last-test.json")
    (run,) = found(tmp_path / "run")
    assert run.results == []


def test_a_table_without_rows_is_its_header():
    assert "<th" in page._table(tables.Table("none", "None", ["net", "error"], [], []))


def test_wrong_words_are_one_line(tmp_path, monkeypatch, capsys):
    make(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    fresh = make(tmp_path / "fresh" / "run")
    (fresh / "metrics.jsonl").unlink()
    other = make(tmp_path / "other")
    (other / "config.json").write_text("[]")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    before = digest(tmp_path)
    for words, named in {
        "": "name the runs",
        "nosuch": "nosuch: there is no such folder",
        "empty": "empty: holds no run",
        "fresh": "fresh/run: has no metrics yet",
        "other": "other/config.json: is not JSON that can be used (not an object)",
        "run out=file": "out=file: is not a folder that you may write to",
        "run out=run/report": "out=run/report: lies in the run run",
        "run out=/proc/x": "out=/proc/x: ",
        "run outt=x": "did you mean out?",
        "complexity run": "remove run",
        "-m run": "-m: resnet-report takes all runs at once",
    }.items():
        monkeypatch.setattr("sys.argv", ["resnet-report", *words.split()])
        with pytest.raises(SystemExit) as stopped:
            cli.report()
        told = capsys.readouterr().err
        assert stopped.value.code == 2, words
        assert named in told, (words, told)
        assert told.count("\n") == 1, told
    assert digest(tmp_path) == before


@pytest.mark.parametrize("name", ["a b", 'quo"te', "back\\", "it's, [so]", "ü=1"])
def test_folders_with_odd_names(name, tmp_path, monkeypatch, capsys):
    make(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["resnet-report", name, "nosuch"])
    with pytest.raises(SystemExit):
        cli.report()
    assert "error: nosuch: there is no such folder" in capsys.readouterr().err


# --- What a run's files say is data -----------------------------------------------------------------------------------

EVIL = "</script><img src=x onerror=document.title='evil'>\"'`|[a](javascript:x) a$_$b =1+1 \x1b[31m\ud800"


def test_runs_that_computed_otherwise_are_no_seeds_of_one_row(tmp_path):
    """precision=auto on two machines, and batch norm over other groups from a resume on."""
    cases = [("bf16", []), ("bf16", []), ("fp32", []), ("bf16", [64]), ("bf16", [32])]
    for seed, (precision, before) in enumerate(cases):
        folder = make(tmp_path / str(seed), seed=seed, precision="auto", bn_images="device", batch_size=64, devices=2)
        environment = {"measure": {"precision": precision, "bn_images": 32}, "device": "a CPU"}
        environment |= {"before": [{"measure": {"precision": precision, "bn_images": images}} for images in before]}
        (folder / "environment.json").write_text(json.dumps(environment))
    groups = runs.groups(runs.find([tmp_path])[0])
    assert [[run.seed for run in group] for group in groups] == [[0, 1, 4], [2], [3]]
    assert runs.differences(groups[0], groups[1]) == [("precision", "bf16", "fp32")]
    assert runs.differences(groups[0], groups[2]) == [("bn_images", "32", "64, then 32")]
    assert ("bn_images", "64, then 32", "64") in runs.deviations(groups[2][0])


def test_a_point_after_a_gap_weighs_no_more_than_others():
    points = [(6090, 10.0, None), *((6090 + 10 * tick, 5.0, None) for tick in range(1, 31)), (6393, 0.0, None)]
    assert runs.mean_error(points, 6080, 6400) == pytest.approx((10 * 10 + 30 * 10 * 5) / 313)
    assert math.isnan(runs.mean_error([], 0, 9))


def test_an_unfinished_run_of_an_older_version_stays_with_the_finished_ones(tmp_path):
    """It does not say what precision=auto came to: that of the only ones that are else alike."""
    for seed, until in ((0, 64_000), (1, 32_000)):
        folder = make(tmp_path / str(seed), seed=seed, precision="auto", until=until)
        if seed == 0:
            (folder / "summary.json").write_text(json.dumps({"precision": "bf16"}))
    (group,) = runs.groups(runs.find([tmp_path])[0])
    assert {run.setting["precision"] for run in group} == {"bf16"}
    make(tmp_path / "2", seed=2, precision="fp32")
    groups = runs.groups(runs.find([tmp_path])[0])
    assert sorted(run.setting["precision"] for group in groups for run in group) == ["auto", "bf16", "fp32"]


def change(path, **values):
    """Other values in a JSON file, by key or by key in a section."""
    told = json.loads(path.read_text()) if path.exists() else {}
    for key, value in values.items():
        section, _, inner = key.rpartition("__")
        (told[section] if section else told)[inner] = value
    path.write_text(json.dumps(told))


DEEP = '{"a":' * 100_000
RESULT = {"net": "resnet-20-A", "data": "a", "split": "a", "protocol": "a", "error": 1}


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("config.json", {"arch": EVIL}),
        ("config.json", {"shortcut": EVIL}),
        ("config.json", {"depth": EVIL}),
        ("config.json", {"depth": 10**400}),
        ("config.json", {"data__family": EVIL}),
        ("config.json", {"seed": EVIL}),
        ("config.json", {"seed": math.nan}),
        ("config.json", {"iterations": math.inf}),
        ("config.json", {"iterations": "100"}),
        ("config.json", {"batch_size": []}),
        ("config.json", {"momentum": {"a": 1}}),
        ("config.json", DEEP),
        ("config.json", "[" * 100_000),
        ("summary.json", {"device": 3}),
        ("summary.json", {"parameters": EVIL}),
        ("checkpoints/last-test.json", RESULT | {"error": EVIL}),
        ("checkpoints/last-test.json", RESULT | {"data": []}),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else str(value)[:25],
)
def test_what_has_a_known_form_is_refused_in_one_line_where_it_has_another(tmp_path, file, told):
    path = make(tmp_path / "a") / file
    path.parent.mkdir(exist_ok=True)
    if isinstance(told, str):
        path.write_text(told)
    else:
        change(path, **told)
    with pytest.raises(UserError) as refused:
        runs.find([tmp_path])
    line = str(refused.value)
    assert line.startswith(str(tmp_path / "a"))
    assert line.isprintable(), line
    assert len(line) < 500


GOOD = {"iteration": 3, "split": "test", "data": "cifar10", "seed": 0, "error": 1.0, "protocol": "single view"}
BAD_LINES = {
    "half a line": json.dumps(GOOD)[:40],
    "NULs": "\0" * 64,
    "null": "null",
    "deep nesting": DEEP,
    "no object": "[]",
    "no data": json.dumps({key: value for key, value in GOOD.items() if key != "data"}),
    "no error": json.dumps({key: value for key, value in GOOD.items() if key != "error"}),
} | {
    f"{key}={str(value)[:20]}": json.dumps(GOOD | {key: value})
    for key, value in [
        *(("split", EVIL), ("split", []), ("error", EVIL), ("error", None), ("error", True), ("error", math.nan)),
        *(("error", 101), ("error5", "1"), ("iteration", math.inf), ("iteration", True), ("iteration", 0)),
        *(("iteration", 10**400), ("data", 7), ("data", [1, 2]), ("protocol", ["x"]), ("seed", "0"), ("loss", {})),
    ]
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_of_the_metrics_is_left_out_with_a_warning_that_names_it(line, tmp_path, capsys):
    (whole,) = found(make(tmp_path / "whole"))
    path = make(tmp_path / "run") / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([line.encode(), *lines[:5], line.encode(), *lines[5:-1], b'{"iteration": 3']))
    (run,) = found(tmp_path / "run")
    assert capsys.readouterr().out == f"warning: {path}: lines 1, 7 are damaged and left out\n"
    assert run == dataclasses.replace(whole, folder=run.folder, display_path=run.display_path)
    path.write_bytes(line.encode() + b"\n")
    with pytest.raises(UserError, match=f"{run.display_path}: has no metrics yet, left out"):
        runs.find([tmp_path / "run"])
    assert capsys.readouterr().out == f"warning: {path}: line 1 is damaged and left out\n"


def test_nothing_in_a_run_is_waited_for(tmp_path, monkeypatch, capsys):
    """A run that is still resuming, in whose folder are pipes in place of files."""
    make(tmp_path / "runs" / "whole")
    running = make(tmp_path / "runs" / "running", seed=1, until=32_000)
    for name in ("summary.json", "environment.json", "last-test.json", "gradients.csv", "responses.csv", "any"):
        os.mkfifo(running / name)
    for name in ("config.json", "metrics.jsonl"):
        piped = make(tmp_path / "runs" / name, seed=2)
        (piped / name).unlink()
        os.mkfifo(piped / name)
    report_of(tmp_path / "runs", monkeypatch)
    told, errors = capsys.readouterr()
    assert errors == ""
    assert "note: runs/metrics.jsonl: has no metrics yet, left out\n" in told
    rows = list(csv.DictReader((tmp_path / "runs" / "out" / "runs.csv").read_text().splitlines()))
    assert [(row["seed"], row["iterations"], row["of"]) for row in rows] == [
        ("0", "64000", "64000"),
        ("1", "32000", "64000"),
    ]


@pytest.mark.parametrize(
    "values",
    [{"backbone": 1, "depth": EVIL}, {"seed": math.nan}, {"data__train": [[]]}, {"iterations": -1}, {"init_from": 1}],
    ids=str,
)
def test_so_are_those_of_detectors(tmp_path, values):
    change(detector_run(tmp_path) / "config.json", **values)
    with pytest.raises(UserError, match="holds other things than a run of resnet-detect leaves"):
        detection.find(runs.find([tmp_path])[1])


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ((EVIL, "digits", 0, 1, 1.0, ""), 19),
        (("plain-20", "digits", "nan", 1, 1.0, ""), 19),
        (("plain-20", "digits", 0, 1, math.nan, ""), 19),
        (("plain-20", "digits", 0, 1, math.inf, ""), 19),
        (("plain-20", "digits", 0, 1, EVIL, ""), 19),
        (("plain-20", "digits", 0, 1, 1.0, ""), 18),
        (("plain-20", "digits", 0, 1, 1.0, "x" * 200_000), 19),  # longer than the csv module reads
    ],
)
def test_odd_layer_responses_are_refused_in_one_line(tmp_path, row, count, monkeypatch, capsys):
    make(tmp_path / "a")
    row = [cell.replace("\ud800", "") if isinstance(cell, str) else cell for cell in row]
    csv_of(tmp_path, [row] * count)
    monkeypatch.setattr("sys.argv", ["resnet-report", str(tmp_path), f"out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as ended:
        cli.report()
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"{tmp_path}/responses.csv: is no table of resnet-responses" in told
    assert told.count("\n") == 1
    assert told[:-1].isprintable()


def test_layer_responses_are_of_the_last_checkpoint_of_each_net_and_seed(tmp_path):
    for iteration, value in ((400, 1.0), (64_000, 3.0), (16_000, 2.0)):
        rows = [(net, "digits", 0, index, value, "") for net in ("resnet-20-A", "plain-20") for index in range(19)]
        csv_of(tmp_path, rows, iteration)
    measured = report_command._measured([tmp_path], "gradients.csv", "by_weights")
    assert [(one.net, one.stds, one.finished) for one in measured] == [
        ("plain-20", [3.0] * 19, True),
        ("resnet-20-A", [3.0] * 19, True),
    ]
    section = report_command._responses_section("", measured, measured, measured)
    assert [one.name for one in section.figures] == ["figure-7", "gradients"]
    both = [measured[0], dataclasses.replace(measured[0], iteration=400, stds=[1.0] * 19)]
    lines = figures.draw_responses(both).axes[0].lines  # no mean of them
    assert [(line.get_label(), line.get_ydata()[0]) for line in lines] == [
        ("plain-20, iteration 64,000", 3.0),
        ("plain-20, iteration 400", 1.0),
    ]
    figure = figures.draw_gradients(measured, measured)
    figure.canvas.draw()
    ticks = [tick.get_text() for axes in figure.axes for tick in axes.get_yticklabels(which="both")]
    assert "2" in ticks
    assert not [tick for tick in ticks if "$" in tick]
    assert section.words[-1] == "The response is no less than in the plain net of the same depth in resnet-20-A."


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """The report of runs in whose files every free string is hostile."""
    monkeypatch.setattr(paper, "DATA", {values.escape_and_clip(EVIL): "cifar"})
    top = tmp_path / "<img src=x onerror=1> a$_$b"
    for name, precision in (("a", EVIL), ("b", "fp32")):
        folder = make(top / name / EVIL.replace("/", "").replace("\ud800", ""), data=EVIL, precision=precision)
        text = (folder / "metrics.jsonl").read_text()
        (folder / "metrics.jsonl").write_text(text.replace("single view", json.dumps(EVIL)[1:-1]))
        change(folder / "environment.json", command=EVIL, device=EVIL, measure={"precision": precision})
        change(folder / "config.json", schedule__name=EVIL, init=EVIL, schedule__drops=[EVIL])
        result = {"net": EVIL, "data": EVIL, "split": "test", "protocol": "10-crop", "error": 1.0}
        (folder / "checkpoints").mkdir()
        change(folder / "checkpoints" / "last-test.json", **result, members=[{"net": EVIL}])
    detector = detector_run(top, label=EVIL, source=EVIL)
    change(detector / "environment.json", command=EVIL, device=EVIL)
    change(detector / "config.json", data__train=[EVIL], data__test=EVIL, data__classes=[EVIL])
    plain = EVIL.replace("\ud800", "")
    csv_of(top, [("plain-20", plain, 0, index, 1.0, plain) for index in range(19)])
    report_of(top, monkeypatch)
    return top / "out"


def test_hostile_strings_are_text_in_markdown_and_tables(evil):
    text = (evil / "report.md").read_text()
    outside = re.sub("`[^`\n]+`", "", text)
    assert "img src=x" in outside
    assert not re.search(r"(?<!\\)<(?!/?details>|/?summary>)", outside)
    assert not re.search(r"(?<!\\)\]\(javascript", outside)
    for path in (evil / "report.md", *evil.glob("*.csv")):
        text = path.read_text()
        assert "\x1b" not in text
        assert path.suffix != ".csv" or not [
            cell for row in csv.reader(text.splitlines()) for cell in row if cell[:1] == "="
        ]


PROBE = """
const shadow = (e) => e.shadowRoot ? nodes(e.shadowRoot) : [];
const nodes = (root) => [...root.querySelectorAll("*")].flatMap((e) => [e, ...shadow(e)]);
const found = { evil: 0, tips: 0, plots: 0 };
const look = () => {
  const all = nodes(document);
  const evil = (e) => e.matches(`img:not([src^="data:image/svg"]), [onerror]`);
  found.evil += all.filter(evil).length;
  found.tips += all.filter((e) => e.className.includes?.('bk-Tooltip')).length;
  return all;
};
addEventListener('load', async () => {
  const pause = (time) => new Promise((go) => setTimeout(go, time));
  await pause(1000);
  for (const button of document.querySelectorAll('th button')) { button.click(); button.click(); }
  for (const area of look().filter((e) => e.className.includes?.('bk-events'))) {
    found.plots++;
    area.scrollIntoView();
    const box = area.getBoundingClientRect();
    for (let down = 0; down < box.height; down += 2) {
      const at = { clientX: box.left + box.width * 0.6, clientY: box.top + down };
      for (const kind of ['pointerover', 'pointermove'])
        area.dispatchEvent(new PointerEvent(kind, { ...at, view: window, isPrimary: true, pointerType: 'mouse' }));
      await pause(1);
      look();
    }
  }
  const rows = [...document.querySelectorAll('tbody tr')].map((row) => row.cells[0].textContent);
  document.documentElement.dataset.found = JSON.stringify({ ...found, rows, title: document.title });
});
"""


def browse(text, folder):
    """What a browser finds in a page while a pointer goes over its plots: elements that no report makes, and tips."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium")
    # Without the policy, which would hide what was not escaped.
    text = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"<script>{PROBE}</script></body>")
    (folder / "page.html").write_text(text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'user'}"]
    flags += ["--virtual-time-budget=20000", "--dump-dom", (folder / "page.html").as_uri()]
    done = subprocess.run([chromium, *flags], capture_output=True, text=True, timeout=100, check=True)
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))


def test_hostile_strings_are_text_in_a_real_browser(evil, tmp_path):
    text = (evil / "index.html").read_text()
    assert text.count("img src=x") > 20
    seen = browse(text, tmp_path)
    assert seen["plots"] == 2
    assert seen["tips"] > 0
    assert seen["evil"] == 0
    assert seen["title"] != "evil"


def test_the_hover_box_is_text_even_of_a_net_that_no_reading_let_through_and_tables_sort(tmp_path):
    (run,) = found(make(tmp_path / "a"))
    cells = [["a", 9.5], ["b", None], ["c", 10.25], ["d", -3.0]]
    table = tables.Table("table", "Table", ["name", "error"], cells)
    section = page.Section("one", runs=[dataclasses.replace(run, net=EVIL)], tables=[table])
    seen = browse(page.html_page("title", [], [section], tmp_path), tmp_path)
    assert (seen["plots"], seen["evil"], seen["title"]) == (1, 0, "title")
    assert seen["tips"] > 0
    assert seen["rows"] == ["c", "a", "d", "b"]  # by the last column, the greatest first, what is empty last


def test_a_page_runs_its_own_scripts_and_asks_no_network(reported):
    text = (reported / "index.html").read_text()
    (policy,) = re.findall(r'"Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]


# --- Complexity ------------------------------------------------------------------------------------------------------


def test_complexity_is_the_papers_within_its_rounding():
    table = complexity_table()
    rows = {cells[0]: dict(zip(table.header, cells, strict=True)) for cells in table.rows}
    # Table 6, in millions as printed; 110 layers are printed as 1.7.
    printed = {20: "0.27", 32: "0.46", 44: "0.66", 56: "0.85", 110: "1.7", 1202: "19.4"}
    for depth, text in printed.items():
        count, digits = rows[f"resnet-{depth}-A"]["parameters"], len(text.split(".")[1])
        assert f"{count / 1e6:.{digits}f}" == text
    # Table 1, in billions with one digit, the last of which was cut or rounded.
    for net, adds in {"resnet-18-B": 1.8, "plain-34": 3.6, "resnet-34-B": 3.6, "resnet-50-B": 3.8}.items():
        assert adds - 0.05 <= rows[net]["multiply-adds"] / 1e9 < adds + 0.1
    for net, adds in {"resnet-101-B": 7.6, "resnet-152-B": 11.3, "vgg-19": 19.6}.items():
        assert rows[net]["multiply-adds"] / 1e9 == pytest.approx(adds, abs=0.05)
    # VGG-16: the paper's 15.3 are its convolutions; its three classifiers have 0.12 more.
    classifiers = 512 * 7 * 7 * 4096 + 4096 * 4096 + 4096 * 1000
    assert (rows["vgg-16"]["multiply-adds"] - classifiers) / 1e9 == pytest.approx(15.3, abs=0.05)
    assert rows["vgg-16"]["parameters"] == 138_357_544
    assert rows["resnet-152-B"]["multiply-adds"] < rows["vgg-16"]["multiply-adds"]
    assert "8 times the depth" in table.notes[0]


def test_experiments_and_tables_know_the_same_nets():
    """Each experiment has its table or figure."""
    published = {net for table in paper.TABLES.values() for net in table}
    for path in Path(CONFIG_DIR, "experiment").glob("*.yaml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            net = f"{job['arch']}-{job['depth']}" + ("" if job["arch"] == "plain" else f"-{job['shortcut']}")
            assert net in published, (path.stem, net)


def test_other_errors_are_users_errors(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        runs.find([tmp_path])


def detector_run(
    folder,
    *,
    backbone="resnet",
    seed=0,
    maps=(10.0, 40.0),
    iterations=100,
    finished=True,
    source=None,
    label="VOCdevkit",
    images=4952,
):
    """What resnet-detect leaves of a run, in small."""
    data = {"name": "voc", "root": "/d/bccd", "train": ["trainval"], "test": "test", "classes": None}
    config = {"data": data, "backbone": backbone, "depth": 18, "pyramid": False, "context": False, "masks": False}
    config |= {"init_from": source, "seed": seed}
    config |= dict.fromkeys(detection.SETTING, 1) | {"iterations": iterations, "precision": "bf16"}
    place = folder / f"{backbone}-{source is not None}-{seed}"
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    steps = [iterations // 2, iterations if finished else iterations - 1]
    lines = [{"iteration": 1, "split": "train", "data": label, "seed": seed, "loss": 1.0}]
    for iteration, value in zip(steps, maps, strict=True):
        lines.append({"iteration": iteration, "split": "test", "data": label, "map07": value, "map10": value + 1})
        lines[-1] |= {"seed": seed, "images": images, "protocol": "whole"}
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def test_detectors_stand_in_table_7_with_the_mean_over_seeds_beside_the_papers(tmp_path):
    detector_run(tmp_path, maps=(1, 40.0), source="/w/r18.pt")
    detector_run(tmp_path, maps=(1, 42.0), seed=1, source="/w/r18.pt")
    detector_run(tmp_path, maps=(1, 30.0), seed=2, source="/w/r18.pt", finished=False)
    detector_run(tmp_path, backbone="vgg16", maps=(1, 20.0))
    _, places, _ = runs.find([tmp_path])
    (section,) = detection.sections(detection.find(places))
    (table,) = section.tables
    assert table.name == "table-7"
    assert table.formatted() == [
        ["resnet-18, from r18.pt", "41.00 ± 1.41 (n=2)", "42.00 ± 1.41 (n=2)", tables.NOTHING, tables.NOTHING],
        ["vgg-16, random weights", "20.00 (n=1)", "21.00 (n=1)", "73.20", "70.40"],
    ]
    text = page.markdown_table(table)
    assert "seed 2: unfinished, in no mean (mAP, VOC 2007's rule 30.00 % at iteration 99, of 100 iterations)" in text
    assert "random weights in place of ImageNet's" in text
    assert "100 iterations, not 80,000" in text
    assert section.warnings == ["SHORTENED: 100 of the paper's 80,000 iterations"]
    assert figures.draw(section.figures, tmp_path) == section.figures
    assert (tmp_path / "detection.png").read_bytes()[:4] == b"\x89PNG"


def test_detectors_of_another_precision_are_no_seeds_of_one_row(tmp_path):
    """precision=auto on two machines; a run that does not record what it came to stays with the only others."""
    for seed, precision in enumerate(("bf16", None, "fp32")):
        place = detector_run(tmp_path, seed=seed)
        change(place / "config.json", precision="auto")
        if precision:
            (place / "environment.json").write_text(json.dumps({"measure": {"precision": precision}}))
        detectors = detection.find(runs.find([tmp_path])[1])
        assert [run.setting["precision"] for run in detectors] == [
            ["bf16"],
            ["bf16", "bf16"],
            ["bf16", "auto", "fp32"],
        ][seed]
    assert len(detection.sections(detectors)) == 3


def test_detectors_of_other_data_of_one_name_are_two_sections_and_the_finished_run_counts(tmp_path):
    for seed, digest in enumerate(("a" * 64, "b" * 64)):
        place = detector_run(tmp_path, seed=seed)
        (place / "environment.json").write_text(json.dumps({"digest": digest}))
    unfinished = detector_run(tmp_path / "again", finished=False)
    (unfinished / "environment.json").write_text(json.dumps({"digest": "a" * 64}))
    text = (unfinished / "metrics.jsonl").read_text()
    (unfinished / "metrics.jsonl").write_text(text + text.splitlines()[1] + "\n")  # tested more often
    sections = detection.sections(detection.find(runs.find([tmp_path])[1]))
    assert [section.title.partition(":")[0] for section in sections] == [
        f"Detection on VOCdevkit (digest {letter * 8})" for letter in "ab"
    ]
    assert [row[1] for row in sections[0].tables[0].rows] == [(40.0, None, 1)]


def test_a_report_may_be_of_detectors_alone(tmp_path, monkeypatch):
    detector_run(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["resnet-report", "runs", "out=out"])
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.report()
    assert "Table 7: mAP in %, VOCdevkit" in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/table-7.csv").read_text().splitlines()[1].startswith('"resnet-18, random weights",40.0')
    assert "Detection on VOCdevkit: 1 run of 100 iterations" in (tmp_path / "out/index.html").read_text()


def leave_result(
    folder, name, *, refine=False, data="coco", tested="val2014", members=None, images=40_504, classes=80, **figures
):
    """What resnet-detect test leaves beside a checkpoint."""
    who = {"members": [{"net": one} for one in members]} if members else {"net": "resnet-101"}
    progress = {"seed": 0, "iteration": 90, "iterations": 100}
    who = {"members": [one | progress for one in who["members"]]} if members else who | progress
    of_class = {"person": {"ap07": 1.0, "ap10": figures["map50"] + 1, "objects": 7}, "tv": {"ap10": None, "objects": 0}}
    of_class |= {f"class-{number}": {"ap07": 1.0, "ap10": 2.0, "objects": 1} for number in range(classes - 2)}
    rest = {"map07": 1.0, "map10": 2.0, "images": images, "seconds": images / 5, "protocol": "whole"}
    rest |= {"per_class": of_class}
    path = folder / "checkpoints" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(
            {**who, "data": data, "device": "cpu", "list": tested, "refine": refine, "scales": None, **rest, **figures}
        )
    )


def test_tests_of_detectors_stand_in_table_9_beside_the_papers_steps(tmp_path):
    run = detector_run(tmp_path, label="coco", images=40_504)
    change(run / "config.json", data__name="coco")
    lines = [
        json.loads(line) | {"map50": 30.0, "map": 15.0} for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    leave_result(run, "last-val2014.json", map50=30.0, map=15.0)
    leave_result(run, "last-refine-val2014.json", refine=True, map50=31.0, map=16.0)
    nets = ["resnet-101-context", "resnet-50-context"]
    leave_result(run, "ensemble.json", refine=True, members=nets, map50=33.0, map=18.0)
    (section,) = detection.sections(detection.find(runs.find([tmp_path])[1]))
    _, table, classes = section.tables
    assert (table.name, table.title) == ("table-9", "Table 9: improvements, mAP in %, coco, val2014")
    assert table.header[:2] == ["detector", "switched on"]
    assert table.notes[-1].startswith("Baseline: none of the improvements. mAP: the mean over")
    assert "@[.5,.95]: the mean over ten such bounds" in table.notes[-1]
    ours = [[row[0], row[1], row[4], row[5], row[6], *row[7:]] for row in table.rows]
    assert ours == [
        ["resnet-101", "baseline", 30.0, 15.0, 0.2, 48.4, 27.2],
        ["resnet-101", "box refinement", 31.0, 16.0, 0.2, 49.9, 29.9],
        ["ensemble of 2: resnet-101 and resnet-50", "box refinement + context", 33.0, 18.0, 0.2, None, None],
        ["not measured", "box refinement + context", None, None, None, 51.1, 30.0],
        ["not measured", "box refinement + context + multi-scale testing", None, None, None, 53.8, 32.5],
    ]
    assert table.notes[0] == "ensemble of 2: resnet-101 and resnet-50: the baseline was not measured."
    assert "seed 0: iteration 90 of 100, unfinished; 40,504 test images, on cpu; whole" in table.notes[1]
    assert classes.rows[:2] == [["person", "7", 31.0, 32.0, 34.0], ["tv", "0", None, None, None]]


def test_the_step_stands_beside_what_training_s_last_test_gave_without_it(tmp_path):
    """Where resnet-detect test has not measured that; and nothing of another list, whose baseline is not known."""
    run = detector_run(tmp_path, label="bccd", images=72)
    (run / "summary.json").write_text(json.dumps({"last": {"per_class": {"tv": {"ap10": 41.0, "objects": 3}}}}))
    for name, tested in (("last-refine-test.json", "test"), ("last-refine-val.json", "val")):
        leave_result(run, name, refine=True, data="bccd", tested=tested, images=72, classes=2, map50=31.0, map=16.0)
        change(run / "checkpoints" / name, net="resnet-18")
    (section,) = detection.sections(detection.find(runs.find([tmp_path])[1]))
    _, steps, classes, other, _ = section.tables
    assert [row[:4] for row in steps.rows] == [
        ["resnet-18", "baseline", 40.0, 41.0],
        ["resnet-18", "box refinement", 1.0, 2.0],
    ]
    assert re.search("metrics.jsonl: seed 0: iteration 100; 72 test images, a small set, on .*; whole", steps.notes[0])
    assert classes.rows[0] == ["tv", "3", 41.0, None]
    assert [row[:2] for row in other.rows] == [["resnet-18", "box refinement"]]
    assert other.notes[0] == "resnet-18: the baseline was not measured."


@pytest.mark.parametrize(("label", "images", "classes"), [("VOCdevkit", 72, 20), ("bccd", 4952, 3)])
def test_tests_on_other_data_stand_beside_no_figure_of_the_papers(tmp_path, label, images, classes):
    """Whatever their folder is called: other images, or other classes."""
    leave_result(
        detector_run(tmp_path, label=label, images=images),
        "last-2007_test.json",
        data=label,
        tested="2007_test",
        images=images,
        classes=classes,
        map50=30.0,
        map=15.0,
    )
    (section,) = detection.sections(detection.find(runs.find([tmp_path])[1]))
    assert section.tables[1].name == "improvements"
    assert [row[:2] for row in section.tables[1].rows] == [["resnet-101", "baseline"]]
    assert not [name for name in section.tables[1].header if "paper" in name]


@pytest.mark.parametrize(("label", "images", "seen"), [("VOCdevkit", 1, "1 test image"), ("b", 72, "72 test images")])
def test_detectors_of_other_data_have_a_table_of_their_own(tmp_path, label, images, seen):
    """Also where their folder has the name of the paper's."""
    detector_run(tmp_path, label=label, images=images)
    (section,) = detection.sections(detection.find(runs.find([tmp_path])[1]))
    (table,) = section.tables
    assert section.title.endswith(f"tested on test ({seen}, a small set)")
    assert (table.title, section.warnings) == (f"Detectors: mAP in %, {label}", [])
    (note,) = table.notes
    assert note.startswith("mAP: the mean over the classes of the average precision (AP); VOC 2007's rule averages")
    assert "@.5" not in note  # which is no column
    assert table.header == ["detector", "mAP, VOC 2007's rule", "mAP, VOC 2010's rule"]


@pytest.mark.parametrize(("classes", "name"), [(20, "table-7"), (3, "detectors")])
def test_as_many_images_of_other_classes_are_not_the_papers(tmp_path, classes, name):
    place = detector_run(tmp_path, label="pictures")
    (place / "summary.json").write_text(json.dumps({"last": {"per_class": dict.fromkeys(map(str, range(classes)))}}))
    (section,) = detection.sections(detection.find(runs.find([tmp_path])[1]))
    assert section.tables[0].name == name


def test_the_figures_of_masks_stand_beside_those_of_boxes(tmp_path):
    """And nothing in the row of a detector without."""
    for masks, name in ((True, "a"), (False, "b")):
        place = detector_run(tmp_path / name, label="tiny", images=22)
        change(place / "config.json", data__name="coco", masks=masks)
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for line in lines[1:]:
            line |= {"map50": line["map07"], "map": 5} | ({"mask_map50": 30, "mask_map": 3} if masks else {})
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (section,) = detection.sections(detection.find(runs.find([tmp_path])[1]))
    (table,) = section.tables
    assert table.header == ["detector", "mAP@.5", "mAP@[.5,.95]", "of masks, @.5", "of masks, @[.5,.95]"]
    assert table.formatted() == [
        ["resnet-18, random weights", "40.00 (n=1)", "5.00 (n=1)", tables.NOTHING, tables.NOTHING],
        ["resnet-18-masks, random weights", "40.00 (n=1)", "5.00 (n=1)", "30.00 (n=1)", "3.00 (n=1)"],
    ]


def test_detectors_of_other_settings_stand_apart(tmp_path):
    detector_run(tmp_path, maps=(1, 40.0))
    detector_run(tmp_path, maps=(1, 40.0), seed=1, iterations=200)
    found = detection.sections(detection.find(runs.find([tmp_path])[1]))
    assert [section.tables[0].name for section in found] == ["table-7", "table-7-2"]


def test_other_weights_are_another_row_and_one_run_counts_once(tmp_path):
    detector_run(tmp_path, maps=(1, 40.0), source="/runs/A/checkpoints/last.pt")
    detector_run(tmp_path / "again", maps=(1, 40.0), source="/runs/A/checkpoints/last.pt")
    detector_run(tmp_path / "other", maps=(1, 20.0), source="/runs/B/checkpoints/last.pt")
    (section,) = detection.sections(detection.find(runs.find([tmp_path])[1]))
    rows = [row[:2] for row in section.tables[0].formatted()]
    assert rows == [["resnet-18, from A/last.pt", "40.00 (n=1)"], ["resnet-18, from B/last.pt", "20.00 (n=1)"]]
    assert "is the same run as" in page.markdown_table(section.tables[0])


def test_weights_and_results_in_folders_of_one_name_are_told_apart(tmp_path):
    """In the rows of both tables, in the figure's legend and over the columns of the classes."""
    sources = [f"/d/{place}/checkpoints/last.pt" for place in ("a/run", "b/run", "c")]
    for source in [*sources, "/w/x/r18.pt", "/w/y/r18.pt"]:
        run = detector_run(tmp_path / source.replace("/", "-"), source=source, label="cells")
        leave_result(run, "last.json", data="cells", tested="test", map50=30.0, classes=2)
    (section,) = detection.sections(detection.find(runs.find([tmp_path])[1]))
    weights, results, classes = section.tables
    names = ["a/run/last.pt", "b/run/last.pt", "c/last.pt", "x/r18.pt", "y/r18.pt"]
    assert [row[0] for row in weights.rows] == [f"resnet-18, from {name}" for name in names]
    legend = section.figures[0].draw().axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [f"resnet-18, from {name}" for name in names]
    assert results.header[-1] == "file"
    assert len({row[-1] for row in results.rows}) == 5
    assert len({*classes.header}) == len(classes.header) == 2 + 5


def test_localizers_of_one_seed_are_told_apart_in_the_legend(tmp_path):
    group = [
        localization.Localizer(tmp_path, path, "digits", "rpn", 0, 9, [{"iteration": 9, "error": 1.0}], [], 7, "", "")
        for path in ("a/rpn", "b/rpn")
    ]
    (section,) = localization.sections(group)
    legend = section.figures[0].draw().axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["RPN, seed 0; a/rpn", "RPN, seed 0; b/rpn"]


def test_a_report_says_how_often_broken_images_were_replaced(tmp_path, monkeypatch):
    for place in (make(tmp_path / "runs/a"), detector_run(tmp_path / "runs")):
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        lines[0] |= {"skipped": 1200}
        lines[1] |= {"skipped": 3 if lines[1]["split"] == "train" else 7}  # those of a test are no replaced ones
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make(tmp_path / "runs/b", seed=1)
    text = report_of(tmp_path / "runs", monkeypatch)
    for count, name in (("1,203", "a"), ("1,200", "resnet-False-0")):
        assert f"; broken training images were replaced by others {count} times; runs/{name}: `" in text
    assert text.count("replaced") == 2
    rows = csv.DictReader((tmp_path / "runs/out/runs.csv").read_text().splitlines())
    assert [row["broken images replaced"] for row in rows] == ["1203", "0"]
    (tmp_path / "runs/a/metrics.jsonl").write_text(
        (tmp_path / "runs/a/metrics.jsonl").read_text().replace("1200", "NaN")
    )
    with pytest.raises(UserError, match="holds other things than a run of resnet-train leaves"):
        runs.find([tmp_path / "runs"])


def test_a_broken_run_of_a_detector_is_named(tmp_path):
    place = detector_run(tmp_path)
    config = json.loads((place / "config.json").read_text())
    del config["depth"]
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds other things than a run of resnet-detect"):
        detection.find({place: ("run", read_metrics(place / "metrics.jsonl"))})
