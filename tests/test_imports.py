"""Who may import whom, read from the syntax trees; and that everything public says what it is."""

import ast
import graphlib
import re
import runpy
from pathlib import Path

import pytest

import resnet_train

PACKAGE = Path(resnet_train.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
MODULES = sorted(TREES)
# The floors of the house. A room imports from its own floor and from those below, be it inside a function.
# They are drawn from the same list.
FLOORS = runpy.run_path(str(PACKAGE.parent / "scripts/docs.py"))["FLOORS"]
FLOORS[0].append("__main__")
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Within rooms, from the top down.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["dispatch"],
    ["sweep"],
    ["bench.suite", "report.report", "classification.responses", "classification.features"],
    ["detection.predict", "detection.command", "localization.command"],
    ["classification.command"],
    ["bench.loader", "bench.startup", "bench.memory"],
    ["bench.subject"],
    ["detection.run", "classification.run", "localization.run"],
    ["detection.train", "classification.train", "localization.train"],
    ["localization.build", "localization.evaluate"],
    ["classification.summary"],
    ["classification.step", "detection.build", "detection.evaluate"],
    ["classification.evaluate", "classification.predict"],
    ["classification.details"],
    ["weights.command"],
    ["classification.load", "weights.source"],
    ["models.build"],
    ["engine.run"],
    ["engine.loop", "engine.resume", "engine.boxes"],
    ["engine.task"],
]
UPPER = {f"resnet_train.{name}" for layer in LAYERS for name in layer}
LEAVES = [name for name in MODULES if name not in UPPER | {"resnet_train"}]
CONFIGS = [name for name in MODULES if name.startswith("resnet_train.config")] + ["resnet_train.config.detection"]


def imports(tree, *, module_level=False):
    """(module, name) of every import; name is None for `import module`."""
    nodes = at_import_time(tree.body) if module_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def at_import_time(body):
    """The nodes that run when a module is imported: all but the inside of functions and what is for type checkers."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from at_import_time(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            for field in ("body", "orelse", "finalbody", "handlers"):
                yield from at_import_time(getattr(node, field, []))


def own(tree, *, module_level=False):
    """The modules of this package that a tree imports."""
    found = set()
    for module, name in imports(tree, module_level=module_level):
        if module.split(".")[0] == "resnet_train":
            found.add(f"{module}.{name}" if f"{module}.{name}" in TREES else module)
    return found


def loaded_by(module):
    """All modules of this package that importing `module` runs, itself included."""
    seen, new = set(), {module}
    while new:
        name = new.pop()
        seen.add(name)
        parents = {name.rsplit(".", 1)[0]} if "." in name else set()
        new |= (own(TREES[name], module_level=True) | parents) - seen
    return seen


LIGHT = [
    f"resnet_train.{name}" for name in ("errors", "cli", "paper", "report.curves", "engine.schedule", "report.report")
]
LIGHT += ["resnet_train.engine.metrics"]


@pytest.mark.parametrize("name", LIGHT + CONFIGS)
def test_torch_is_not_needed(name):
    """Nor by anything that they import."""
    for module in loaded_by(name):
        roots = {imported.split(".")[0] for imported, _ in imports(TREES[module], module_level=True)}
        assert not roots & {"torch", "torchvision"}, module


def test_torch_is_found_where_it_is_needed():
    """The test above can fail."""
    module = "resnet_train.classification.run"
    assert "torch" in {imported.split(".")[0] for imported, _ in imports(TREES[module], module_level=True)}
    assert "resnet_train.models.resnet" in loaded_by(module)


@pytest.mark.parametrize("place", range(len(LAYERS)))
def test_imports_point_downwards(place):
    above = {f"resnet_train.{name}" for layer in LAYERS[: place + 1] for name in layer}
    for name in LAYERS[place]:
        assert not own(TREES[f"resnet_train.{name}"]) & above


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_import_nothing_above_them(name):
    assert not own(TREES[name]) & UPPER


@pytest.mark.parametrize("name", [name for name in MODULES if name != "resnet_train"])
def test_a_room_imports_from_its_own_floor_and_below(name):
    """So the engine knows neither classification nor detection, and a configuration knows of no torch."""
    floor = FLOOR[name.split(".")[1]]
    below = {other for other in own(TREES[name]) if other != "resnet_train"}
    assert [other for other in below if FLOOR[other.split(".")[1]] < floor] == []


IMPORT = re.compile(r"from (resnet_train[\w.]*) import ([a-z_A-Z][\w, ]*)")
TEXTS = [
    path
    for pattern in ("tests/*.py", "scripts/*", "docs/*.md", "*.md", "Makefile")
    for path in PACKAGE.parent.glob(pattern)
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_what_texts_import_is_there(path):
    """Also in strings, shell scripts and documentation, which no import and no type checker looks at."""
    for module, names in IMPORT.findall(path.read_text()):
        assert module in TREES, module
        tree = TREES[module]
        known = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        known |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        known |= {name for _, name in imports(tree)}
        for name in re.split(r",\s*", names.strip(", ")):
            assert name.split(" as ")[0] in known or f"{module}.{name.split(' as ')[0]}" in TREES, f"{module}: {name}"


def test_every_layer_exists():
    assert TREES.keys() >= UPPER


def test_there_are_no_cycles():
    graph = {name: own(tree, module_level=True) - {name} for name, tree in TREES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(TREES)


def test_leaves_take_plain_arguments():
    """The configuration is for the layers above; these, which check plain values by a schema, know of none."""
    light = {f"resnet_train.config.{name}" for name in ("augment", "keys", "layout", "schema")}
    assert {"resnet_train.config.train", "resnet_train.config.detection"} <= set(CONFIGS)
    for name in set(LEAVES) - set(CONFIGS):
        assert not own(TREES[name]) & set(CONFIGS) - light, name
    assert own(TREES["resnet_train.config.schema"]) == {"resnet_train.errors", "resnet_train.config.keys"}


SHOWN = {"printable", "say"}


def printed():
    """(module, what) of every call that prints what may hold a name, and not by way of `say` or `printable`."""
    for name, tree in TREES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            how = ast.unparse(call.func)
            what = call.args[0] if call.args else ast.Constant("")
            escaped = isinstance(what, ast.Call) and ast.unparse(what.func) in SHOWN
            if how in ("print", "tqdm.write") and not escaped and not isinstance(what, ast.Constant):
                yield name, ast.unparse(what)


def test_all_that_is_printed_is_escaped():
    """Names of files and classes are anybody's, and none of them may command the terminal."""
    assert list(printed()) == []


def public(node, prefix=""):
    """Public functions and classes of a module, and public methods of its public classes."""
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{child.name}.")


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    assert ast.get_docstring(TREES[name]), name
    missing = [what for what, node in public(TREES[name]) if not ast.get_docstring(node) and what not in FORWARD]
    assert missing == []


# nn.Module.forward: the class says what goes in and what comes out.
FORWARD = {what for tree in TREES.values() for what, _ in public(tree) if what.endswith(".forward")}
