"""Every figure and table of the paper is an experiment, whose jobs are exactly its nets and seeds."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from resnet_train import cli
from resnet_train.config.compose import compose
from resnet_train.config.options import CONFIG_DIR, groups
from resnet_train.config.train import scaled
from resnet_train.config.words import jobs_of, with_jobs
from resnet_train.dispatch import prepare
from resnet_train.errors import UserError

# Written out from the paper: net and seed of each run. Five runs of 110 layers (table 6), two nets of 152 (table 5).
SHALLOW = ("plain-20", "plain-32", "plain-44", "plain-56", "resnet-20-A", "resnet-32-A", "resnet-44-A", "resnet-56-A")
SINGLE = ("resnet-34-B", "resnet-34-C", "resnet-50-B", "resnet-101-B", "resnet-152-B")
EXPECTED = {
    "demo": {(net, 0) for net in ("plain-20", "plain-56", "resnet-20-A", "resnet-56-A")},
    "fig1": {("plain-20", 0), ("plain-56", 0)},
    "fig4": {("plain-18", 0), ("plain-34", 0), ("resnet-18-A", 0), ("resnet-34-A", 0)},
    "fig6": {(net, 0) for net in (*SHALLOW, "resnet-1202-A")} | {("resnet-110-A", seed) for seed in range(5)},
    "fig7": {(net, 0) for net in ("plain-20", "plain-56", "resnet-20-A", "resnet-56-A", "resnet-110-A")},
    "longer": {("plain-18", 0), ("plain-34", 0)},
    "table3": {(net, 0) for net in ("resnet-34-A", *SINGLE)},
    "table4": {(net, 0) for net in SINGLE},
    "table5": {(net, 0) for net in SINGLE} | {("resnet-152-B", 1)},
}
# The length of those that are not the paper's recipe: the demo, and three times the iterations of section 4.1.
LENGTH = {"demo": (500, 64), "longer": (1_800_000, 256)}
FILES = {path.stem: path for path in Path(CONFIG_DIR, "experiment").glob("*.yaml")}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """An empty folder, and in it two classes of photographs for the nets of ImageNet."""
    monkeypatch.chdir(tmp_path)
    for part in ("train/cat", "train/dog", "val/cat", "val/dog"):
        Path(part).mkdir(parents=True)
        Path(part, "0.png").touch()


def jobs(*words, monkeypatch):
    """The checked configuration and the folder of every job of a sweep, as the command comes to them."""
    monkeypatch.setattr("sys.argv", ["resnet-train", "-m", *words])
    overrides = with_jobs(list(words), True)
    found = []
    for one in jobs_of("train", overrides, True):
        found.append(prepare(cli.COMMANDS["train"], compose("train", one), one, True))
    return found


def test_every_figure_and_table_has_one():
    assert FILES.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_jobs_are_the_papers_nets_and_seeds(name, monkeypatch):
    root = "data.root=." if OmegaConf.load(FILES[name])["defaults"][0]["override /data"] == "imagenet" else "seed=0"
    words = [f"experiment={name}", *([root] if root != "seed=0" else [])]
    found = jobs(*words, monkeypatch=monkeypatch)
    assert sorted((run.net, run.seed) for run, _ in found) == sorted(EXPECTED[name])
    assert len({folder for _, folder in found}) == len(found)
    for run, folder in found:
        paper = (64_000, 128) if run.data.family == "cifar" else (600_000, 256)
        assert (run.iterations, run.batch_size) == LENGTH.get(name, paper)
        assert folder.parent.name == run.net, "TensorBoard groups by folder"


@pytest.mark.parametrize("name", sorted(LENGTH))
def test_other_lengths_lie_apart(name, monkeypatch):
    """So that they are not taken for the runs of the same nets in the paper's length, nor refused beside them."""
    root = ["data.root=."] if name == "longer" else []
    for run, folder in jobs(f"experiment={name}", *root, monkeypatch=monkeypatch):
        assert folder == Path("runs", name, run.net, "seed-0")
    seeds = jobs(f"experiment={name}", "seed=1,2", *root, monkeypatch=monkeypatch)
    assert len({folder for _, folder in seeds}) == len(seeds) == 2 * len(EXPECTED[name])


def test_the_demo_is_all_of_its_digits(monkeypatch):
    """Its settings were chosen on a held-out part, which is trained on now; nothing of the net is not the paper's."""
    for run, _ in jobs("experiment=demo", monkeypatch=monkeypatch):
        assert (run.data.name, run.data.validation, run.data.size) == ("digits", 0, 16)
        kept = (run.momentum, run.weight_decay, run.decay, run.zero_gamma, run.schedule.name, run.init)
        assert kept == (0.9, 1e-4, "all", False, "step", "fan_in")


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_opens_with_what_it_is_the_command_and_the_result(name):
    text = FILES[name].read_text()
    assert f"resnet-train -m experiment={name}" in text
    assert "# Expected" in text
    assert OmegaConf.load(FILES[name])["experiment"] == name


def test_a_job_is_the_same_run_without_its_experiment(monkeypatch):
    """So that figure 1 finds what figure 6 has trained."""
    (one, here), *_ = jobs("experiment=fig6", "job=resnet-56-A", monkeypatch=monkeypatch)
    words = ["depth=56"]
    other, there = prepare(cli.COMMANDS["train"], compose("train", words), words, False)
    assert (one, here) == (other, there)


def test_scale_shortens_all_that_counts_iterations(monkeypatch):
    words = ("experiment=fig1", "job=plain-20", "scale=0.1", "keep_every=5000")
    ((run, folder),) = jobs(*words, monkeypatch=monkeypatch)
    counts = (run.iterations, run.log_every, run.eval_every, run.checkpoint_every, run.keep_every)
    assert counts == (6400, 10, 40, 100, 500)
    assert run.schedule.drops == [0.5, 0.75]
    assert str(folder) == "runs/cifar10/plain-20/scale-0.1+seed-0"
    tiny = scaled(run, 1e-9)
    assert (tiny.iterations, tiny.log_every) == (1, 1)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("experiment=fig8", "did you mean fig"),
        ("experiment=fig6 job=plain-110", "job=plain-110: experiment=fig6 has plain-20, "),
        ("experiment=fig1,fig6", "one experiment at a time"),
        ("experiment=fig1 scale=0", "scale=0: must be above 0"),
        ("experiment=fig1 scale=10", "scale=10: must be at most 1"),
        ("experiment=fig1 scale=half", "scale=half: must be a number"),
        ("job=plain-20", "there is no key job"),
    ],
)
def test_wrong_words(words, named, monkeypatch):
    with pytest.raises(UserError) as error:
        jobs(*words.split(), monkeypatch=monkeypatch)
    assert named in str(error.value)


def test_an_experiment_without_m_names_its_jobs():
    with pytest.raises(
        UserError, match=r"experiment=fig1: has 2 jobs; add -m for all, or name one, as in job=plain-20"
    ):
        with_jobs(["experiment=fig1"], False)


@pytest.mark.parametrize("name", ["train", "bench"])
def test_the_help_names_every_option_of_every_group(name):
    """Hydra's own list would have the groups of resnet-detect, too."""
    text = (Path(CONFIG_DIR) / f"{name}.yaml").read_text()
    for group in groups(name):
        options = sorted(path.stem for path in Path(CONFIG_DIR, group).glob("*.yaml"))
        assert f"      {group}: {', '.join(options)}\n" in text
