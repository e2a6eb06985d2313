"""Forks in place of new processes: they begin and end as those do."""

import importlib.util
import os
import signal
import subprocess
import sys

import forked
import pytest

PYTHON = [sys.executable, "-c"]
ENDS = [
    "print('x', end='')",
    "import sys; sys.exit(3)",
    "import sys; sys.exit('no')",
    "import sys; sys.exit(None)",
    "import os; os._exit(7)",
    "import os; os.kill(os.getpid(), 9)",
    "import os, sys; print(sys.argv, os.getcwd(), os.environ['X'], __name__)",
    "import atexit; atexit.register(print, 'last'); print('first')",
    "import sys, threading; threading.Timer(0.1, print, ['late']).start()",
    "import sys; print(sys.stdin.read(), file=sys.stderr)",
    "import os, sys; print(os.isatty(1), sys.stdout.line_buffering, sys.stderr.line_buffering)",
    """if True:
    import atexit, multiprocessing, signal, sys
    atexit.register(print, "last of the first")
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    held, told = open("/dev/null"), 'import multiprocessing as m, os, signal, sys; print(sys.argv, os.getcwd(), '
    told += 'os.environ["X"], len(os.listdir("/proc/self/task")), m.current_process().name, m.parent_process().name, '
    told += '[signal.getsignal(n) for n in (2, 10, 15)], sys.stdin.read(), [os.path.realpath(f"/proc/self/fd/{n}") '
    told += 'for n in os.listdir("/proc/self/fd")].count("/dev/null"))'
    for end in ("", "; sys.exit(3)", "; os.kill(os.getpid(), 9)", "; 1 / 0"):
        job = multiprocessing.get_context("spawn").Process(target=exec, args=(told + end,))
        print("begun")
        job.start()
        job.join()
        print(job.exitcode)
    """,
]


@pytest.mark.parametrize("text", ENDS)
def test_a_fork_does_what_a_new_process_does(text, tmp_path):
    options = {"cwd": tmp_path, "env": os.environ | {"X": "1"}, "input": "ö", "capture_output": True, "text": True}
    found, wanted = (run([*PYTHON, text, "a", "b c"], **options) for run in (forked.run, subprocess.run))
    assert (found.returncode, found.stdout, found.stderr) == (wanted.returncode, wanted.stdout, wanted.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_fork_takes_signals(number):
    with forked.Popen(
        [*PYTHON, "import time; print('begun', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as job:
        assert job.stdout.readline() == "begun\n"
        assert (job.poll(), os.getpgid(job.pid)) == (None, job.pid)
        os.killpg(job.pid, number)
    assert job.returncode == -number


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all are new processes")
def test_what_a_fork_starts_by_multiprocessing_is_a_fork():
    """And takes its parent, the end of which ends a run, for its own."""
    told = "import os, sys; from resnet_train.engine import loop"
    told += "; print('torch' in sys.modules, loop.PARENT == os.getppid())"
    text = f"import multiprocessing as m; m.get_context('spawn').Process(target=exec, args=({told!r},)).start()"
    assert forked.run([*PYTHON, text], capture_output=True, text=True).stdout == "True True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all are new processes")
def test_it_is_a_fork_unless_an_import_would_have_read_something_else(monkeypatch):
    """Whatever this process has imported by now and set in its environment: torch's compiler does."""
    text = [*PYTHON, "import os, sys; print('torch' in sys.modules, len(os.listdir('/proc/self/task')))"]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/x")
    assert forked.run(text, capture_output=True, text=True).stdout == "True 1\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert forked.run(text, capture_output=True, text=True).stdout == "False 1\n"


@pytest.mark.parametrize("name", forked.NEEDED)
def test_what_the_server_imports_is_there(name):
    """One that has moved would be imported by every fork, and nobody would see why all is slow."""
    assert importlib.util.find_spec(f"resnet_train.{name}") is not None
