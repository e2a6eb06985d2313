"""How a command ends early: by an error, which becomes one line on stderr, or by a signal."""

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# The signals on which a run stops with a checkpoint. Slurm sends SIGUSR1, SIGUSR2 or SIGTERM before it ends a job; a
# closed terminal sends SIGHUP, unless nohup makes processes ignore it.
SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS += () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)

# The parent process, read before torch is imported: that takes seconds, in which a launcher can be killed.
PARENT = os.getppid()

NEAR = 0.75  # the least similarity of a suggested word, from 0 to 1; a less similar one would mislead

# Other tools' values and ours. Aliases of keys are declared at the fields, by config.schema.Alias.
ALIASES = {
    "gpu": "cuda",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "10crop": "tencrop",
    "10-crop": "tencrop",
    "multi-scale": "multiscale",
    "validation": "val",
}


class UserError(Exception):
    """Wrong input; the message names it, what is allowed and what to try. Exit code 2."""

    code = 2
    shared = False  # whether it ends all processes that train together


class RunError(UserError):
    """A run that has started cannot continue (a loss that is not finite, a full disk). Exit code 1."""

    code = 1


class RemoteError(UserError):
    """The error of another process, which prints it, with that error's exit code."""

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.code = error.code


# The keys, of all commands, whose values are files to be read.
FILE_KEYS = ("checkpoint", "init_from", "rpn", "rcnn", "classifier", "resume", "file")


@contextlib.contextmanager
def name_keys(config: Any) -> Iterator[None]:
    """Replace the path at the beginning of an error's message by key=value, if one key of `config` names that file.

    Where two keys name it, which of them is wrong is not known here, and the path stays.
    """
    try:
        yield
    except UserError as error:
        message = str(error)
        renamed = {}
        for key in FILE_KEYS:
            values = getattr(config, key, None)
            for value in values if isinstance(values, list) else [values]:
                for path in _spellings(value) if isinstance(value, str) else ():
                    if message.startswith(f"{path}: "):
                        renamed[key] = f"{key}={value}{message[len(path) :]}"
        if len(renamed) == 1:
            error.args = tuple(renamed.values())
        raise


def _spellings(path: str) -> set[str]:
    """How a message may write a path: as given, with ~ replaced, without ./ and //, absolute."""
    expanded = os.path.expanduser(path)
    return {path, expanded, str(Path(expanded)), os.path.abspath(expanded)}


def stop_early(number: int, _: Any = None) -> NoReturn:
    """Exit on a signal that arrives before there is any state to save, and say so."""
    print("stopped before anything new was written; the same command starts where this one did", flush=True)
    sys.exit(128 + number)


def leave_terminal() -> None:
    """Discard further output to a terminal that has been closed."""
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def under_launcher() -> bool:
    """Whether torchrun or our own launcher has started this process, by the variables that both set."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


# In errors of Gloo, NCCL and torch's stores when another process has ended or cannot be reached.
GONE = r"[Cc]onnection (was )?(closed|reset|refused)|[Bb]roken pipe|[Tt]imed out|[Tt]imeout|ncclRemoteError|was aborted"
# In errors of torch, cuBLAS, NCCL and the C++ library when memory runs out.
NO_MEMORY = r"DefaultCPUAllocator|out of memory|std::bad_alloc|ALLOC_FAILED|Cannot allocate memory|Unable to allocate"


def is_peer_failure(error: BaseException) -> str | None:
    """The line of `error` that says that another process is gone; None if there is none."""
    if not re.search("gloo|nccl|c10d|tcpstore", str(error), re.IGNORECASE):
        return None
    return _line_with(GONE, str(error))


def from_nccl_error(error: BaseException) -> UserError | None:
    """The user's error for a failure of NCCL; None for other errors, a lost process and a lack of memory."""
    text = str(error)
    if "nccl" not in text.lower() or is_peer_failure(error) or _line_with(NO_MEMORY, text):
        return None
    kind = re.search(r"nccl\w+: .*", text)
    reason = last_nccl_error(error) or (kind[0] if kind else text.partition("\n")[0])
    if "Duplicate GPU" in text:
        return UserError(f"NCCL: {reason}; each process needs a GPU of its own: start fewer (devices=)")
    return RunError(f"NCCL cannot work here: {reason}; set NCCL_DEBUG=INFO in the environment for details")


def last_nccl_error(error: BaseException) -> str | None:
    """What NCCL itself says in an error of torch; None if it says nothing."""
    reason = re.search(r"nccl[\s\S]*Last error:\s*(\S.*)", str(error), re.IGNORECASE)
    return reason and reason[1]


def from_machine_error(error: BaseException) -> RunError | None:
    """The user's error if memory, shared memory, open files or disk ran out; None for other errors.

    An error of a DataLoader's worker has the same type, and the worker's traceback in its text.
    """
    text = str(error)
    if _line_with("Too many open files|ancdata", text):
        return RunError(f"too many open files; raise the limit (ulimit -n, now {_open_files()}), or use fewer workers")
    if isinstance(error, RuntimeError) and (line := _line_with(r"shared memory|/torch_\d+", text)):
        return RunError(
            "/dev/shm, the memory that processes share, is full; make it larger (docker run --shm-size=8g), or use"
            f" fewer workers ({line})"
        )
    if isinstance(error, MemoryError) or _line_with(NO_MEMORY, text):
        line = re.sub(r".*err == 0\. ", "", _line_with(NO_MEMORY, text) or type(error).__name__)
        return RunError(
            f"out of memory; smaller batches need less (batch_size=, device_batch_size=, eval_batch_size=): {line}"
        )
    if line := _line_with("operator torchvision::", text):
        return RunError(f"torch and torchvision do not match: reinstall both from one index ({line})")
    if "DataLoader worker" in text and (line := _line_with("killed by signal|exited unexpectedly", text)):
        return RunError(f"{line.rstrip('.')}; if it was killed for want of memory, use fewer workers")
    return from_os_error(error) if isinstance(error, OSError) else None


def from_os_error(error: OSError) -> RunError:
    """The user's error for a failed call of the operating system."""
    if error.errno is None:  # a DataLoader's worker passes on only the text
        match = re.search(r"\[Errno (\d+)\] ([^:\n]+)(?:: '(.*)')?", str(error))
        error = OSError(int(match[1]), match[2], match[3]) if match else OSError(0, str(error))
    intact = "" if error.errno in (errno.ENOENT, errno.ENOTDIR) else "what is on disk is intact; "
    path = error.filename or "a file or the output"
    return RunError(f"{path}: {error.strerror}; {intact}{remedy(error)}, run the same command again")


def from_write_error(what: str, error: OSError) -> UserError:
    """The user's error for what cannot be made or written. A lack of space is no fault of the input: a RunError."""
    path, reason = error.filename, error.strerror or str(error)
    if isinstance(error, FileExistsError) and path and os.path.islink(path) and not os.path.exists(path):
        reason = f"{path} is a link to {os.readlink(path)}, which is not there"
    elif error.filename2:  # what was to be replaced
        reason += f" ({error.filename2})"
    return (RunError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError)(f"{what}: {reason}")


def remedy(error: BaseException) -> str:
    """When the same command can be run again, as a clause in front of that."""
    remedies = {
        errno.ENOSPC: "once there is space",
        errno.EDQUOT: "once there is space",
        errno.EMFILE: f"with a higher limit of open files (ulimit -n, now {_open_files()})",
        errno.ENFILE: "with a higher limit of open files",
        errno.EFBIG: "with a higher limit of a file's size (ulimit -f)",
        errno.ENOENT: "once it exists again",
        errno.ENOTDIR: "once there is a folder",
        errno.EACCES: "once access is permitted",
        errno.EPERM: "once access is permitted",
        errno.EROFS: "once it can be written",
    }
    return remedies.get(getattr(error, "errno", None) or 0, "once that is fixed")


def _open_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _line_with(pattern: str, text: str) -> str | None:
    return next((line.strip() for line in text.splitlines() if re.search(pattern, line)), None)


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean X?` for the allowed word closest to `word`; empty if none is close."""
    suggestion = closest(word, allowed)
    return f"; did you mean {suggestion}?" if suggestion else ""


def nearest_data(word: str, allowed: Iterable[str]) -> str:
    """`nearest` for the name of a data set; for a folder or an unlike name, how to name a folder."""
    names = list(allowed)
    folder = next((name for name in ("imagefolder", "voc") if name in names), None)
    if folder is None or word in ("", "None", "null") or (closest(word, names) and not os.path.isdir(word)):
        return nearest(word, names)
    return f"; a folder of your own is data={folder} data.root={word}"


def first_few(names: Sequence[str], count: int = 3) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def check_each(names: Sequence[str], check: Callable[[str], object]) -> None:
    """Call `check` with each name. Raises UserError with the first error and the other names that have one."""
    faults: dict[str, UserError] = {}
    for name in names:
        try:
            check(name)
        except UserError as error:
            faults.setdefault(name, error)
    if faults:
        raise UserError(join_faults(faults))


def join_faults(faults: Mapping[str, UserError]) -> str:
    """The first error, and the names of those that have the others."""
    first, *others = faults
    more = f"; and {len(others)} more cannot be used: {first_few(others)}" if others else ""
    return f"{faults[first]}{more}"


def closest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word closest to `word`, if one is close."""
    words = {item.lower(): item for item in allowed}
    word = ALIASES.get(word.lower(), word.lower())
    group, _, name = word.rpartition(".")

    def likeness(item: str) -> float:
        """For keys with dots the lower likeness of their two parts; a missing group does not count."""
        its_group, _, its_name = item.rpartition(".")
        return min(_likeness(name, its_name), _likeness(group, its_group) if group else 1)

    best = max(words, key=likeness, default="")
    return words[best] if best and likeness(best) >= NEAR else None


def _likeness(word: str, other: str) -> float:
    """The likeness of two words, from 0 to 1; 0.9 for the beginning of a word, such as val."""
    if word == other:
        return 1
    if len(word) >= 3 and other.startswith(word):
        return 0.9
    if len(word) == len(other) and sorted(word) == sorted(other) and sum(map(str.__ne__, word, other)) == 2:
        return 0.9  # two swapped letters, also in a short word
    matcher = difflib.SequenceMatcher(None, other, word)
    alike = matcher.real_quick_ratio() >= NEAR and matcher.quick_ratio() >= NEAR  # cheap bounds, for long words
    return matcher.ratio() if alike else 0
