"""subprocess.run and subprocess.Popen for `python -c TEXT …`, by a fork of a server that has imported torch once.

To import torch, torchvision and scikit-learn takes ten seconds of a core, to fork takes none. The server has computed
nothing and has no second thread, so that a fork holds nothing that a new process does not: OpenMP, which does not
survive a fork, has not run yet. Each process of tests starts its own server with the first command.

A fork ends as Python does, except that it takes no module apart. That remains to be seen by each command's new start.
The processes that it starts through multiprocessing (a sweep's jobs, a launcher's) are forks as well, made by itself.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from multiprocessing import process, resource_tracker, util
from pathlib import Path

# The beginnings of variables that are read at an import: with others than the server's, a command is a new process.
AT_IMPORT = ("OMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTHON", "MPL", "LD_", "LC_", "LANG", "HOME", "PATH", "CUDA_")
NEEDED = ["bench.suite", "classification.command", "classification.predict", "classification.responses"]
NEEDED += [
    "classification.run",
    "data.pack",
    "detection.command",
    "detection.predict",
    "detection.run",
    "engine.launch",
    "localization.command",
    "report.report",
]
NEEDED += ["engine.launch", "report.report", "weights.command"]
OTHERS = ["sklearn.datasets", "matplotlib.backends.backend_agg", "torch.utils.tensorboard"]
OTHERS += ["torchvision.transforms.v2.functional"]
LOCK = threading.Lock()


class Popen(subprocess.Popen):
    """subprocess.Popen, where the command line is `python -c TEXT …` of a fork; any other is started as ever.

    The fork is this process's own child, so that its pid, signals, pipes and exit code are subprocess's to handle.
    """

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
        _, _, _, *pipes, _, _, _, _, _, new_session, _ = more
        environment = dict(os.environ if env is None else env)
        same = at_import(environment) == at_import(BEFORE)
        if list(args[:2]) != [sys.executable, "-c"] or sys.platform != "linux" or not same:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)
            return
        request = {"words": args[2:], "cwd": os.path.abspath(cwd or "."), "new_session": new_session}
        request["environment"] = environment
        self.pid = fork(request, [ours if fd == -1 else fd for ours, fd in enumerate((pipes[0], pipes[3], pipes[5]))])
        self._child_created = True
        self._close_pipe_fds(*pipes)


def run(words, *, input=None, capture_output=False, timeout=None, check=False, **options):
    """subprocess.run, by a fork."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(words, **options) as job:
        try:
            stdout, stderr = job.communicate(input, timeout)
        except BaseException:
            job.kill()
            raise
    if check and job.returncode:
        raise subprocess.CalledProcessError(job.returncode, words, stdout, stderr)
    return subprocess.CompletedProcess(words, job.returncode, stdout, stderr)


def at_import(environment):
    """What an import may have read of an environment; torch sets some itself, and reads them later."""
    free = ("TORCHINDUCTOR_CACHE_DIR", "TORCHELASTIC_")
    return {name: of for name, of in environment.items() if name.startswith(AT_IMPORT) and not name.startswith(free)}


def fork(request, streams):
    """The pid of a fork that does what is asked for, with `streams` for stdin, stdout and stderr."""
    content = json.dumps(request).encode()
    with LOCK:
        asked, _ = server()
        socket.send_fds(asked, [len(content).to_bytes(8)], streams)
        asked.sendall(content)
        pid = int.from_bytes(asked.recv(8))
    assert pid, "the server of forks has ended"
    return pid


@functools.cache
def server():
    """The socket to the server, and its process, which ends with this one."""
    # What its forks' forks leave behind becomes this process's child, as the child of a child that has ended.
    assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
    ours, theirs = socket.socketpair()
    text = (
        f"import sys; sys.path.insert(1, {str(Path(__file__).parent)!r}); from forked import serve;"
        f" del sys.path[1]; serve({theirs.fileno()})"
    )
    words = [sys.executable, "-c", text]
    job = subprocess.Popen(words, env=BEFORE, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    return ours, job


def serve(fd):
    """Fork until nobody asks any more; each fork runs its text and ends."""
    for name in [*(f"resnet_train.{name}" for name in NEEDED), *OTHERS]:
        with contextlib.suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(name)
    gc.freeze()  # else each fork copies what was imported, page by page, as its collector looks at it
    asked = socket.socket(fileno=fd)
    while True:
        length, streams, _, _ = socket.recv_fds(asked, 8, 3)
        if not length:
            os._exit(0)
        content = b""
        while len(content) < int.from_bytes(length):
            content += asked.recv(1 << 16)
        assert len(os.listdir("/proc/self/task")) == 1
        read, write = os.pipe()
        between = os.fork()
        if not between:
            child = os.fork()
            if child:  # and leave it to the process that has asked for it
                os.write(write, child.to_bytes(8))
                os._exit(0)
            asked.close()
            os.close(read)
            os.close(write)
            do(begin(streams, **json.loads(content)))
        os.waitpid(between, 0)
        asked.sendall(os.read(read, 8))
        for number in (read, write, *streams):
            os.close(number)


def begin(streams, words, cwd, environment, new_session):
    """Make this fork what a new process would be; the text that it is to run."""
    if new_session:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir, process.ORIGINAL_DIR = None, os.getcwd()
    util.spawnv_passfds = spawn
    open_streams()
    sys.argv = ["-c", *words[1:]]
    return words[0]


def spawn(path, args, passed, start=util.spawnv_passfds):
    """The pid of a fork in place of the new process that multiprocessing asks for.

    Who asks has computed nothing: sweeps and launchers leave that to these processes.
    """
    if "--multiprocessing-fork" not in args or at_import(os.environ) != at_import(BEFORE):
        return start(path, args, passed)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # whose handlers are not the child's
    child = os.fork()
    if not child:
        try:
            for number in map(int, os.listdir("/proc/self/fd")):
                if number > 2 and number not in passed:
                    with contextlib.suppress(OSError):  # that of the list itself
                        os.close(number)
            for number in signal.valid_signals():
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            atexit._clear()
            atexit.register(util._exit_function)
            resource_tracker._resource_tracker._pid = None
            sys.modules["resnet_train.engine.loop"].PARENT = os.getppid()
            open_streams()
            sys.argv = ["-c", *args[args.index("-c") + 2 :]]
            do(args[args.index("-c") + 1])
        finally:
            os._exit(1)  # and never go on as who asked
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return child


def open_streams():
    """Open the standard streams anew."""
    sys.stdin = sys.__stdin__ = again(0, sys.__stdin__, "r")
    sys.stdout = sys.__stdout__ = again(1, sys.__stdout__, "w")
    sys.stderr = sys.__stderr__ = again(2, sys.__stderr__, "w")


def do(text):
    """Run the text of `python -c` and end as Python does."""
    code = 0
    try:
        exec(compile(text, "<string>", "exec"), vars(sys.modules["__main__"]))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if ended.code not in (None, code):
            print(ended.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout}\n{error!r}", file=sys.stderr)
        code = 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 255)


def again(number, stream, mode):
    """A standard stream as Python opens it at its start: a terminal's by lines, stderr always, or with no buffer."""
    direct = mode == "w" and stream.write_through
    file = open(number, mode + "b", buffering=0 if direct else -1, closefd=False)  # noqa: SIM115
    lines = mode == "w" and not direct and (number == 2 or os.isatty(number))
    return io.TextIOWrapper(
        file, encoding=stream.encoding, errors=stream.errors, line_buffering=lines, write_through=direct
    )


BEFORE = os.environ | {"OMP_NUM_THREADS": "1"}
