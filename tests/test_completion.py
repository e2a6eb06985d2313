"""What a shell offers for a value that is being typed."""

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import ROOT

from resnet_train import cli
from resnet_train.config.completion import complete
from resnet_train.config.options import CONFIGS

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
    ("eval", "resnet-eval last.pt --multirun precise", ["precise_bn="]),
    ("detect", "resnet-detect test refine=", ["refine=true", "refine=false"]),
    ("detect", "resnet-detect test chec", ["checkpoint="]),
    ("detect", "resnet-detect predict a.jpg scor", ["score="]),
    ("detect", "resnet-detect checkpoint", ["checkpoint_every="]),
]


@pytest.mark.parametrize(("name", "line", "offered"), OFFERS)
def test_a_shell_is_offered_every_value(name, line, offered, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)  # which the command may shorten
    entry = {"eval": "evaluate"}.get(name, name)
    monkeypatch.setattr("sys.argv", [f"resnet-{name}", "-sc", "query=bash"])
    getattr(cli, entry)()
    assert sorted(capsys.readouterr().out.split()) == sorted(offered)


def test_one_line_of_the_docs_installs_it_for_all_commands():
    """In bash, which asks the command that is typed."""
    (line,) = re.findall(r"^eval .*hydra_bash_completion.*$", (ROOT / "docs/training.md").read_text(), re.M)
    typed = "COMP_LINE='resnet-eval protocol=t' COMP_POINT=22 COMP_CWORD=1"
    asked = (
        f'{line}\n{typed}; export COMP_LINE COMP_POINT; hydra_bash_completion; echo "${{COMPREPLY[@]}}"; complete -p'
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = ["bash", "-c", asked]
    told = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}).stdout
    assert told.splitlines()[0] == "protocol=tencrop"
    named = set(re.findall(r"-F hydra_bash_completion (resnet-\w+)$", told, re.M))
    assert named >= {entry.name for entry in entry_points(group="console_scripts") if entry.module == cli.__name__}


def test_every_command_has_its_values():
    assert cli.COMMANDS.keys() == CONFIGS.keys()
    assert complete("train", "resnet-train nosuch=", {}) == complete("train", "resnet-train ", {}) == []
