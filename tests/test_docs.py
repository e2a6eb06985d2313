"""What README and docs/ say is there: links, keys, the pages that are made."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from resnet_train import __version__
from resnet_train.cli import COMMANDS
from resnet_train.config.compose import compose, known_keys
from resnet_train.config.options import groups

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results/README.md", *sorted(ROOT.glob("docs/*.md"))]
SPEC = importlib.util.spec_from_file_location("docs", ROOT / "scripts/docs.py")
docs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(docs)


def test_the_pages_that_are_made_are_up_to_date():
    assert (ROOT / "docs/keys.md").read_text() == docs.keys(), "make docs"
    assert (ROOT / "docs/rooms.svg").read_text() == docs.rooms(), "make docs"


def test_every_key_of_training_is_explained():
    section = docs.keys().split("\n## ")[1]
    assert [line for line in section.splitlines() if line.startswith("| `") and line.endswith("|  |")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_readme_is_one_that_is_read():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    assert all(f"docs/{page.name}" in text for page in ROOT.glob("docs/*.md"))


def commands(page):
    """The words of each command in the fenced blocks of a page."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in [] if kind else block.replace("\\\n", " ").splitlines():
            for found in re.findall(r"(resnet-[a-z]+)((?: [^#&|]*)?)", line):
                yield found[0], shlex.split(found[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_keys_and_options_that_there_are(page):
    for command, words in commands(page):
        name = words[0] if words[:1] in (["predict"], ["test"]) else command.removeprefix("resnet-")
        name = "localize_test" if (command, name) == ("resnet-localize", "test") else name
        named = [word for word in words if re.match(r"[+\w.]+(/\w+)?=", word)]
        known = {*known_keys(name), "experiment", "job", *(word.rstrip("=") for word in COMMANDS[name].short)}
        for word in named:
            key = word.partition("=")[0]
            assert key in known or key.startswith(("hydra", "+")), f"{command} {word}"
        if name == "train":
            taken = set(groups(name)) - {"experiment"}
            compose(name, [word for word in named if word.partition("=")[0] in taken and "," not in word])


def test_one_version_is_told_everywhere():
    text = {name: (ROOT / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff", "docs/distributed.md")}
    assert re.findall(r"^## (.+)$", text["CHANGELOG.md"], re.M)[0] == __version__
    assert re.findall(r"^version: (.+)$", text["CITATION.cff"], re.M) == [__version__]
    assert re.findall(r"/resnet-train:(.+)$", text["docs/distributed.md"], re.M) == [__version__]
