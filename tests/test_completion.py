"""What a shell offers for a value that is being typed."""

import pytest

from resnet_train import cli
from resnet_train.config.completion import KINDS, complete

# Command, what is typed, what is offered; a single one in brackets is Hydra's own offer.
OFFERS = [
    ("eval", "resnet-eval protocol=", ["protocol=center", "protocol=tencrop", "protocol=multiscale"]),
    ("eval", "resnet-eval last.pt protocol=t", ["protocol=tencrop"]),
    ("eval", "resnet-eval details=", ["details=true", "details=false"]),
    ("eval", "resnet-eval data=im", ["data=imagefolder", "data=imagenet"]),
    ("train", "resnet-train precision=", [f"precision={one}" for one in ("auto", "bf16", "fp16", "fp32", "fp64")]),
    ("train", "resnet-train data.validation=", ["data.validation=0"]),
    ("train", "resnet-train freeze=layer", [f"freeze=layer{number}" for number in (1, 2, 3, 4)]),
    ("train", "resnet-train data=im", ["data=imagefolder", "data=imagenet"]),
    ("features", "resnet-features split=t", ["split=test", "split=train"]),
    ("report", "resnet-report proto", []),
]


@pytest.mark.parametrize(("name", "line", "offered"), OFFERS)
def test_a_shell_is_offered_every_value(name, line, offered, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    entry = {"eval": "evaluate"}.get(name, name)
    monkeypatch.setattr("sys.argv", [f"resnet-{name}", "-sc", "query=bash"])
    getattr(cli, entry)()
    assert sorted(capsys.readouterr().out.split()) == sorted(offered)


def test_every_command_has_its_values():
    assert cli.COMMANDS.keys() == KINDS.keys()
    assert complete("train", "resnet-train nosuch=", {}) == complete("train", "resnet-train ", {}) == []
