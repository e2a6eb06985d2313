"""Draw the README's picture from the metrics in results/.

python scripts/picture.py
"""

from pathlib import Path

from resnet_train import curves

RESULTS = Path(__file__).resolve().parent.parent / "results" / "cifar10_jpeg-10-epochs"

if __name__ == "__main__":
    runs = {net: curves.read_metrics(RESULTS / net / "metrics.jsonl") for net in ("plain-20", "resnet-20-A")}
    title = "20 layers on cifar10_jpeg (JPEG copies of CIFAR-10), 10 passes, seed 0"
    curves.draw(runs, title, RESULTS / "curves.png")
