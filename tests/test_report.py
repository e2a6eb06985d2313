"""The report: means by hand, verdicts with reasons, nothing in a row that does not belong there, no source touched."""

import csv
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from resnet_train import cli, paper
from resnet_train.compose import CONFIG_DIR, compose
from resnet_train.config.keys import flat
from resnet_train.errors import UserError
from resnet_train.report import detection, runs, tables, verdict
from resnet_train.report.complexity import complexity_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "cifar10_jpeg" / "runs"
CONFIG = json.loads((RESULTS / "plain-20" / "bf16-seed-0" / "config.json").read_text())


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
    assert "| 9.00 ± 1.00 (n=3) | 0.25 |" in table.markdown()
    (line,) = csv.DictReader(table.csv().splitlines())
    assert [line["ours, last (single view)" + end] for end in ("", ": std", ": n")] == ["9.0", "1.0", "3"]
    assert not any("Not comparable" in note for note in table.notes)


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
    assert notes == [f"{tmp_path / 'b'}: is the same run as {tmp_path / 'a'} (resnet-20-A, seed 0), left out"]


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
    assert runs.deviations(run) == [
        ("data", "cifar10_jpeg", "cifar10"),
        ("weight_decay", "0.0005", "0.0001"),
        ("iterations", "6400", "64000"),
    ]
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
    """The verdict on runs of 20 and 56 layers with these (training, test) errors, one for each seed."""
    nets = (f"{kind}-20", f"{kind}-56") if kind == "plain" else (f"{kind}-20-A", f"{kind}-56-A")
    for net, errors in zip(nets, (shallow, deep), strict=True):
        for seed, (train, test) in enumerate(errors):
            make(folder / net / str(seed), net, seed, test, train, **changes)
    (found,) = verdict.verdicts(runs.find([folder])[0])
    return found


def test_degradation_is_shown(tmp_path):
    seen = pair(tmp_path, [(5.0, 9.0), (5.2, 9.2)], [(8.0, 13.0), (8.2, 13.2)])
    assert seen.worse is True
    assert seen.words.startswith("shown: the deeper net is worse in both: training error 5.10 % ± 0.14 (n=2) at 20")
    assert "difference +3.00, spread 0.20" in seen.words  # the std of the difference of two runs


def test_a_better_deep_net_shows_none(tmp_path):
    seen = pair(tmp_path, [(5.0, 9.0), (5.2, 9.2)], [(2.0, 7.0)], "resnet")
    assert seen.worse is False
    assert seen.words.startswith("not seen: the deeper net is better in both")


def test_not_shown_where_the_spread_is_too_large(tmp_path):
    seen = pair(tmp_path, [(5.0, 9.0), (5.2, 12.0)], [(8.0, 13.0), (8.2, 10.0)])
    assert seen.worse is None
    assert seen.words.startswith("not shown (the difference in test error is not above 2 times its spread over seeds)")


def test_not_shown_with_one_seed_each(tmp_path):
    seen = pair(tmp_path, [(5.0, 9.0)], [(8.0, 13.0)])
    assert seen.worse is None
    assert "one seed each, so the spread over seeds is unknown" in seen.words


def test_one_net_with_two_seeds_lends_its_spread(tmp_path):
    seen = pair(tmp_path / "a", [(5.0, 9.0), (5.2, 9.2)], [(8.0, 13.0)])
    assert seen.worse is True
    assert seen.words.count("spread 0.20") == 2  # the std of one, 0.14, in both: times the root of two
    seen = pair(tmp_path / "b", [(5.0, 9.0), (5.2, 9.2)], [(5.45, 9.45)])
    assert (seen.worse, seen.words.count("is not above 2 times its spread")) == (None, 2)  # 0.35, above 2 times 0.14


def test_not_shown_where_training_and_test_disagree(tmp_path):
    seen = pair(tmp_path, [(5.0, 13.0), (5.2, 13.2)], [(8.0, 9.0), (8.2, 9.2)])
    assert seen.worse is None
    assert "training and test error disagree" in seen.words


def test_not_shown_where_runs_are_too_short(tmp_path):
    still_falling = pair(tmp_path / "a", [(5.0, 9.0), (5.2, 9.2)], [(8.0, 13.0), (8.2, 13.2)], gain=4.0)
    assert still_falling.worse is None
    assert "still fell by 4.00 points in the last 5 % of the iterations" in still_falling.words
    tiny = pair(tmp_path / "b", [(5.0, 9.0), (5.2, 9.2)], [(8.0, 13.0), (8.2, 13.2)], iterations=600)
    assert tiny.worse is None
    assert "too short, below 1 % of the paper's iterations" in tiny.words


def test_not_shown_where_a_run_is_unfinished(tmp_path):
    seen = pair(tmp_path, [(5.0, 9.0), (5.2, 9.2)], [(8.0, 13.0)], until=40_000)
    assert (seen.worse, seen.words) == (None, "not shown: no run of plain-20 is finished")


def test_the_sentence_of_figure_6(tmp_path):
    pair(tmp_path / "p", [(5.0, 9.0), (5.2, 9.2)], [(8.0, 13.0)])
    pair(tmp_path / "r", [(5.0, 9.0), (5.2, 9.2)], [(2.0, 7.0)], "resnet")
    everything = runs.find([tmp_path])[0]
    said = "Degradation in plain nets: shown. Residual nets: the deeper, the better: shown."
    assert verdict.summary(everything) == said
    order = verdict.ordering(everything)
    assert order.endswith("here: resnet-56-A, resnet-20-A; in table 6: resnet-56-A, resnet-20-A: the same order.")


# --- ImageNet: what only resnet-eval can say -------------------------------------------------------------------------


def photos(folder, net, error, view=None):
    """A finished run on ImageNet, and perhaps what resnet-eval has found for it."""
    make(folder, net, test=error, data="imagenet", iterations=600_000, until=600_000)
    values = json.loads((folder / "config.json").read_text())
    values["data"] |= {"family": "imagenet", "name": "imagenet"}
    (folder / "config.json").write_text(json.dumps(values))
    text = (folder / "metrics.jsonl").read_text().replace("single view", "center crop")
    (folder / "metrics.jsonl").write_text(text)
    if view:
        result = {"net": net, "data": "imagenet", "split": "test", "protocol": view, "seed": 0, "iteration": 600_000}
        (folder / "checkpoints").mkdir()
        told = json.dumps(result | {"wrong": 1, "seen": 4, "error": 25.0, "error5": 7.5})
        (folder / "checkpoints" / "last-tencrop-test.json").write_text(told)


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
    command = f"resnet-eval protocol=tencrop checkpoint={tmp_path}/b/checkpoints/last.pt"
    assert any(note.endswith(command) for note in table.notes)
    table = tables.errors_table(found(tmp_path), "table 4", "")
    assert row(table, "resnet-34-B")["ours, last (multi-scale)"] is None
    assert [note for note in table.notes if "protocol=multiscale" in note]
    assert "protocol=multiscale checkpoint=" in tables.ensemble_table(found(tmp_path), "").notes[0]


@pytest.mark.parametrize(
    "other",
    [
        {"iteration": 300_000},
        {"batch_norm": "averages over 200 training batches"},
        {"data": "imagenet-v2"},
        {"split": "val"},
        {"protocol": "multi-scale"},
        {"members": []},
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


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The committed runs and what is made of them, with what a child found: no torch, sources untouched."""
    out = tmp_path_factory.mktemp("report") / "out"
    before = digest(RESULTS)
    code = "import sys; from resnet_train import cli\ntry: cli.report()\nfinally: assert 'torch' not in sys.modules"
    words = [sys.executable, "-W", "error", "-c", code, str(RESULTS), f"out={out}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert digest(RESULTS) == before
    return out


def test_the_report_of_the_committed_runs(reported):
    names = {path.name for path in reported.iterdir()}
    assert {"index.html", "report.md", "table-6.csv", "deviations.csv", "runs.csv"} <= names
    assert {f"figure-{number}.{kind}" for number in (1, 6) for kind in ("png", "svg")} <= names
    assert not [name for name in names if name.startswith(".")]
    for table, net, precision in (
        ("table-6.csv", "plain-20", "bf16"),
        ("table-6.csv", "resnet-20-A", "bf16"),
        ("table-6-2.csv", "resnet-20-A", "fp32"),
    ):
        rows = {line["net"]: line for line in csv.DictReader((reported / table).read_text().splitlines())}
        ends = [json.loads(path.read_text()) for path in RESULTS.glob(f"{net}/{precision}-*/summary.json")]
        errors = [end["last"]["test"]["error"] for end in ends]
        assert len(errors) > 1
        found = rows[net]["ours, last (single view)"].split()[0]
        assert float(found) == pytest.approx(sum(errors) / len(errors), abs=5e-4)


def test_shortened_runs_and_copies_are_called_so_everywhere(reported):
    for name in ("index.html", "report.md"):
        text = (reported / name).read_text().replace("&#x27;", "'")
        assert "SHORTENED: 3,906 of the paper's 64,000 iterations (6.1 %)" in text
        assert "cifar10_jpeg is not CIFAR-10" in text
        assert "depth=20 arch=plain precision=bf16 seed=1" in text
    page = (reported / "index.html").read_text()
    assert '<p class="warning">SHORTENED' in page


def test_the_page_needs_no_network(reported):
    page = (reported / "index.html").read_text()
    assert not re.findall(r"""<(?:script|img|link)[^>]*(?:src|href)=["'](?!data:)""", page)
    assert "Bokeh" in page
    assert len(page) < 3_000_000


def test_the_same_runs_give_the_same_figures(reported, command, tmp_path):
    done = command(str(RESULTS), "out=again", entry="report")
    assert done.returncode == 0, done.stderr
    for name in ("figure-1.svg", "figure-6.svg", "table-6.csv", "deviations.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (reported / name).read_bytes(), name


def test_wrong_words_are_one_line(tmp_path, monkeypatch, capsys):
    make(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    fresh = make(tmp_path / "fresh" / "run")
    (fresh / "metrics.jsonl").unlink()
    broken = make(tmp_path / "broken")
    text = (broken / "metrics.jsonl").read_text().split("\n")
    (broken / "metrics.jsonl").write_text("\n".join([text[0], "nonsense", *text[1:]]))
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
        "broken": "broken/metrics.jsonl: line 2 is no JSON",
        "other": "other: holds other things than a run",
        "run out=file": "out=file: is not a folder that you may write to",
        "run out=run/report": "out=run/report: lies in the run run",
        "run out=/proc/x": "out=/proc/x: ",
        "run oot=x": "did you mean out?",
        "complexity run": "drop run",
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


def detector_run(folder, *, backbone="resnet", seed=0, maps=(10.0, 40.0), iterations=100, finished=True, source=None):
    """What resnet-detect leaves of a run, in small."""
    data = {"name": "voc", "root": "/d/bccd", "train": ["trainval"], "test": "test", "classes": None}
    config = {"data": data, "backbone": backbone, "depth": 18, "pyramid": False, "init_from": source, "seed": seed}
    config |= dict.fromkeys(detection.SETTING, 1) | {"iterations": iterations}
    place = folder / f"{backbone}-{source is not None}-{seed}"
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    steps = [iterations // 2, iterations if finished else iterations - 1]
    lines = [{"iteration": 1, "split": "train", "data": "bccd", "seed": seed, "loss": 1.0}]
    for iteration, value in zip(steps, maps, strict=True):
        lines.append({"iteration": iteration, "split": "test", "data": "bccd", "map07": value, "map10": value + 1})
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def test_detectors_stand_in_table_7_with_the_mean_over_seeds_beside_the_papers(tmp_path):
    detector_run(tmp_path, maps=(1, 40.0), source="/w/r18.pt")
    detector_run(tmp_path, maps=(1, 42.0), seed=1, source="/w/r18.pt")
    detector_run(tmp_path, maps=(1, 30.0), seed=2, source="/w/r18.pt", finished=False)
    detector_run(tmp_path, backbone="vgg16", maps=(1, 20.0))
    _, places, _ = runs.find([tmp_path])
    (section,) = detection.sections(detection.find(places), tmp_path)
    (table,) = section.tables
    assert table.name == "table-7"
    assert table.shown() == [
        ["resnet-18, from r18.pt", "41.00 ± 1.41 (n=2)", "42.00 ± 1.41 (n=2)", tables.NOTHING, tables.NOTHING],
        ["vgg-16, random weights", "20.00 (n=1)", "21.00 (n=1)", "73.20", "70.40"],
    ]
    text = table.markdown()
    assert "seed 2: unfinished; in no mean" in text
    assert "random weights in place of ImageNet's" in text
    assert "100 iterations, not 80,000" in text
    assert section.warnings == ["SHORTENED: 100 of the paper's 80,000 iterations"]
    assert (tmp_path / "detection.png").read_bytes()[:4] == b"\x89PNG"


def test_a_report_may_be_of_detectors_alone(tmp_path, monkeypatch):
    detector_run(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["resnet-report", "runs", "out=out"])
    cli.report()
    assert "Table 7: mAP in %, bccd" in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/table-7.csv").read_text().splitlines()[1].startswith('"resnet-18, random weights",40.0')
    assert "Detection on bccd: 1 run of 100 iterations" in (tmp_path / "out/index.html").read_text()


def test_detectors_of_other_settings_stand_apart(tmp_path):
    detector_run(tmp_path, maps=(1, 40.0))
    detector_run(tmp_path, maps=(1, 40.0), seed=1, iterations=200)
    found = detection.sections(detection.find(runs.find([tmp_path])[1]), tmp_path)
    assert [section.tables[0].name for section in found] == ["table-7", "table-7-2"]


def test_other_weights_are_another_row_and_one_run_counts_once(tmp_path):
    detector_run(tmp_path, maps=(1, 40.0), source="/runs/A/checkpoints/last.pt")
    detector_run(tmp_path / "again", maps=(1, 40.0), source="/runs/A/checkpoints/last.pt")
    detector_run(tmp_path / "other", maps=(1, 20.0), source="/runs/B/checkpoints/last.pt")
    (section,) = detection.sections(detection.find(runs.find([tmp_path])[1]), tmp_path)
    rows = [row[:2] for row in section.tables[0].shown()]
    assert rows == [["resnet-18, from A/last.pt", "40.00 (n=1)"], ["resnet-18, from B/last.pt", "20.00 (n=1)"]]
    assert "is the same run as" in section.tables[0].markdown()


def test_a_broken_run_of_a_detector_is_named(tmp_path):
    place = detector_run(tmp_path)
    config = json.loads((place / "config.json").read_text())
    del config["depth"]
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds other things than a run of resnet-detect"):
        detection.find([place])


def test_the_gap_between_depths_is_told_of_plain_and_of_residual_nets(tmp_path):
    for net, train in (("plain-20", 10.0), ("plain-56", 25.0), ("resnet-20-A", 8.0), ("resnet-56-A", 6.5)):
        make(tmp_path / net, net, train=train)
    told = verdict.gaps(found(tmp_path))
    assert "From 20 to 56 layers the training error changes by +15.00 points in plain nets and by -1.50" in told
    assert verdict.gaps(found(tmp_path / "plain-20")) == ""


def test_the_sentence_on_shortened_runs_says_how_little_it_says(tmp_path):
    make(tmp_path / "a", "plain-20", iterations=6400, until=6400)
    make(tmp_path / "b", "plain-56", iterations=6400, until=6400, train=20.0, test=30.0)
    assert verdict.summary(found(tmp_path)).endswith("does not tell what the whole one gives.")
