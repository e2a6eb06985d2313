"""Put what is small of finished runs under results/, measure the layer responses of one run of each net, and report.

python scripts/results.py RUNS results/NAME
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

SMALL = ("config.json", "environment.json", "metrics.jsonl", "summary.json", "test.json", "checkpoints/*-test.json")


def run(*words: str) -> None:
    """One of this program's commands."""
    print(" ".join(words), flush=True)
    subprocess.run([Path(sys.executable).with_name(words[0]), *words[1:]], check=True)


def main(runs: Path, results: Path) -> None:
    """Copy, measure, report."""
    checkpoints: dict[str, str] = {}
    found = sorted(runs.rglob("summary.json"))
    for summary in sorted(found, key=lambda path: -json.loads(path.read_text())["iterations"]):  # of a net the longest
        folder = summary.parent
        for file in (file for pattern in SMALL for file in folder.glob(pattern)):
            place = results / "runs" / file.relative_to(runs)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        told = json.loads(summary.read_text())
        if (folder / "checkpoints" / "last.pt").exists() and "task" not in told:  # a net, and no detector
            checkpoints.setdefault(told["net"], f'"{folder}/checkpoints/last.pt"')
    if checkpoints:
        out = results / "responses"
        tables = [path for path in (out / "responses.csv", out / "gradients.csv") if path.exists()]
        before = {path: path.read_text().splitlines() for path in tables}
        run("resnet-responses", f"checkpoint=[{','.join(checkpoints.values())}]", f"out={out}")
        for picture in [*out.glob("*.png"), *out.glob("*.svg")]:  # the report draws all nets
            picture.unlink()
        for path, lines in before.items():  # nets whose checkpoints are gone keep their rows
            others = [line for line in lines[1:] if line.partition(",")[0] not in checkpoints]
            path.write_text("\n".join([*path.read_text().splitlines(), *others, ""]))
    run("resnet-report", str(results), f"out={results}/report")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
