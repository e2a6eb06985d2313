"""Kills, restarts and signals, in one process and in two: done to real runs, which then go on and lose nothing.

One run takes one fault after another, each in a new start of the same command, and is compared in the end.
"""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import TINY, differences, needs, stamp, start

from resnet_train.engine import checkpoint

needs("sklearn")
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found through /proc"),
]
ONE = [*TINY, "run_dir=run-${seed}"]
PAIR = [*ONE, "iterations=121", "batch_size=38", "devices=2"]


@pytest.fixture(scope="module")
def undisturbed_pair(tmp_path_factory):
    """A finished run of two processes."""
    folder = tmp_path_factory.mktemp("pair")
    done = subprocess.run(start(*PAIR), cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "run-0"


def test_two_processes_lose_nothing_whatever_kills_or_stops_them(undisturbed_pair, tmp_path):
    kill_a_worker_that_is_replaced_and_then_another(tmp_path)
    tell_one_worker_to_stop(tmp_path)
    hang_up_on_all(tmp_path)
    kill_all_while_a_checkpoint_is_written(tmp_path)
    kill_the_launcher(tmp_path)
    done = subprocess.run(start(*PAIR), cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert differences(tmp_path / "run-0", undisturbed_pair) == []


def test_one_process_that_is_told_to_stop_and_a_sweep_that_is_cut_lose_nothing(undisturbed, tmp_path):
    a_second_process_is_refused_and_the_first_stops(tmp_path)
    close_the_terminal(tmp_path)
    press_ctrl_c_without_end(tmp_path)
    tell_a_sweep_to_stop(tmp_path)
    done = subprocess.run(start("-m", *ONE, "seed=0,1"), cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search("resuming from iteration .* seed 0: test error .* seed 1: test error", done.stdout, re.DOTALL)
    assert differences(tmp_path / "run-0", undisturbed) == []
    assert (tmp_path / "run-1/summary.json").exists()


def kill_a_worker_that_is_replaced_and_then_another(folder):
    with begun(folder, *PAIR, "max_restarts=1") as (job, out):
        first = workers(job)
        os.kill(first[1], signal.SIGKILL)
        wait(job, lambda: "restart 1 after the death of a process" in out.read_text())
        before = stamp(folder / "run-0")
        wait(job, lambda: stamp(folder / "run-0") != before)
        second = workers(job)
        assert not set(first) & set(second)
        os.kill(second[0], signal.SIGKILL)
        assert job.wait(60) == 1
        assert errors(out) == (
            f"error: rank 0 (process {second[0]}) was killed by SIGKILL after all restarts (max_restarts=1); the same"
            " command resumes from the last checkpoint, if one was written\n"
        )
        assert not any(map(alive, second))


def tell_one_worker_to_stop(folder):
    with begun(folder, *PAIR, "max_restarts=1") as (job, out):  # no restart is used up by that
        os.kill(workers(job)[1], signal.SIGUSR1)
        assert job.wait(240) == 128 + signal.SIGUSR1
        stopped_in_good_order(folder, out)
        assert errors(out) == ""


def hang_up_on_all(folder):
    """What a terminal that is closed sends to launcher, workers and Python's helpers, which leave no semaphore."""
    with begun(folder, *PAIR) as (job, out):
        mapped = [Path(f"/proc/{pid}/maps").read_text() for pid in (job.pid, *workers(job))]
        held = {path for maps in mapped for path in re.findall(r"/dev/shm/sem\S+", maps)}
        os.killpg(job.pid, signal.SIGHUP)
        assert job.wait(240) == 128 + signal.SIGHUP
        stopped_in_good_order(folder, out)
        assert errors(out) == ""
    assert not [path for path in held if Path(path).exists()]


def close_the_terminal(folder):
    """The run cannot print any more, and writes its checkpoint."""
    before, written = newest(folder), stamp(folder / "run-0")
    ours, theirs = os.openpty()
    take = "import fcntl, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); "
    words = start(*ONE)
    words[2] = take + words[2]
    job = subprocess.Popen(words, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    os.set_blocking(ours, False)

    def trained():
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 1 << 16)
        return stamp(folder / "run-0") != written

    wait(job, trained)
    os.close(ours)
    assert job.wait(240) == 128 + signal.SIGHUP
    assert newest(folder) > (before or 0)


def press_ctrl_c_without_end(folder):
    """The first ends the run in good order, or the next at once; none leaves a trace, at whatever moment it comes."""
    with begun(folder, *ONE) as (job, out):
        while job.poll() is None:
            os.killpg(job.pid, signal.SIGINT)
            time.sleep(0.01)
        assert job.returncode == 128 + signal.SIGINT
        assert errors(out) == ""


def tell_a_sweep_to_stop(folder):
    with begun(folder, "-m", *ONE, "seed=0,1") as (job, out):
        job.send_signal(signal.SIGTERM)
        assert job.wait(240) == 128 + signal.SIGTERM
        stopped_in_good_order(folder, out)
        assert errors(out) == ""
    assert not (folder / "run-1").exists()


def a_second_process_is_refused_and_the_first_stops(folder):
    with begun(folder, *ONE) as (job, out):
        job.send_signal(signal.SIGSTOP)  # lest it finish in the meantime
        done = subprocess.run(start(*ONE), cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, "error: run_dir=run-0: another process is training there\n")
        job.send_signal(signal.SIGCONT)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(240) == 128 + signal.SIGUSR1
        stopped_in_good_order(folder, out)
        assert errors(out) == ""


def kill_all_while_a_checkpoint_is_written(folder):
    part = folder / "run-0/checkpoints/last.pt.part"
    with begun(folder, *PAIR) as (job, _):
        writer = workers(job)[0]
        while True:
            wait(job, part.exists, every=0)
            os.killpg(job.pid, signal.SIGSTOP)
            wait(job, lambda: state(writer) == "T")
            if part.exists():
                break
            os.killpg(job.pid, signal.SIGCONT)
        os.killpg(job.pid, signal.SIGKILL)
    assert part.exists()


def kill_the_launcher(folder):
    with begun(folder, *PAIR) as (job, out):
        left = workers(job)
        job.kill()
        job.wait()
        for _ in range(12000):
            if not any(map(alive, left)):
                break
            time.sleep(0.01)
        assert not any(map(alive, left))
        stopped_in_good_order(folder, out)


@contextlib.contextmanager
def begun(folder, *arguments):
    """The command, with a new checkpoint written, and the file of its output; at the end all of its processes are dead.

    It resumes from the newest checkpoint, before and after all files of checkpoints are whole.
    """
    before, written = newest(folder), stamp(folder / "run-0")
    out = next(path for n in itertools.count() if not (path := folder / f"{n}.out").exists())
    with out.open("w") as stdout, out.with_suffix(".err").open("w") as stderr:
        job = subprocess.Popen(start(*arguments), cwd=folder, stdout=stdout, stderr=stderr, start_new_session=True)
    try:
        wait(job, lambda: stamp(folder / "run-0") != written)
        assert before is None or f"resuming from iteration {before}" in out.read_text()
        yield job, out
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert newest(folder) is not None


def newest(folder):
    """The iteration of the newest checkpoint of run-0, all of which are whole; None if there is none."""
    found = {path.name: checkpoint.load(path) for path in (folder / "run-0/checkpoints").glob("*.pt")}
    state = found.get("last.pt", found.get("previous.pt"))
    return state and state["iteration"]


def stopped_in_good_order(folder, out):
    """The processes have ended after the same iteration, with a checkpoint of it."""
    found = re.search(r"stopped at iteration (\d+), checkpoint written; the same command resumes", out.read_text())
    assert found, out.read_text()
    assert int(found[1]) == newest(folder)


def errors(out):
    """What went to stderr beside the output `out`."""
    return out.with_suffix(".err").read_text()


def wait(job, condition, every=0.005):
    """Wait for `condition` while `job` runs."""
    deadline = time.monotonic() + 240
    while not condition():
        assert job.poll() is None, f"exit code {job.returncode}"
        assert time.monotonic() < deadline
        time.sleep(every)


def workers(job):
    """The training processes of a launcher, in the order of their ranks."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def state(pid):
    """A process's state as the kernel has it: T is stopped, Z dead; None for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def alive(pid):
    """Whether a process still runs."""
    return state(pid) not in (None, "Z", "X")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_compiler_as_well_is_no_fault_of_the_compilers(number, tmp_path):
    """A terminal and Slurm signal all processes of a job, and so the C++ compiler that works for torch's."""
    words = ["data=digits", "depth=8", "iterations=3", "device=cpu", "compile=true", "run_dir=run"]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CUDA_HOME": str(tmp_path)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    job = subprocess.Popen(start(*words), cwd=tmp_path, env=environment, **options)

    assert job.stdout.readline() == "run: starting\n"
    assert "; compiling; " in job.stdout.readline()
    wait(job, lambda: any(b"cc1plus" in line for line in running(job.pid)), every=0.01)
    os.killpg(job.pid, number)
    stdout, stderr = job.communicate(timeout=240)
    assert job.returncode == 128 + number
    assert "Traceback" not in stderr
    assert "error" not in stderr
    assert "CUDA" not in stderr  # of which torch warns where there is a toolkit and no GPU
    assert stdout == "stopped after iteration 0, while compiling; the same command begins again\n"


def running(session):
    """The command lines of the processes of a session."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(folder.name) and int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                yield (folder / "cmdline").read_bytes()
