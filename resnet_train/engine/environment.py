"""The environment of a run: command, commit, device, versions, memory."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import torch

from resnet_train import __version__
from resnet_train.engine.distributed import world_size

FORMAT = 1  # of config.json, environment.json, metrics.jsonl and summary.json of a run


def environment_of(command: str, device: torch.device, digest: str) -> dict[str, Any]:
    """What environment.json has of this process: the command, where it runs, and the digest of its data."""
    return {
        "format": FORMAT,
        "command": shlex.join([command, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "launch": name_launch(),
        "digest": digest,
        "versions": versions(device),
    }


def name_launch() -> str | None:
    """The launch that a launcher may restart, by its name; None without a launcher.

    Where torchrun on one machine has no --rdzv-id, by its process.
    """
    name, parent = os.environ.get("TORCHELASTIC_RUN_ID"), os.getppid()
    if name != "none" or os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return name
    began = ""  # in ticks since the boot: in a container torchrun is process 1 each time
    with contextlib.suppress(OSError):
        began = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return f"{platform.node()}, process {parent}, {began}"


def git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit of this package's code, of which `file` is a part, from its checkout, or as pip has recorded it.

    None if git does not have the code, as in an environment inside another project, and pip installed a folder.
    """
    git = "git", "-C", str(file.parent)
    known = _output_of(*git, "ls-files", file.name)
    return (known and _output_of(*git, "describe", "--always", "--dirty", "--abbrev=40")) or _installed_commit(file)


def _installed_commit(file: Path) -> str | None:
    """The commit that `pip install git+URL` has recorded beside the package of `file`, in direct_url.json (PEP 610)."""
    for package in distributions(name="resnet-train", path=[str(file.parents[2])]):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            return json.loads(package.read_text("direct_url.json") or "")["vcs_info"]["commit_id"]
    return None


def versions(device: torch.device) -> dict[str, str]:
    """Versions of this package, Python, torch and torchvision; on a GPU also of cuDNN, NCCL and the driver."""
    result = {
        "resnet_train": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _torchvision_version(),
    }
    if device.type == "cuda":
        result["cudnn"] = str(torch.backends.cudnn.version())
        if torch.distributed.is_nccl_available():
            result["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        result["driver"] = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return result


def _torchvision_version() -> str:
    try:
        return version("torchvision")
    except PackageNotFoundError:  # built from source
        import torchvision

        return torchvision.__version__


def _output_of(*command: str) -> str:
    """The output of a command; empty if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def peak_memory(device: torch.device) -> int:
    """The peak memory of this process in bytes: of the GPU if `device` is one, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_held(device: torch.device) -> int:
    """The current memory of this process in bytes, of the GPU or the host; without /proc, the peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_memory(device)


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
