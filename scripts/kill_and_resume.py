"""Kill a run with SIGKILL again and again, resume it each time, and compare it with an undisturbed run of the same.

    python scripts/kill_and_resume.py KILLS UNDISTURBED_RUN NEW_RUN resnet-train-arguments…

The kills are spread over the run, each a random moment after its share of the iterations, whatever the run is doing
then: a step, an evaluation, the writing of a checkpoint. Exit code 0 if the last checkpoints are the same file.
"""

import filecmp
import json
import random
import subprocess
import sys
import time
from pathlib import Path


def reached(run: Path) -> int:
    """The iteration of the last whole metrics line."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["iteration"] if lines else 0


def main() -> int:
    """See the module's docstring."""
    kills, undisturbed, run, arguments = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    iterations = json.loads((undisturbed / "summary.json").read_text())["iterations"]
    command = ["resnet-train", *arguments, f"run_dir={run}"]
    for kill in range(1, kills + 1):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and reached(run) < iterations * kill / (kills + 1):
            time.sleep(0.05)
        time.sleep(random.uniform(0, 5))
        if process.poll() is not None:
            print(f"the run ended by itself before kill {kill}, with exit code {process.returncode}")
            return 1
        process.kill()
        process.wait()
        print(f"kill {kill} of {kills} after iteration {reached(run)}", flush=True)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    names = sorted(path.name for path in (undisturbed / "checkpoints").glob("*.pt"))
    same = [
        filecmp.cmp(undisturbed / "checkpoints" / name, run / "checkpoints" / name, shallow=False) for name in names
    ]
    for name, equal in zip(names, same, strict=True):
        print(f"{name}: {'the same, byte for byte' if equal else 'DIFFERENT'}")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
