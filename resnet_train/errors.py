"""The ways in which a command ends early: errors, each of which becomes one line on stderr, and signals."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import resource
import signal
import sys
import termios
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

# What ends a run in good order, with a checkpoint. Slurm sends SIGUSR1, SIGUSR2 or SIGTERM before it takes the machine;
# a terminal that is closed sends SIGHUP, which nohup has ignored.
SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS += () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)

# Who started this process, noted before torch is imported: that takes seconds, in which a launcher can be killed.
PARENT = os.getppid()

NEAR = 0.75  # how alike a word must be to be suggested, out of 1: nearest() of anything else would lead astray

# Values of other tools, and ours for them. Their keys stand at the fields of ours: config.schema.Alias.
ALIASES = {
    "gpu": "cuda",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "10crop": "tencrop",
    "10-crop": "tencrop",
    "multi-scale": "multiscale",
}


class UserError(Exception):
    """Something asked for cannot be had; the message says what, what is allowed and what to try. Exit code 2."""

    code = 2
    shared = False  # whether all processes that train together end with it


class RunError(UserError):
    """A run that began well cannot go on (a loss that is not finite, a full disk). Exit code 1."""

    code = 1


class RemoteError(UserError):
    """The error of another process, which tells of it; its exit code."""

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.code = error.code


FILE_KEYS = (
    "checkpoint",
    "init_from",
    "rpn",
    "rcnn",
    "classifier",
    "resume",
)  # of every command: what names a file to be read


@contextlib.contextmanager
def name_keys(config: Any) -> Iterator[None]:
    """Begin the line of an error that begins with the path of a file with the key that names that file in `config`."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for key in FILE_KEYS:
            values = getattr(config, key, None)
            for value in values if isinstance(values, list) else [values]:
                paths = [value, os.path.expanduser(value), os.path.abspath(value)] if isinstance(value, str) else []
                for path in paths:
                    if text.startswith(f"{path}: "):
                        error.args = (f"{key}={value}{text[len(path) :]}",)
        raise


def stop_early(number: int, _: Any = None) -> NoReturn:
    """End on a signal before there is anything to keep, and say so."""
    print("stopped before there was anything to keep; the same command begins again", flush=True)
    sys.exit(128 + number)


def leave_terminal() -> None:
    """Have what is still printed go nowhere, if it would go to a terminal that has been closed."""
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def under_launcher() -> bool:
    """Whether torchrun, Slurm or our own launcher has started this process, by what each of them sets."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


# What Gloo, NCCL and torch's stores say where another process has ended or cannot be reached.
GONE = r"[Cc]onnection (was )?(closed|reset|refused)|[Bb]roken pipe|[Tt]imed out|[Tt]imeout|ncclRemoteError|was aborted"
# What torch, cuBLAS, NCCL and the C++ library say where there is no memory left.
NO_MEMORY = r"DefaultCPUAllocator|out of memory|std::bad_alloc|ALLOC_FAILED|Cannot allocate memory|Unable to allocate"


def is_peer_failure(error: BaseException) -> str | None:
    """The line of `error` that says that another process is gone, if that is what it says."""
    if not re.search("gloo|nccl|c10d|tcpstore", str(error), re.IGNORECASE):
        return None
    return _line_with(GONE, str(error))


def from_nccl_error(error: BaseException) -> UserError | None:
    """What keeps NCCL from its work here, where that is neither another process nor a lack of memory; else None."""
    text = str(error)
    if "nccl" not in text.lower() or is_peer_failure(error) or _line_with(NO_MEMORY, text):
        return None
    reason = re.search(r"Last error:\s*(\S.*)", text) or re.search(r"(nccl\w+: .*)", text) or re.search(r"(.*)", text)
    assert reason is not None  # the last one fits all
    if "Duplicate GPU" in text:
        return UserError(f"NCCL: {reason[1]}; each process needs a GPU of its own: start fewer (devices=)")
    return RunError(f"NCCL cannot work here: {reason[1]}; NCCL_DEBUG=INFO in the environment tells more")


def from_machine_error(error: BaseException) -> RunError | None:
    """What the machine refused for want of memory, shared memory, open files or disk, for the user; else None.

    Errors of a DataLoader's worker come as text of the same type, with the worker's trace of calls.
    """
    text = str(error)
    if _line_with("Too many open files|ancdata", text):
        return RunError(f"too many open files; raise the limit (ulimit -n, now {_open_files()}), or use fewer workers")
    if isinstance(error, RuntimeError) and (line := _line_with(r"shared memory|/torch_\d+", text)):
        return RunError(
            "/dev/shm, the memory that processes share, is full; make it larger (docker run --shm-size=8g), or take"
            f" fewer workers ({line})"
        )
    if isinstance(error, MemoryError) or _line_with(NO_MEMORY, text):
        line = re.sub(r".*err == 0\. ", "", _line_with(NO_MEMORY, text) or type(error).__name__)
        return RunError(f"out of memory; use a smaller batch_size= (or device_batch_size=) ({line})")
    if line := _line_with("operator torchvision::", text):
        return RunError(f"torch and torchvision do not fit together: install both anew, from one index ({line})")
    if "DataLoader worker" in text and (line := _line_with("killed by signal|exited unexpectedly", text)):
        return RunError(f"{line.rstrip('.')}; if it was killed for want of memory, use fewer workers")
    return from_os_error(error) if isinstance(error, OSError) else None


def from_os_error(error: OSError) -> RunError:
    """What the operating system refused, for the user."""
    if error.errno is None:  # a DataLoader's worker hands on the text alone
        found = re.search(r"\[Errno (\d+)\] ([^:\n]+)(?:: '(.*)')?", str(error))
        error = OSError(int(found[1]), found[2], found[3]) if found else OSError(0, str(error))
    whole = "" if error.errno in (errno.ENOENT, errno.ENOTDIR) else "what is on disk is whole; "
    place = error.filename or "a file or the output"
    return RunError(f"{place}: {error.strerror}; {whole}{remedy(error)}, the same command resumes")


def remedy(error: BaseException) -> str:
    """What has to be done before the same command can resume, as the first half of a sentence."""
    ways = {
        errno.ENOSPC: "with room made",
        errno.EDQUOT: "with room made",
        errno.EMFILE: f"with a higher limit of open files (ulimit -n, now {_open_files()})",
        errno.ENFILE: "with a higher limit of open files",
        errno.EFBIG: "with a higher limit of a file's size (ulimit -f)",
        errno.ENOENT: "with it there again",
        errno.ENOTDIR: "with a folder there",
        errno.EACCES: "with leave to use it",
        errno.EPERM: "with leave to use it",
        errno.EROFS: "with leave to write there",
    }
    return ways.get(getattr(error, "errno", None) or 0, "with that put right")


def _open_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _line_with(pattern: str, text: str) -> str | None:
    return next((line.strip() for line in text.splitlines() if re.search(pattern, line)), None)


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean X?` for the allowed word most like `word`, or nothing where none is near."""
    found = closest(word, allowed)
    return f"; did you mean {found}?" if found else ""


def nearest_data(word: str, allowed: Iterable[str]) -> str:
    """What `nearest` says of a data set's name; of a folder, and of what is like none, how a folder is named."""
    names = list(allowed)
    folder = next((name for name in ("imagefolder", "voc") if name in names), None)
    if folder is None or word in ("", "None", "null") or (closest(word, names) and not os.path.isdir(word)):
        return nearest(word, names)
    return f"; a folder of your own is data={folder} data.root={word}"


def closest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word most like `word`, if one is near."""
    words = {item.lower(): item for item in allowed}
    word = ALIASES.get(word.lower(), word.lower())
    group, _, name = word.rpartition(".")

    def likeness(item: str) -> float:
        """Of keys with dots that of the less alike of their two parts; a group that is left out is no difference."""
        its_group, _, its_name = item.rpartition(".")
        return min(_likeness(name, its_name), _likeness(group, its_group) if group else 1)

    best = max(words, key=likeness, default="")
    return words[best] if best and likeness(best) >= NEAR else None


def _likeness(word: str, other: str) -> float:
    """From 0 to 1; of a word that is cut short, such as val, little less than of the word itself."""
    if word == other:
        return 1
    if len(word) >= 3 and other.startswith(word):
        return 0.9
    if len(word) == len(other) and sorted(word) == sorted(other) and sum(map(str.__ne__, word, other)) == 2:
        return 0.9  # two letters are swapped, in a short word too
    matcher = difflib.SequenceMatcher(None, other, word)
    alike = matcher.real_quick_ratio() >= NEAR and matcher.quick_ratio() >= NEAR  # at once for words of any length
    return matcher.ratio() if alike else 0
