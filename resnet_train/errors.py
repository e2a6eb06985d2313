"""The ways in which a command ends early: errors, each of which becomes one line on stderr, and signals."""

from __future__ import annotations

import difflib
import os
import re
import signal
from collections.abc import Iterable

# What ends a run in good order, with a checkpoint. Slurm sends SIGUSR1, SIGUSR2 or SIGTERM before it takes the machine;
# a terminal that is closed sends SIGHUP, which nohup has ignored.
SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS += () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)

# Who started this process, noted before torch is imported: that takes seconds, in which a launcher can be killed.
PARENT = os.getppid()

# Words of other tools, and ours for them.
MEANT = {
    "epochs": "iterations",
    "learning_rate": "lr",
    "dataset": "data",
    "model": "arch",
    "gpu": "cuda",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "gpus": "devices",
    "sync_bn": "bn_images",
    "10crop": "tencrop",
    "10-crop": "tencrop",
    "multi-scale": "multiscale",
    "gradient_checkpointing": "activation_checkpointing",
    "pretrained": "init_from",
    "weights": "init_from",
    "frozen_stages": "freeze",
}


class UserError(Exception):
    """Something asked for cannot be had; the message says what, what is allowed and what to try. Exit code 2."""

    code = 2
    shared = False  # whether all processes that train together end with it


class RunError(UserError):
    """A run that began well cannot go on (a loss that is not finite, a full disk). Exit code 1."""

    code = 1


class Elsewhere(UserError):
    """The error of another process, which tells of it; its exit code."""

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.code = error.code


def of_a_launcher() -> bool:
    """Whether torchrun, Slurm or our own launcher has started this process, by what each of them sets."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def of_a_peer(error: RuntimeError) -> str | None:
    """The line of `error` that says that another process is gone, if that is what it says."""
    lines = (line for line in str(error).splitlines() if re.search("gloo|NCCL|[Cc]onnection|[Tt]imed out", line))
    return next(lines, None)


def of_the_system(error: OSError) -> RunError:
    """What the operating system refused, for the user."""
    place = error.filename or "a file or the output"
    return RunError(f"{place}: {error.strerror}; what is on disk is whole; with room made, the same command goes on")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean X?` for the allowed word most like `word`, or nothing."""
    words = {item.lower(): item for item in allowed}
    word = MEANT.get(word.lower(), word.lower())
    found = [item for item in words if item.rsplit(".", 1)[-1] == word or item == word]
    found = found or difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {words[found[0]]}?" if found else ""
