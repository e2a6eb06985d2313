"""The pages of docs/ that are made: the table of every key, and all pages as a site.

python scripts/docs.py keys              writes docs/keys.md from the comments in configs/
python scripts/docs.py rooms             draws docs/rooms.svg from the imports of resnet_train/
python scripts/docs.py site build/site   README, docs/ and results/ as a site that needs no network (pip install mkdocs)
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import OmegaConf

from resnet_train.config.compose import known_keys
from resnet_train.config.help import comments
from resnet_train.config.options import config_dir, groups, options
from resnet_train.config.schema import flat, format_value

ROOT = Path(__file__).resolve().parent.parent
KEYS = ROOT / "docs" / "keys.md"
COMMANDS = {
    "train": "resnet-train",
    "eval": "resnet-eval",
    "classify": "resnet-classify",
    "weights": "resnet-weights import, export",
    "pack": "resnet-pack",
    "responses": "resnet-responses",
    "report": "resnet-report",
    "bench": "resnet-bench",
    "features": "resnet-features",
    "detect": "resnet-detect",
    "test": "resnet-detect test",
    "predict": "resnet-detect predict",
    "localize": "resnet-localize",
    "localize_test": "resnet-localize test",
}
HEAD = """# Every key

Made from the comments of `configs/` by `python scripts/docs.py keys`. Keys are written `key=value`; the default is that
of the default groups, and in a column more of `recipe=short`, where there is one. What others have is shown by
`--help`: `resnet-train data=imagenet --help`, `resnet-detect data=coco --help`. A wrong value is refused in one line
that names what is allowed.
"""


def composed(name: str, *words: str) -> dict[str, Any]:
    """The configuration of a command."""
    return cast(dict[str, Any], OmegaConf.to_container(hydra.compose(name, list(words))))


def keys() -> str:
    """docs/keys.md: for each command its groups, and its keys with their defaults and comments."""
    rows, escaped = [HEAD], "\\|"
    for name, command in COMMANDS.items():
        with hydra.initialize_config_dir(config_dir(name), version_base="1.3"):
            values = composed(name)
            explanations, short = comments(name, []), {}
            if "recipe" in groups(name) and "short" in options(name, "recipe"):
                short = flat(composed(name, "recipe=short"))
        rows += [f"## {command}", ""]
        if groups(name):
            rows += [
                f"- `{group}=` {', '.join(f'`{option}`' for option in options(name, group))}" for group in groups(name)
            ]
            rows += [""]
        rows += ["| key | default | `recipe=short` | |", "|---|---|---|---|"] if short else []
        rows += [] if short else ["| key | default | |", "|---|---|---|"]
        known = known_keys(name)
        for key, value in flat(values).items():
            if key in known:
                cells = [f"`{key}`", f"`{format_value(value)}`"]
                cells += ["" if short[key] == value else f"`{format_value(short[key])}`"] if short else []
                rows.append(f"| {' | '.join(cells)} | {explanations.get(key, '').replace('|', escaped)} |")
        rows += [""]
    return "\n".join(rows)


# The rooms and files of the package, from the top down; tests/test_imports.py holds that none imports upward.
FLOORS = [
    ["cli", "dispatch", "sweep"],
    ["console"],
    ["bench"],
    ["classification", "detection", "localization"],
    ["weights", "report"],
    ["data", "models"],
    ["engine"],
    ["config"],
    ["files", "paper"],
    ["errors", "terminal"],
]


def rooms() -> str:
    """An SVG of the floors, with a line for each import from a room on one floor to a room on another."""
    place = {
        room: (360 + 190 * (column - (len(floor) - 1) / 2), 30 + 66 * row)
        for row, floor in enumerate(FLOORS)
        for column, room in enumerate(floor)
    }
    lines, boxes = set(), []
    for path in sorted((ROOT / "resnet_train").rglob("*.py")):
        room = path.relative_to(ROOT / "resnet_train").with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resnet_train"):
                module = str(node.module).removeprefix("resnet_train").lstrip(".").split(".")[0]
                lines |= {(room, other) for other in ([module] if module else [alias.name for alias in node.names])}
    for room, (x, y) in place.items():
        boxes.append(
            f'<rect x="{x - 75:.0f}" y="{y - 17}" width="150" height="34" rx="6" fill="#fff" stroke="#333"/>'
            f'<text x="{x:.0f}" y="{y + 5}" text-anchor="middle">{room}</text>'
        )
    drawn = [
        f'<line x1="{place[a][0]:.0f}" y1="{place[a][1]}" x2="{place[b][0]:.0f}" y2="{place[b][1]}"/>'
        for a, b in sorted(lines)
        if a in place and b in place and place[a][1] != place[b][1]
    ]
    size = f'viewBox="0 0 720 {66 * len(FLOORS)}" font-family="sans-serif" font-size="15"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    body = [
        '<rect width="100%" height="100%" fill="#fff"/>',
        '<g stroke="#9bb" stroke-width="1">',
        *drawn,
        "</g>",
        *boxes,
    ]
    return "\n".join([head, *body, "</svg>", ""])


def site(out: Path) -> None:
    """README, docs/ and what they show of results/, laid out as here, so that every link holds, made into pages."""
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder, "pages")
        if (ROOT / ".git").exists():
            tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
            names = tracked.stdout.splitlines()
        else:  # the sdist, which holds no other files
            names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
        for name in names:
            if name in ("README.md", "CONTRIBUTING.md") or name.startswith(("docs/", "results/")):
                place = pages / ("index.md" if name == "README.md" else name)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, place)
        for name in ("index.md", "docs/python.md"):
            text = (pages / name).read_text().replace("degradation.ipynb", "degradation.md")
            (pages / name).write_text(text)
        (pages / "docs" / "degradation.md").write_text(notebook(ROOT / "docs" / "degradation.ipynb"))
        theme = "theme: {name: mkdocs, highlightjs: false, color_mode: auto, user_color_mode_toggle: true}"
        plain = "site_name: resnet-train\nuse_directory_urls: false\nplugins: [search]\nmarkdown_extensions: [tables]\n"
        Path(folder, "mkdocs.yml").write_text(f"{plain}docs_dir: pages\n{theme}\n{navigation()}")
        command = [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "-q",
            "-f",
            f"{folder}/mkdocs.yml",
            "-d",
            str(out.resolve()),
        ]
        subprocess.run(command, check=True)
    print(out / "index.html")


def notebook(path: Path) -> str:
    """A notebook as a page: its text, its code, and what it has stored of the output."""
    found = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        found.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            shown = "".join(output.get("text", data.get("text/plain", ())))
            picture = data.get("image/png", "").strip()
            found.append(f"![](data:image/png;base64,{picture})" if picture else f"```\n{shown.rstrip()}\n```")
    return "\n\n".join(found) + "\n"


def navigation() -> str:
    """The order of the pages: the README's."""
    return "nav:\n  - Start: index.md\n" + "".join(
        f"  - {title}: docs/{name}.md\n"
        for name, title in {
            "quickstart": "Quickstart",
            "training": "Training",
            "evaluation": "Evaluation",
            "keys": "Every key",
            "own-data": "Own data",
            "paper": "The paper",
            "reports": "Reports",
            "distributed": "Several devices",
            "imagenet": "ImageNet",
            "weights": "Weights",
            "detection": "Detection",
            "localization": "Localization",
            "python": "Python",
            "degradation": "Degradation, a notebook",
            "speed": "Speed",
            "expected": "Expected results",
            "SECURITY": "Security",
            "architecture": "Architecture",
            "troubleshooting": "Troubleshooting",
        }.items()
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["keys"]:
            KEYS.write_text(keys())
        case ["rooms"]:
            KEYS.with_name("rooms.svg").write_text(rooms())
        case ["site", place]:
            site(Path(place))
        case _:
            sys.exit(__doc__)
