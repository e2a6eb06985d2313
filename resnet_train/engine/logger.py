"""Logging of a run: the metrics file, TensorBoard events and the progress bar."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from resnet_train.engine.distributed import is_main
from resnet_train.engine.metrics import SPLITS, read_metrics
from resnet_train.errors import RunError, remedy
from resnet_train.terminal import printable, say


def _is_of_tensorboard(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboard")


@functools.cache
def prepare_process() -> None:
    """Configure tqdm's lock and TensorBoard's threads, once per training process and before the first progress bar."""
    tqdm.set_lock(threading.RLock())  # the default is a system semaphore, which a killed process leaves behind
    before = threading.excepthook

    def silence_tensorboard(arguments: threading.ExceptHookArgs) -> None:
        # An OSError in a writer thread of TensorBoard is raised again by the next call to the writer.
        if not (isinstance(arguments.exc_value, OSError) and _is_of_tensorboard(arguments.thread)):
            before(arguments)

    threading.excepthook = silence_tensorboard


def read_points(path: Path, iteration: int, log_every: int) -> list[dict[str, Any]]:
    """The points of a metrics file up to `iteration`, from which a run that logs every `log_every` resumes.

    Warns if points before the checkpoint, which were written before it, are gone. Raises OSError.
    """
    points = [point for point in read_metrics(path) if point["iteration"] <= iteration]
    last = max((point["iteration"] for point in points), default=0)
    if last < iteration - iteration % log_every or (iteration and not path.is_file()):
        lost = f"ends at iteration {last}" if last else "has no points" if path.is_file() else "is not there"
        say(
            f"warning: {path}: {lost}; the curves {'have a gap until' if last else 'begin after'} iteration {iteration}"
        )
    return points


def _lacks_counts(point: dict[str, Any]) -> bool:
    """Whether a value of a test, beside its error, is missing, so that no summary can be made of it."""
    needed = {"images", "protocol"} if "images" in point else {"wrong", "seen", "protocol"}  # localizer's, classifier's
    return point["split"] != "train" and "error" in point and not point.keys() >= needed


def message(text: str) -> None:
    """Print a line on rank 0 without breaking its progress bar."""
    if is_main():
        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()


class MetricsLogger:
    """Metrics and TensorBoard events of one run in `directory`, resumed after `iteration`; None: log nothing.

    Metrics after `iteration` are removed, so that a resumed run has one continuous curve. `names` (data, seed) are
    written in every line. TensorBoard gets one writer per split, so that their curves share a chart.
    """

    def __init__(
        self, directory: Path | None, names: dict[str, Any], iteration: int, iterations: int, log_every: int = 1
    ) -> None:
        self.silent = directory is None
        self.seconds = 0.0
        self.bar = tqdm(
            total=iterations,
            initial=iteration,
            unit="it",
            dynamic_ncols=True,
            disable=True if self.silent else None,
            smoothing=0.1,
        )
        self.writers: dict[str, SummaryWriter] = {}
        self.train_error: float | None = None  # of the last logged point
        if directory is None:
            return
        self.path = directory / "metrics.jsonl"
        self.names = names
        with self._write_errors():
            points = read_points(self.path, iteration, log_every)
        self.last = {point["split"]: point["iteration"] for point in points if not _lacks_counts(point)}
        self.seconds = max((line.get("seconds", 0.0) for line in points), default=0.0)
        errors = [line["error"] for line in points if line["split"] == "train" and "error" in line]
        self.train_error = errors[-1] if errors else None
        part = directory / "metrics.jsonl.part"
        with self._write_errors():
            part.write_text("".join(json.dumps(line) + "\n" for line in points))
            part.replace(self.path)
            self.file = self.path.open("a")
            self.board = directory / "tensorboard"
            self.purge = iteration + 1
            for split in SPLITS:
                if (self.board / split).exists():
                    self._writer(split)  # opened now, so that purge_step removes points after the checkpoint

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            has_checkpoint = any((self.path.parent / "checkpoints").glob("*.pt"))
            raise RunError(
                f"{error.filename2 or error.filename or self.path.parent}: the record cannot be written"
                f" ({error.strerror}); {remedy(error)}, the same"
                f" command resumes{' from the last checkpoint, which is intact' if has_checkpoint else ''}"
            ) from error

    def _writer(self, split: str) -> SummaryWriter:
        if split not in self.writers:
            self.writers[split] = SummaryWriter(str(self.board / split), purge_step=self.purge)
        return self.writers[split]

    def log(self, split: str, iteration: int, words: str = "", **values: float | int | str) -> None:
        """Log one point of a curve: a metrics line, TensorBoard scalars and, without a progress bar, a printed line.

        The printed line has `words`, if given, in place of the values. Raises RunError if the point cannot be written,
        as do the constructor, `log_reference` and `flush`.
        """
        if self.silent:
            return
        if split == "train" and "error" in values:
            self.train_error = float(values["error"])
        line = {"iteration": iteration, "split": split, **self.names, **values}
        with self._write_errors():
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            self.last[split] = iteration
            for name, value in values.items():
                if isinstance(value, (int, float)) and name not in ("epoch", "seconds", "wrong", "seen"):
                    self._writer(split).add_scalar(name, value, iteration)
        on = f", on {values['images']} images" if "images" in values else ""  # of a test
        if self.bar.disable:
            formats = {"lr": "g", "images_per_second": ".0f", "epoch": ".2f", "loss": ".4f", "seconds": ".0f"}
            text = (f"{k} {v:{formats.get(k, '.2f')}}" for k, v in values.items() if isinstance(v, float))
            say(f"iteration {iteration}/{self.bar.total} {split}: {words or ', '.join(text)}{on}")
        elif split == "train":
            error = f", error {values['error']:.2f} %" if "error" in values else ""
            waited = f", {values['waited']:.0%} waiting for data" if float(values["waited"]) >= 0.05 else ""
            speed = f"{values['images_per_second']:.{0 if error else 1}f} images/s{waited}"
            self.bar.set_postfix_str(f"loss {values['loss']:.3f}{error}, {speed}")
        elif "error" in values:
            message(f"iteration {iteration}: {split} error {values['error']:.2f} %{on}")
        else:
            message(f"iteration {iteration}: {split} {words}{on}")

    def lacks(self, iteration: int, *splits: str) -> bool:
        """Whether any of these splits has no last point at `iteration`."""
        return any(self.last.get(split) != iteration for split in splits)

    def log_hyper_parameters(
        self, iteration: int, values: dict[str, str | bool | int | float], results: Iterable[str]
    ) -> None:
        """Log a row of TensorBoard's HPARAMS tab, with the errors or mAP among the names of the final `results`.

        It is written to the events of the test split: add_hparams would create a separate run.
        """
        if self.silent:
            return
        with self._write_errors():
            writer, names = self._writer("test"), [name for name in results if name.startswith(("error", "map"))]
            if "error" in names and self.train_error is not None:
                writer.add_scalar("final/train_error", self.train_error, iteration)
                names.append("final/train_error")
            for summary in hparams(values, dict.fromkeys(names)):
                writer._get_file_writer().add_summary(summary, iteration)

    def log_image(self, iteration: int, name: str, image: Tensor) -> None:
        """Log an image (3, H, W) uint8 of the test set to TensorBoard."""
        if not self.silent:
            with self._write_errors():
                self._writer("test").add_image(name, image, iteration)

    def log_reference(self, error: float, iterations: int) -> None:
        """Log the paper's final error as a line across TensorBoard's error chart, once per run."""
        if not self.silent and not (self.board / "paper").exists():
            with self._write_errors(), SummaryWriter(str(self.board / "paper")) as writer:
                for iteration in (0, iterations):
                    writer.add_scalar("error", error, iteration)

    def flush(self) -> None:
        """Write everything to disk; called before each checkpoint, which must not be ahead of the metrics."""
        if self.silent:
            return
        with self._write_errors():
            os.fsync(self.file.fileno())
            for writer in self.writers.values():
                writer.flush()

    def close(self) -> None:
        """Close files and bar, ignoring errors: they were raised before, or concern points after the checkpoint."""
        if not self.silent:
            with contextlib.suppress(OSError):
                self.file.close()
        for writer in self.writers.values():
            with contextlib.suppress(OSError):
                writer.close()
        self.bar.close()
