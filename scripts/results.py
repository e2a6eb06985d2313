"""Put what is small of finished runs under results/, measure the layer responses of one run of each net, and report.

python scripts/results.py RUNS results/NAME [data.root=PATH]

Weights of CIFAR nets after the whole schedule come along: of a run in RUNS/NET/seed-N as
results/NAME/weights/NET-seed-N.safetensors.
`data.root` is where the images lie, if no longer where the runs found them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from resnet_train import paper

SMALL = ("config.json", "environment.json", "metrics.jsonl", "summary.json", "checkpoints/*.json")


def run(*words: str) -> None:
    """One of this program's commands."""
    print(" ".join(words), flush=True)
    subprocess.run([Path(sys.executable).with_name(words[0]), *words[1:]], check=True)


def main(runs: Path, results: Path, *where: str) -> None:
    """Copy, export, measure, report."""
    checkpoints: dict[str, str] = {}
    found = sorted(runs.rglob("summary.json"))
    for summary in sorted(found, key=lambda path: -json.loads(path.read_text())["iterations"]):  # of a net the longest
        folder = summary.parent
        for file in (file for pattern in SMALL for file in folder.glob(pattern)):
            place = results / "runs" / file.relative_to(runs)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        told, last = json.loads(summary.read_text()), folder / "checkpoints" / "last.pt"
        if last.exists() and "task" not in told:  # a net, and no detector
            if told["data"] == "cifar10" and not paper.shortened("cifar10", "cifar", told["iterations"]):
                (results / "weights").mkdir(exist_ok=True)
                out = results / "weights" / f"{'-'.join(folder.relative_to(runs).parts)}.safetensors"
                run("resnet-weights", "export", str(last), f"out={out}")
                out.with_name(out.name + ".json").unlink(missing_ok=True)  # its header has all of it
            checkpoints.setdefault(told["net"], f'"{last}"')
    if checkpoints:
        out = results / "responses"
        tables = [path for path in (out / "responses.csv", out / "gradients.csv") if path.exists()]
        before = {path: path.read_text().splitlines() for path in tables}
        run("resnet-responses", f"checkpoint=[{','.join(checkpoints.values())}]", f"out={out}", *where)
        for picture in [*out.glob("*.png"), *out.glob("*.svg")]:  # the report draws all nets
            picture.unlink()
        for path, lines in before.items():  # nets whose checkpoints are gone keep their rows
            others = [line for line in lines[1:] if line.partition(",")[0] not in checkpoints]
            path.write_text("\n".join([*path.read_text().splitlines(), *others, ""]))
    run("resnet-report", str(results), f"out={results}/report")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
