"""Errors are exact counts, under each protocol."""

import copy
import itertools
import json
import re
import shutil

import hydra
import pytest
import torch
from conftest import entries
from distributed_worker import composed
from omegaconf import OmegaConf
from test_sets import SHAPES, photograph
from torchvision.transforms.v2 import functional as TF

from resnet_train.classification.command import evaluate_checkpoint
from resnet_train.classification.evaluate import Count, count_errors, probabilities, wrong_answers
from resnet_train.classification.run import build
from resnet_train.config.commands import check_eval
from resnet_train.config.options import CONFIG_DIR
from resnet_train.config.train import config_from_checkpoint
from resnet_train.data.augment import IMAGENET_MEAN
from resnet_train.data.decode import read_image
from resnet_train.data.streaming import StreamingDataset
from resnet_train.data.views import BatchOrder, same_shape
from resnet_train.engine import checkpoint
from resnet_train.errors import UserError
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.batchnorm import average_statistics, use_group_batch_norm


def test_wrong_answers_by_hand():
    logits = torch.eye(7) * 5 - torch.arange(7.0) * 0.1
    labels = torch.tensor([0, 1, 2, 0, 6, -1, 6])
    # rows 0, 1, 2 and 6 are right; row 3 says 3 for 0 (0 is second); row 4 says 4 for 6 (6 is last); row 5 is no image
    assert wrong_answers(logits, labels).tolist() == [2, 1]


def test_top5_of_three_classes_is_never_wrong():
    assert wrong_answers(torch.randn(9, 3), torch.arange(9) % 3)[1] == 0


def test_error_is_wrong_over_seen():
    count = Count(wrong=3, wrong5=1, seen=8, loss_sum=4.0)
    assert (count.error, count.error5, count.loss) == (37.5, 12.5, 0.5)


def test_the_count_is_that_of_a_plain_loop_whatever_fills_the_last_batch():
    torch.manual_seed(0)
    model = cifar_resnet(8, "A")
    images, labels = torch.randn(23, 3, 32, 32), torch.randint(0, 10, (23,))
    model.train()
    count = count_errors(model, batches(images, labels, 10), "fp32", 23)
    assert model.training
    model.eval()
    with torch.no_grad():
        answers = model(images).argmax(1)
        loss = torch.nn.functional.cross_entropy(model(images), labels).item()
    assert (count.wrong, count.seen) == (int((answers != labels).sum()), 23)
    assert abs(count.loss - loss) < 1e-5


def test_evaluation_leaves_the_running_statistics_alone():
    model = cifar_resnet(8, "A").train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    count_errors(model, batches(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64), 4), "bf16", 8)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def breaking():
    """Batches that come to a bad end."""
    yield torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    raise UserError("no more")


@pytest.mark.parametrize("was_training", [True, False])
@pytest.mark.parametrize("last", [None, "layer1", "layer3"])
def test_training_mode_is_after_an_evaluation_what_it_was_before(was_training, last):
    """Of every module, the frozen ones too, however the evaluation ends; while it lasts, none trains."""
    model = cifar_resnet(8, "A")
    use_group_batch_norm(model, 4)
    if last is not None:
        model.freeze(last)
    model.train(was_training)
    before, seen = [module.training for module in model.modules()], []
    assert any(before) == was_training
    model.fc.register_forward_hook(lambda *_: seen.append(any(module.training for module in model.modules())))
    images, labels = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    count_errors(model, [(images, labels)], "fp32", 4)
    views = [([(images, torch.arange(4))], labels)]
    assert len(list(probabilities(model, views, "fp32"))) == 1
    with pytest.raises(UserError, match="no more"):
        count_errors(model, breaking(), "fp32", 4)
    assert seen == [False] * 3
    assert [module.training for module in model.modules()] == before
    average_statistics(model, (model(images) for _ in range(2)), 2)
    assert [module.training for module in model.modules()] == before


def batches(images, labels, size):
    for first in range(0, len(images), size):
        part, truth = images[first : first + size], labels[first : first + size]
        fill = size - len(part)
        yield torch.cat([part, part[:1].expand(fill, -1, -1, -1)]), torch.cat([truth, truth.new_full((fill,), -1)])


# Protocols of section 3.4


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Nine photographs to test and some to train, of seven shapes, as sets of 32 px."""
    root = tmp_path_factory.mktemp("photographs")
    for part, count in (("train", 8), ("val", 9)):
        for number in range(count):
            photograph(root / part / f"class-{number % 3}" / f"{number}.JPEG", SHAPES[number % len(SHAPES)], number)
    return StreamingDataset(root=str(root), size=32, validation=0, workers=0)


def net(seed):
    """An ImageNet net for three classes that tells images apart."""
    torch.manual_seed(seed)
    model = imagenet_resnet(18, "B", num_classes=3).double()
    model(torch.randn(8, 3, 64, 64).double())  # moves the running statistics
    model.fc.weight.data.mul_(20)
    return model.eval()


def by_hand(model, sets, views):
    """The mean softmax of all `views` of each test photograph, one at a time, through torchvision's transforms."""
    found = []
    for path, _ in entries(sets.parts["test"]):
        mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        scores = [model(((view.double() - mean) / 255)[None]).softmax(1) for view in views(read_image(path))]
        found.append(torch.cat(scores).mean(0))
    return torch.stack(found)


def ten(image):
    return with_mirrored(TF.five_crop(TF.resize(image, [round(32 * 256 / 224)], antialias=True), [32, 32]))


def scales(image):
    return with_mirrored(
        TF.resize(image, [round(32 * side / 224)], antialias=True) for side in (224, 256, 384, 480, 640)
    )


def with_mirrored(views):
    return [both for view in views for both in (view, TF.horizontal_flip(view))]


def viewed(protocol, model, sets, batch_size=20, rank=0, world=1, precision="fp64"):
    views = sets.eval_views(protocol, "test", sets.mean_image(), torch.device("cpu"), batch_size, rank, world)
    return list(probabilities(model, views, precision))


@pytest.mark.parametrize(("protocol", "views"), [("tencrop", ten), ("multiscale", scales)])
@torch.no_grad()
def test_a_protocol_is_the_average_over_its_views(protocol, views, photographs):
    model = net(0)
    expected = by_hand(model, photographs, views)
    assert (expected.amax(0) - expected.amin(0)).max() > 0.05
    for batch_size in (20, 1000):  # two at a time, and all at once
        found = torch.cat([p for p, _ in viewed(protocol, model, photographs, batch_size)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # images are float32


def test_the_mean_image_of_a_mirrored_view_is_not_mirrored(photographs):
    """As in training, where a crop is mirrored before the mean is subtracted."""
    torch.manual_seed(0)
    mean = torch.rand(32, 32, 3) * 255
    for views, _ in photographs.eval_views("tencrop", "test", mean, torch.device("cpu"), 20):
        for images, _ in views:
            plain, mirrored = (images + mean.permute(2, 0, 1) / 255).chunk(2)
            torch.testing.assert_close(mirrored, plain.flip(3))


@pytest.mark.parametrize("protocol", ["center", "tencrop", "multiscale"])
def test_processes_share_the_images_of_a_protocol(protocol, photographs):
    model = net(0).float()
    whole = viewed(protocol, model, photographs, precision="fp32")
    for world in (2, 3):
        dealt = [viewed(protocol, model, photographs, 20, rank, world, "fp32") for rank in range(world)]
        assert sum(map(len, dealt)) == len(whole)
        for number, (p, labels) in enumerate(whole):
            mine = dealt[number % world][number // world]
            assert torch.equal(mine[0], p)
            assert torch.equal(mine[1], labels)


def test_views_of_one_shape_go_together_and_not_too_many_at_once():
    wide, tall = torch.zeros(1, 4, 6, 3, dtype=torch.uint8), torch.ones(1, 6, 4, 3, dtype=torch.uint8)
    found = [
        (images.shape[1:3], whose.tolist())
        for images, whose in same_shape([[wide], [tall], [wide], [wide]], 96, torch.device("cpu"))
    ]
    assert found == [((4, 6), [0, 2]), ((4, 6), [3]), ((6, 4), [1])]  # 24 pixels and their mirror image: two in 96


def test_true_averages_are_those_of_the_batches_alone():
    torch.manual_seed(0)
    model, batches = cifar_resnet(8, "B"), [torch.randn(6, 3, 16, 16) * (n + 1) for n in range(3)]
    plain = copy.deepcopy(model).train()
    use_group_batch_norm(model, 6)
    average_statistics(model.eval(), (model(images) for images in batches), 3)
    assert not model.training
    means = {name: 0 for name, _ in plain.named_buffers() if "running" in name}
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the last batch alone
    for images in batches:
        plain(images)
        means = {name: total + plain.get_buffer(name) / 3 for name, total in means.items()}
    for name, mean in means.items():
        torch.testing.assert_close(model.get_buffer(name), mean, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def saved(photographs, tmp_path_factory):
    """Checkpoints of two nets for the photographs, and of one for digits, as they begin."""
    folder, root = tmp_path_factory.mktemp("saved"), entries(photographs.parts["test"])[0][0].parents[2]
    images = ["depth=18", "data=imagenet", f"data.root={root}", "data.size=32", "data.workers=0", "batch_size=4"]
    images += ["augment.shorter_side=[36,40]", "eval_batch_size=20", "normalise=channels"]
    nets = {"0": images, "1": [*images, "seed=1", "arch=plain"], "digits": ["data=digits"]}
    nets["in groups of 2"] = [*images, "bn_images=2"]
    nets["in memory"] = ["depth=8", "data=imagefolder", f"data.root={root}", "data.validation=2", "batch_size=4"]
    for name, words in nets.items():
        run = build(composed(*words, "device=cpu", "precision=fp32"))
        checkpoint.save(folder / name / "last.pt", run.state())
    return folder


def measured(folder, monkeypatch, *words):
    """What `resnet-eval` does in this process."""
    monkeypatch.chdir(folder)
    with hydra.initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        values = OmegaConf.to_container(hydra.compose("eval", [*words, "device=cpu"]))
    evaluate_checkpoint(check_eval(values))


@pytest.fixture(scope="module")
def alone(photographs, tmp_path_factory):
    """A tree that has the test photographs, in val/, and no others."""
    root = tmp_path_factory.mktemp("alone")
    shutil.copytree(entries(photographs.parts["test"])[0][0].parents[1], root / "val")
    return root


@pytest.mark.parametrize(
    ("name", "train"),
    [("0", None), ("0", ["class-0", "class-2"]), ("in memory", []), ("in memory", ["class-0", "class-2"])],
    ids=["no train", "part of train", "empty train, in memory", "part of train, in memory"],
)
def test_a_test_part_alone_is_enough_for_a_test(name, train, saved, alone, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(alone, tmp_path / "tree")
    for folder in ["", *train] if train is not None else []:
        (root / "train" / folder).mkdir()
    found = []
    for place, words in (("all", []), ("part", [f"data.root={root}"])):
        out = saved / name / f"{place}.json"
        measured(saved, monkeypatch, f"checkpoint='{name}/last.pt'", *words, f"out='{out}'", "details=true")
        result, rows = json.loads(out.read_text()), out.with_name(f"{place}-predictions.csv").read_text()
        found.append({key: result[key] for key in ("wrong", "seen", "loss")} | {"rows": rows})
    assert found[0] == found[1]
    assert found[0]["seen"] == 9
    assert "note" not in capsys.readouterr().out  # of other images


def test_classes_that_differ_are_named(saved, alone, tmp_path, monkeypatch):
    root = shutil.copytree(alone, tmp_path / "tree")
    (root / "val/class-1").rename(root / "val/klass-1")
    wanted = "data: tree has 3 classes, the checkpoint was trained on 3; missing: class-1; unknown: klass-1"
    with pytest.raises(UserError, match=wanted):
        measured(saved, monkeypatch, "checkpoint=0/last.pt", f"data.root={root}")


def test_a_net_is_not_compiled_for_each_of_many_shapes(saved, monkeypatch, tmp_path):
    state = checkpoint.load(saved / "0/last.pt")
    checkpoint.save(saved / "compiled/last.pt", state | {"measure": state["measure"] | {"compile": True}})
    found = {}
    for name in ("0", "compiled"):
        out = tmp_path / f"{name}.json"
        measured(saved, monkeypatch, f"checkpoint={name}/last.pt", "protocol=multiscale", f"out={out}")
        found[name] = {key: json.loads(out.read_text())[key] for key in ("compile", "wrong", "loss")}
    assert found["compiled"] == found["0"]
    assert not found["0"]["compile"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["split=train"], "split=train: .* has a test part alone; use split=test"),
        (["split=val"], "split=val: .* has a test part alone; use split=test"),
        (["precise_bn=3"], "precise_bn=3: needs training images, and .* has a test part alone"),
    ],
)
def test_what_needs_training_images_is_refused_without_them(words, expected, saved, alone, monkeypatch):
    with pytest.raises(UserError, match=expected):
        measured(saved, monkeypatch, "checkpoint=0/last.pt", f"data.root={alone}", *words)


def test_other_members_and_other_images_of_one_name_do_not_take_the_place_of_a_result(
    saved, alone, tmp_path, monkeypatch
):
    folder = shutil.copytree(saved, tmp_path / "saved", ignore=shutil.ignore_patterns("*.json"))
    for place in ("a", "b"):
        shutil.copytree(alone, tmp_path / place / "photos")
        (tmp_path / place / "photos/val/class-0" / f"{place}.JPEG").write_bytes(b"")
        (tmp_path / place / "photos/val/class-0/0.JPEG").rename(tmp_path / place / f"photos/val/class-0/{place}.JPEG")
        measured(folder, monkeypatch, "checkpoint=0/last.pt", f"data.root={tmp_path}/{place}/photos")
    for members in ("[0/last.pt,1/last.pt]", "[0/last.pt,'in groups of 2/last.pt']", "[0/last.pt,1/last.pt]"):
        measured(folder, monkeypatch, f"checkpoint={members}")
    names = sorted(re.sub("-[0-9a-f]{6}-", "-#-", path.name) for path in (folder / "0").glob("*.json"))
    assert names == 2 * ["ensemble-of-2-#-test.json"] + 2 * ["last-photos-#-test.json"]


def test_images_that_a_checkpoint_was_trained_on_and_that_are_elsewhere_are_named(saved, tmp_path, monkeypatch):
    state = checkpoint.load(saved / "0/last.pt")
    state["config"]["data"]["root"] = "/gone/photos"
    checkpoint.save(tmp_path / "last.pt", {key: value for key, value in state.items() if key != "format"})
    with pytest.raises(UserError, match="the net was trained on these data"):
        measured(tmp_path, monkeypatch, "checkpoint=last.pt")


def test_an_ensemble_and_its_members_under_a_protocol(saved, photographs, monkeypatch, capsys):
    measured(saved, monkeypatch, "checkpoint=[0/last.pt,1/last.pt]", "protocol=tencrop", "precise_bn=3")
    told = capsys.readouterr().out
    (path,) = (saved / "0").glob("ensemble-of-2-??????-tencrop-precise-bn-3-test.json")
    result = json.loads(path.read_text())
    assert (result["net"], result["protocol"], result["seen"]) == ("ensemble of 2", "10-crop", 9)
    assert [(m["net"], m["seed"], m["iteration"]) for m in result["members"]] == [
        ("resnet-18-B", 0, 0),
        ("plain-18", 1, 0),
    ]
    assert "resnet-18-B (seed 0, iteration 0) + plain-18 (seed 1, iteration 0)" in told
    nets = []
    for name, arch in (("0", "B"), ("1", "none")):
        state = checkpoint.load(saved / name / "last.pt")
        model, config = imagenet_resnet(18, arch, num_classes=3), config_from_checkpoint(state["config"])
        model.load_state_dict(state["model"])
        use_group_batch_norm(model, 4)
        order = BatchOrder(config.seed, 4, config.augment)
        batches = photographs.train_batches(photographs.mean_image(), torch.device("cpu"), order)
        average_statistics(model, (model(images) for images, _ in itertools.islice(batches, 3)), 3)
        nets.append(model.eval())
    with torch.no_grad():
        found = [torch.cat([p for p, _ in viewed("tencrop", n, photographs, precision="fp32")]) for n in nets]
        scores = (found[0] + found[1]) / 2
    labels = torch.tensor([label for _, label in entries(photographs.parts["test"])])
    assert result["wrong"] == int((scores.argmax(1) != labels).sum())
    assert result["loss"] == pytest.approx(-scores[range(9), labels].log().mean().item(), rel=1e-3)


def changed(path, to, change):
    """The checkpoint `path` with `change` made to its content, as the file `to`."""
    state = checkpoint.load(path)
    change(state)
    checkpoint.save(to, {key: value for key, value in state.items() if key not in ("format", "path")})
    return to


def test_members_that_were_tested_in_batches_of_other_sizes_are_an_ensemble(saved, tmp_path, monkeypatch):
    results = {"center": [], "tencrop": []}  # for each size and order of the members
    for size in (20, 4):
        other = changed(
            saved / "1/last.pt",
            tmp_path / f"{size}.pt",
            lambda state, size=size: state["config"].update(eval_batch_size=size),
        )
        out = tmp_path / f"{size}.json"
        for members in (f"[0/last.pt,{other}]", f"[{other},0/last.pt]"):
            for protocol, measures in results.items():
                measured(saved, monkeypatch, f"checkpoint={members}", f"out={out}", f"protocol={protocol}")
                result = json.loads(out.read_text())
                assert result["seen"] == 9
                measures.append((result["wrong"], result["loss"]))
    for measures in results.values():
        assert [wrong for wrong, _ in measures] == [measures[0][0]] * 4
        assert [loss for _, loss in measures] == pytest.approx([measures[0][1]] * 4, rel=1e-5)


def test_algorithms_are_chosen_by_timing_only_for_shapes_that_do_not_vary(saved, monkeypatch):
    """With each new shape cuDNN would time all of them again."""
    for protocol, fixed in (("center", True), ("multiscale", False), ("tencrop", True)):
        measured(saved, monkeypatch, "checkpoint=0/last.pt", f"protocol={protocol}", f"out={saved}/{protocol}.json")
        assert torch.backends.cudnn.benchmark == fixed, protocol


def test_members_of_other_classes_are_refused_before_a_test(saved, tmp_path, monkeypatch):
    other = changed(saved / "1/last.pt", tmp_path / "other.pt", lambda state: state["classes"].reverse())
    with pytest.raises(UserError, match=r"checkpoint: 0/last.pt and .*other.pt have different classes"):
        measured(saved, monkeypatch, f"checkpoint=[0/last.pt,{other}]")


@pytest.mark.parametrize("images", [0, -3, True, 2.5])
def test_statistics_over_no_images_are_refused(images, saved, tmp_path, monkeypatch):
    broken = changed(saved / "0/last.pt", tmp_path / "x.pt", lambda state: state["measure"].update(bn_images=images))
    with pytest.raises(UserError, match=rf"x.pt: does not match this network .*over {images} images"):
        measured(saved, monkeypatch, f"checkpoint={broken}", "precise_bn=2")


def test_true_averages_are_over_groups_as_in_training(saved, photographs, monkeypatch):
    """Groups of 2 of the batches of 4."""
    measured(saved, monkeypatch, "checkpoint='in groups of 2/last.pt'", "precise_bn=5")
    result = json.loads((saved / "in groups of 2" / "last-precise-bn-5-test.json").read_text())

    def loss(group):
        state = checkpoint.load(saved / "in groups of 2" / "last.pt")
        model = imagenet_resnet(18, num_classes=3)
        model.load_state_dict(state["model"])
        use_group_batch_norm(model, group)
        mean, device = photographs.mean_image(), torch.device("cpu")
        order = BatchOrder(0, group, config_from_checkpoint(state["config"]).augment)
        batches = photographs.train_batches(mean, device, order)
        average_statistics(model, (model(images) for images, _ in itertools.islice(batches, 5)), 5)
        return count_errors(model, photographs.eval_batches("test", mean, device, 20), "fp32", 9).loss

    assert result["loss"] == pytest.approx(loss(2), rel=1e-5)
    assert result["loss"] != pytest.approx(loss(4), rel=1e-3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["checkpoint=digits/last.pt", "protocol=tencrop"], "protocol=tencrop: is for ImageNet nets"),
        (["checkpoint=[0/last.pt,digits/last.pt]"], "an ensemble looks at the same images"),
        (["checkpoint=0/last.pt", "split=val"], "split=val: no part of the training set was held out"),
    ],
)
def test_what_cannot_be_tested_is_refused(words, expected, saved, monkeypatch):
    with pytest.raises(UserError, match=expected):
        measured(saved, monkeypatch, *words)
