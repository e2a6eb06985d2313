"""The comments of the YAML files, as --help and the documentation show them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import hydra

from resnet_train.config.compose import unused_keys
from resnet_train.config.options import config_dir, groups


def explain(text: str, name: str, overrides: list[str]) -> str:
    """The `text` of --help, with the comment of each key in its YAML file added above it."""
    with hydra.initialize_config_dir(config_dir(name), version_base="1.3"):
        texts = comments(name, overrides)
    before, title, values = text.partition("== Values (key=value) ==\n")
    lines: list[str] = []
    for key, line in _with_keys(values.splitlines()):
        if key in unused_keys(name):
            continue
        indent = len(line) - len(line.lstrip())
        lines += textwrap.wrap(
            texts.get(key, ""), 80, initial_indent=indent * " " + "# ", subsequent_indent=indent * " " + "# "
        )
        lines.append(line)
    return before + title + "\n".join(lines).rstrip() + "\n"


def comments(name: str, overrides: list[str]) -> dict[str, str]:
    """The comment of each key in the YAML files of a command and its chosen groups. Hydra must be initialised."""
    choices = hydra.compose(name, overrides, return_hydra_config=True).hydra.runtime.choices
    texts = _comments(Path(config_dir(name), f"{name}.yaml"), "")
    for group in groups(name):
        path = Path(config_dir(name), group, f"{choices.get(group)}.yaml")
        texts |= _comments(path, group) if path.is_file() else {}
    return texts


def _comments(path: Path, group: str) -> dict[str, str]:
    """The comments of the keys in the YAML file of a `group`, above and beside them, by dotted names."""
    text = path.read_text()
    prefix = "" if text.startswith("# @package _global_") or not group else f"{group}."
    _, _, body = text.partition("\n\n") if not group else ("", "", re.sub(r"\A(#.*\n)+", "", text))
    texts: dict[str, str] = {}
    above: list[str] = []
    for key, line in _with_keys(body.partition("\nhydra:")[0].splitlines()):
        if line.lstrip().startswith("#"):
            above.append(line.lstrip(" #"))
            continue
        beside = line.partition(" # ")[2]
        if key and (above or beside):
            texts[prefix + key] = " ".join([*above, beside]).strip()
        above = []
    return texts


def _with_keys(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with the dotted name of the key at its beginning, or an empty string."""
    outer: list[tuple[int, str]] = []
    for line in lines:
        match = re.match(r"( *)(\w+):", line)
        if match:
            outer = [(indent, key) for indent, key in outer if indent < len(match[1])]
            outer.append((len(match[1]), match[2]))
        yield ".".join(key for _, key in outer) if match else "", line
