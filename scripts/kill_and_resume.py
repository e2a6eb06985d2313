"""Kill runs with SIGKILL again and again, resume each time, and compare them with undisturbed runs of the same.

    python scripts/kill_and_resume.py KILLS FOLDER resnet-train-arguments…

Four runs, of one process and of two, with two seeds, share the kills; FOLDER gets each of them undisturbed and killed.
All processes of a run are killed at once, in turn at a random moment, whatever the run is doing then, and while a
checkpoint is being written. After each kill every checkpoint must load, and none be older than before. Exit code 0 if
in the end all checkpoints are the same, byte for byte.
"""

import contextlib
import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from resnet_train.engine import checkpoint


def reached(run: Path) -> int:
    """The iteration of the last whole metrics line."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["iteration"] if lines else 0


def written(run: Path) -> int:
    """The iteration of the newest checkpoint, 0 for none. Raises UserError if any file of them is not whole."""
    return max((checkpoint.load(path)["iteration"] for path in (run / "checkpoints").glob("*.pt")), default=0)


def killed(command: list[str], run: Path, after: float, writing: bool) -> bool:
    """Start the run and kill it some time after iteration `after`; whether it was writing a checkpoint then."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and reached(run) < after:
        time.sleep(0.02)
    time.sleep(0 if writing else random.uniform(0, 0.5))
    while writing and process.poll() is None and not any(run.glob("checkpoints/*.part")):
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        sys.exit(f"{run}: ended by itself, with exit code {process.returncode}; give it more iterations")
    return any(run.glob("checkpoints/*.part"))


def main() -> int:
    """See the module's docstring."""
    kills, folder, arguments = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    same, done, hits = True, 0, 0
    for number, (devices, seed) in enumerate([(1, 0), (2, 0), (1, 1), (2, 1)]):
        name = f"devices-{devices}-seed-{seed}"
        command = ["resnet-train", *arguments, f"devices={devices}", f"seed={seed}"]
        undisturbed, run = folder / name / "undisturbed", folder / name / "killed"
        subprocess.run([*command, f"run_dir={undisturbed}"], stdout=subprocess.DEVNULL, check=True)
        iterations = json.loads((undisturbed / "summary.json").read_text())["iterations"]
        share = kills // 4 + (number < kills % 4)
        for kill in range(share):
            before, after = written(run), iterations * (kill + random.random()) / (share + 1)
            hit = killed([*command, f"run_dir={run}"], run, after, writing=kill % 2 == 1)
            done, hits = done + 1, hits + hit
            when = f"after iteration {reached(run)}" + (", while a checkpoint was written" if hit else "")
            print(f"kill {done} of {kills}: {name} {when}; the newest checkpoint is of {written(run)}", flush=True)
            if written(run) < before:
                sys.exit(f"{run}: the checkpoint of iteration {before} is lost")
        subprocess.run([*command, f"run_dir={run}"], stdout=subprocess.DEVNULL, check=True)
        for path in sorted(undisturbed.glob("checkpoints/*.pt")):
            equal = filecmp.cmp(path, run / "checkpoints" / path.name, shallow=False)
            print(f"{name}: {path.name} is {'the same, byte for byte' if equal else 'DIFFERENT'}", flush=True)
            same &= equal
    print(f"{done} kills, {hits} of them while a checkpoint was written; {'nothing' if same else 'SOMETHING'} was lost")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
