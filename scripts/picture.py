"""Draw the losses of several processes from the metrics in results/.

python scripts/picture.py
"""

from pathlib import Path

from matplotlib.figure import Figure

from resnet_train.engine.metrics import read_metrics

RESULTS = Path(__file__).resolve().parent.parent / "results"


def losses() -> None:
    """Losses of one, two and four processes over each other, and how far they are apart."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col")
    for column, (precision, lr) in enumerate((("fp64", 0.01), ("fp32", 0.1))):
        runs = {}
        for processes, (line, width) in {1: ("-", 3.5), 2: ("--", 2), 4: (":", 2)}.items():
            points = read_metrics(RESULTS / "processes" / f"{precision}-{processes}.jsonl")
            runs[processes] = [point["loss"] for point in points if point["split"] == "train"]
            panels[0, column].plot(runs[processes], line, linewidth=width, label=f"processes: {processes}")
        for processes in (2, 4):
            apart = [abs(a - b) / a + 1e-17 for a, b in zip(runs[1], runs[processes], strict=True)]
            panels[1, column].semilogy(apart, color=f"C{processes // 2}", label=f"{processes} against 1")
        panels[0, column].set(ylabel="loss", title=f"{precision}, learning rate {lr}")
        panels[1, column].set(xlabel="iteration", ylabel="relative difference")
        for axes in panels[:, column]:
            axes.legend()
    figure.suptitle("ResNet-20 on cifar10_jpeg, batch 128, batch norm over 32 images")
    figure.savefig(RESULTS / "processes" / "losses.png", dpi=100)


if __name__ == "__main__":
    losses()
