"""The configurations of all commands: their dataclasses, and their YAML files with groups and options."""

from __future__ import annotations

import functools
from pathlib import Path

from resnet_train.config import commands, detection, images, localization, train

_PACKAGE = Path(__file__).resolve().parent.parent
CONFIG_DIR = str(next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir()))
# The commands whose configurations lie in a folder of their own, with its groups.
FOLDERS = dict.fromkeys(("detect", "predict", "test"), "detection")
FOLDERS |= dict.fromkeys(("localize", "localize_test"), "localization")
GROUPED = ("train", "bench", "detect", "localize")  # the commands that choose options of groups
CONFIGS: dict[str, tuple[type, ...]] = {
    "train": (train.Config,),
    "eval": (commands.EvalConfig,),
    "classify": (images.ClassifyConfig,),
    "features": (images.FeaturesConfig,),
    "report": (commands.ReportConfig,),
    "responses": (commands.ResponsesConfig,),
    "weights": (commands.WeightsConfig,),
    "pack": (commands.PackConfig,),
    "bench": (commands.BenchConfig, train.Config),
    "detect": (detection.DetectConfig,),
    "test": (detection.DetectTestConfig,),
    "predict": (detection.PredictConfig,),
    "localize": (localization.LocalizeConfig,),
    "localize_test": (localization.LocalizeTestConfig,),
}
DATACLASSES = tuple(dict.fromkeys(kind for kinds in CONFIGS.values() for kind in kinds))


def config_dir(name: str) -> str:
    """The folder with a command's configurations."""
    return str(Path(CONFIG_DIR, FOLDERS.get(name, "")))


@functools.cache
def groups(name: str) -> list[str]:
    """The groups that a command has."""
    folders = {path.name for path in Path(config_dir(name)).iterdir() if path.is_dir()} - {*FOLDERS.values()}
    folders -= {"experiment"} if name == "bench" else set()
    return sorted(folders) if name in GROUPED else []


def options(name: str, group: str) -> list[str]:
    """The options of a group."""
    return sorted(file.stem for file in Path(config_dir(name), group).glob("*.yaml"))
