"""Checkpoints are whole or absent, verified, and never run code."""

import os
import pickle
import zipfile

import pytest
import torch

from resnet_train import __version__
from resnet_train.engine import checkpoint
from resnet_train.engine.resume import load_newest
from resnet_train.errors import RunError, UserError
from resnet_train.models import cifar_resnet


def state(iteration=1):
    return {
        "config": {"depth": 20},
        "iteration": iteration,
        "model": {"weight": torch.arange(10_000.0)},
        "mean": torch.zeros(1),
        "classes": ["a", "b"],
        "label": "photos",
        "digest": "0",
        "measure": {"precision": "fp32", "compile": False},
    }


def test_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "last.pt", state(7))
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert loaded["iteration"] == 7
    assert torch.equal(loaded["model"]["weight"], torch.arange(10_000.0))


def test_equal_states_are_equal_files(tmp_path):
    checkpoint.save(tmp_path / "a.pt", state())
    checkpoint.save(tmp_path / "b.pt", state())
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_state_that_was_loaded_is_saved_as_the_same_file(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1, momentum=0.9)
    whole = {**state(), "config": {"momentum": 0.9, "lr": 0.1}, "optimizer": optimizer.state_dict()}
    checkpoint.save(tmp_path / "a.pt", whole)
    loaded = checkpoint.load(tmp_path / "a.pt")
    optimizer.load_state_dict(loaded["optimizer"])
    checkpoint.save(tmp_path / "b.pt", {**whole, "optimizer": optimizer.state_dict()})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_the_one_before_is_kept(tmp_path):
    for iteration in (1, 2, 3):
        checkpoint.save(tmp_path / "last.pt", state(iteration), keep_as=tmp_path / "previous.pt")
    assert checkpoint.load(tmp_path / "last.pt")["iteration"] == 3
    assert checkpoint.load(tmp_path / "previous.pt")["iteration"] == 2
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "previous.pt"]


def test_every_flipped_byte_of_the_weights_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state())
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda member: member.file_size)
        begin = info.header_offset + 200
    for place in range(begin, begin + info.file_size - 300, 4999):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError):
            checkpoint.load(path)
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut short or not a checkpoint"):
            checkpoint.load(path)


def test_a_damaged_last_gives_way_to_the_one_before(tmp_path, capsys):
    for iteration in (1, 2):
        checkpoint.save(tmp_path / "last.pt", state(iteration), keep_as=tmp_path / "previous.pt")
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-50])
    path, loaded = load_newest(tmp_path)
    assert (path.name, loaded["iteration"]) == ("previous.pt", 1)
    assert "warning" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["damaged.pt", "previous.pt"]
    (tmp_path / "previous.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"previous\.pt"):
        load_newest(tmp_path)


def test_where_the_last_two_are_damaged_the_newest_intact_one_that_is_kept_becomes_the_last(tmp_path, capsys):
    for name, iteration in (("iteration-9999999", 9999999), ("iteration-10000000", 10**7), ("best", 10**7 + 1)):
        checkpoint.save(tmp_path / f"{name}.pt", state(iteration))
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"")
    path, loaded = load_newest(tmp_path)
    assert (path.name, loaded["iteration"]) == ("best.pt", 10**7 + 1)
    warnings = capsys.readouterr().out.splitlines()
    assert [line.split("; ")[-1] for line in warnings] == ["resuming from best.pt (iteration 10000001)"] * 2
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "best.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / "best.pt").write_bytes(b"")
    assert load_newest(tmp_path)[1]["iteration"] == 10**7
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).unlink()
    assert load_newest(tmp_path)[1]["iteration"] == 10**7
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    assert load_newest(tmp_path) is None


def test_no_checkpoint_is_none(tmp_path):
    assert load_newest(tmp_path / "nowhere") is None


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_hostile_checkpoint_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    torch.save({**state(), "format": checkpoint.FORMAT, "extra": Hostile(mark)}, tmp_path / "hostile.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(UserError, match=r"refused: .*plain values \(_?io\.open\)"):
        checkpoint.load(tmp_path / "hostile.pt")
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "old.pt")
    assert not mark.exists()


class Made:
    """Pickled, a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"mean": torch.zeros(1).expand(1_000_000, 64)}, "mean declares 1000000x64 values, and 4 bytes are there"),
        ({"model": {"fc.weight": torch.zeros(64).expand(1_000_000, 64)}}, "model.fc.weight declares 1000000x64 values"),
        ({"extra": [1, {"deep": (torch.zeros(1).expand(9, 9),)}]}, "extra.1.deep.0 declares 9x9 values"),
        ({"extra": Made(torch.Tensor, 1_000_000)}, "declares tensors of 40"),
        ({"extra": Made(bytearray, 10_000_000)}, "it holds a bytearray, which may ask for any amount of memory"),
        ({"extra": torch.zeros(9, 9, device="meta")}, "extra is no plain tensor"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_what_a_file_declares_and_does_not_hold_is_refused(declared, told, zipped, tmp_path):
    torch.save(
        {**state(), "format": checkpoint.FORMAT, **declared}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(UserError) as refused:
        checkpoint.load(tmp_path / "x.pt")
    assert told in str(refused.value)


def test_a_file_that_unpacks_to_more_than_itself_is_refused(tmp_path):
    torch.save({**state(), "format": checkpoint.FORMAT, "extra": torch.zeros(1_000_000)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "small.pt", "w", 8) as small:
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    with pytest.raises(UserError, match="it declares more than it holds"):
        checkpoint.load(tmp_path / "small.pt")


def test_values_in_a_circle_are_looked_at_once(tmp_path):
    circle = [torch.zeros(2)]
    circle.append(circle)
    torch.save({**state(), "format": checkpoint.FORMAT, "extra": circle}, tmp_path / "x.pt")
    assert checkpoint.load(tmp_path / "x.pt")["iteration"] == 1


@pytest.mark.parametrize(
    ("depth", "classes", "told"),
    [
        (99_998, 10, "a net of 99998 layers, and 44 tensors"),
        (8, 1_000_000, "fc.weight is 10x64, not 1000000x64"),
        (14, 10, "layer1.1.conv1.weight is missing"),
    ],
)
def test_a_net_that_is_not_in_the_file_is_refused_before_it_is_made(depth, classes, told):
    model = cifar_resnet(8).state_dict()
    with pytest.raises(ValueError, match=told):
        checkpoint.check_net(model, lambda: cifar_resnet(depth, num_classes=classes), depth)


@pytest.mark.parametrize("name", ["layer2.0.conv1.weight", "layer3.0.bn2.running_var", "fc.bias"])
def test_a_net_with_a_value_that_is_not_finite_is_refused(name):
    model = cifar_resnet(8).state_dict()
    model[name].view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match=f"{name} is not finite"):
        checkpoint.check_net(model, lambda: cifar_resnet(8), 8)


def test_weights_that_share_their_values_are_no_net():
    one, model = torch.zeros(9 * 64 * 64), cifar_resnet(8).state_dict()
    shared = {name: one[: value.numel()].view(value.shape) for name, value in model.items()}
    checkpoint.check_net(model, lambda: cifar_resnet(8), 8)
    with pytest.raises(ValueError, match=r"weights of \d+ bytes, and 147456 are there"):
        checkpoint.check_net(shared, lambda: cifar_resnet(8), 8)


@pytest.mark.parametrize(
    "mean", [torch.zeros(3), torch.zeros(1, 1, 4), torch.zeros(1, 1, 3).int(), torch.full((1, 1, 3), float("nan"))]
)
def test_a_mean_that_is_none_is_refused(mean):
    with pytest.raises(ValueError, match="a mean of"):
        checkpoint.check_mean(mean)


def test_other_files_are_named(tmp_path):
    (tmp_path / "note.txt").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"note\.txt"):
        checkpoint.load(tmp_path / "note.txt")
    with pytest.raises(UserError, match="not a checkpoint of resnet-train"):
        checkpoint.load(tmp_path / "weights.pt")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_the_one_before(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state(1))
    (tmp_path / "last.pt.part").symlink_to("/dev/full")
    with pytest.raises(RunError, match="cannot be written"):
        checkpoint.save(path, state(2))
    assert checkpoint.load(path)["iteration"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()])
def test_what_is_no_file_is_never_waited_for(make, tmp_path, capsys):
    for iteration in (1, 2):
        checkpoint.save(tmp_path / "last.pt", state(iteration), keep_as=tmp_path / "previous.pt")
    (tmp_path / "last.pt").unlink()
    make(tmp_path / "last.pt")
    path, loaded = load_newest(tmp_path)
    assert (path.name, loaded["iteration"]) == ("previous.pt", 1)
    assert "warning" in capsys.readouterr().out
    checkpoint.save(tmp_path / "last.pt", state(2), keep_as=tmp_path / "previous.pt")
    assert load_newest(tmp_path)[1]["iteration"] == 2


def test_a_checkpoint_of_another_format_is_named_with_it(tmp_path):
    """Also where weights of any program are taken: its mean and classes are not a stranger's."""
    from resnet_train.weights.source import read_source

    path = tmp_path / "last.pt"
    torch.save({**state(), "format": 1}, path)
    for read in (checkpoint.load, read_source):
        with pytest.raises(UserError) as error:
            read(path)
        words = (
            f"{path}: is a checkpoint of format 1; resnet-train {__version__} reads format {checkpoint.FORMAT} alone"
        )
        assert str(error.value) == words
