"""What depth does, in a table and one sentence: is a deeper net worse or better than a shallow one, and is it shown?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from resnet_train import paper
from resnet_train.report.runs import END, Run, by_net, mean_and_std
from resnet_train.report.tables import Cell, Table, spread

SEEDS = 3  # a difference is shown by so many seeds of each net,
POINTS = 2  # or where it is larger than this; and never where it is below
WIDE = 2  # so many times its spread over seeds


@dataclass(frozen=True)
class Difference:
    """By how much a deep net's error is above a shallow one's, and the standard deviation of that."""

    points: float
    spread: float | None  # None without two seeds of each net
    word: str  # worse or better where that is shown, else empty


@dataclass(frozen=True)
class Comparison:
    """A net and the shallowest of its kind, by training and by test error."""

    shallow: Run
    deep: Run
    train: Difference
    test: Difference
    falling: str  # why the training errors say nothing, where they do not


def compare(shallow: list[Run], deep: list[Run]) -> Comparison:
    """Finished runs of one shallow and of one deep net, seeds of the same setting."""
    train = _difference([run.train_error for run in shallow], [run.train_error for run in deep])
    test = _difference([run.test_error for run in shallow], [run.test_error for run in deep])
    gain, falling = max(run.late_gain for run in (*shallow, *deep)), ""
    if train.word and gain >= abs(train.points):
        train = Difference(train.points, train.spread, "")
        falling = f"it still fell by {gain:.2f} points in the last {100 // END} % of the iterations"
    return Comparison(shallow[0], deep[0], train, test, falling)


def _difference(shallow: list[float], deep: list[float]) -> Difference:
    (low, low_std), (high, high_std) = mean_and_std(shallow), mean_and_std(deep)
    points = high - low
    std = None if low_std is None or high_std is None else math.hypot(low_std, high_std)
    shown = abs(points) > POINTS or min(len(shallow), len(deep)) >= SEEDS
    shown = shown and (std is None or abs(points) > WIDE * std)
    return Difference(points, std, ("worse" if points > 0 else "better") if shown else "")


def comparisons(group: list[Run]) -> list[Comparison]:
    """Each net against the shallowest of its kind (plain, or residual with the same shortcuts)."""
    kinds: dict[str, list[list[Run]]] = {}
    for net, runs in by_net(group).items():
        if done := [run for run in runs if run.finished]:
            kinds.setdefault(net.replace(str(runs[0].depth), ""), []).append(done)
    return [compare(nets[0], deep) for nets in kinds.values() for deep in nets[1:]]


def table(group: list[Run], where: str = "") -> Table | None:
    """Every comparison with its figures; None where there are no two depths of one kind."""
    header = ["net", "training error", "test error", "against", "training: difference", "training: spread"]
    header += ["test: difference", "test: spread", "shown?"]
    made = Table(f"depth{where}", f"Depth: each net beside the shallowest of its kind, {group[0].data}", header)
    found = comparisons(group)
    for net in dict.fromkeys(net for one in found for net in (one.shallow.net, one.deep.net)):
        done = [run for run in group if run.net == net and run.finished]
        row: list[Cell] = [net, spread([run.train_error for run in done]), spread([run.test_error for run in done])]
        one = next((one for one in found if one.deep.net == net), None)
        if one:
            row += [one.shallow.net, one.train.points, one.train.spread, one.test.points, one.test.spread, _shown(one)]
        made.rows.append([*row, *[None] * (len(header) - len(row))])
    made.notes = [
        f"Shown: with {SEEDS} seeds of each net or above {POINTS} points, and above {WIDE} times the spread, which is"
        " the standard deviation of the difference of two runs.",
        f"A training error is that of the last {100 // END} % of the iterations, of augmented images.",
        *(f"{one.deep.net}: training is not shown, {one.falling}." for one in found if one.falling),
    ]
    return made if found else None


def _shown(one: Comparison) -> str:
    train, test = one.train.word, one.test.word
    if train == test:
        return f"yes, {train} in both" if train else "no"
    return ", ".join(f"{word} in {name}" for name, word in (("training", train), ("the test", test)) if word)


def sentence(group: list[Run]) -> str:
    """What the runs show of plain and of residual nets, at the greatest depth that both were run in; or nothing."""
    found = [one for one in comparisons(group) if one.deep.depth < 1000]  # 1202 layers: another story, of overfitting
    plain = [one for one in found if one.deep.arch == "plain"]
    residual = [one for one in found if one.deep.arch != "plain"]
    both = {one.deep.depth for one in plain} & {one.deep.depth for one in residual}
    chosen = [
        next((one for one in kind if both and one.deep.depth == max(both)), kind[-1])
        for kind in (plain, residual)
        if kind
    ]
    if not chosen:
        return ""
    first = group[0]
    length = f"After {first.iterations:,} iterations"
    if paper.shortened(first.data if first.published else "", first.iterations):
        whole = paper.RECIPES[first.family]["iterations"]
        length = (
            f"After {first.iterations:,} of the paper's {whole:,} iterations, which do not tell what all would give"
        )
    return f"{length}, {'; '.join(map(_clause, chosen))}."


def _clause(one: Comparison) -> str:
    kind = "plain" if one.deep.arch == "plain" else "residual"
    how = {"worse": "a higher", "better": "a lower"}
    word = one.train.word if one.train.word == one.test.word else ""
    said = " and ".join(
        f"{how[part.word]} {name} error" for name, part in (("training", one.train), ("test", one.test)) if part.word
    )
    is_so = f"is {word} than" if word else f"has {said} than" if said else "is not shown to be better or worse than"
    return (
        f"the {kind} net of {one.deep.depth} layers {is_so} that of {one.shallow.depth}"
        f" (training error {one.train.points:+.2f} points, test error {one.test.points:+.2f})"
    )
