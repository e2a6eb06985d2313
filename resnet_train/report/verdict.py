"""The effect of depth, as a table and a sentence: is a deeper net better or worse, and do the runs show it?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from resnet_train import paper
from resnet_train.report.curves import mean_and_std
from resnet_train.report.runs import END, Run, by_net
from resnet_train.report.tables import Cell, Table, spread

# A difference counts as shown with SEEDS seeds of each net or above POINTS, and above WIDE times its spread over seeds.
SEEDS = 3
POINTS = 2
WIDE = 2


@dataclass(frozen=True)
class Difference:
    """A deep net's error minus a shallow one's, and the standard deviation of that difference."""

    points: float
    spread: float | None  # None without two seeds of each net
    word: str  # worse or better if the runs show it, else empty


@dataclass(frozen=True)
class Comparison:
    """A net compared with the shallowest of its kind, by training and by test error."""

    shallow: Run
    deep: Run
    train: Difference
    test: Difference
    falling: str  # why the training errors do not count; empty if they do


def compare(shallow: list[Run], deep: list[Run]) -> Comparison:
    """Compare the finished runs of a shallow and of a deep net, all of one setting."""
    train = _difference([run.train_error for run in shallow], [run.train_error for run in deep])
    test = _difference([run.test_error for run in shallow], [run.test_error for run in deep])
    gains, falling = [run.late_gain for run in (*shallow, *deep)], ""
    gain = math.nan if any(map(math.isnan, gains)) else max(gains)
    if train.word and not gain < abs(train.points):  # nor where it is not known
        train = Difference(train.points, train.spread, "")
        known = f"it still fell by {gain:.2f} points" if math.isfinite(gain) else "it has no points to tell its fall"
        falling = f"{known} in the last {100 // END} % of the iterations"
    return Comparison(shallow[0], deep[0], train, test, falling)


def _difference(shallow: list[float], deep: list[float]) -> Difference:
    (low, low_std), (high, high_std) = mean_and_std(shallow), mean_and_std(deep)
    points = high - low
    std = None if low_std is None or high_std is None else math.hypot(low_std, high_std)
    is_shown = abs(points) > POINTS or min(len(shallow), len(deep)) >= SEEDS
    is_shown = is_shown and (std is None or abs(points) > WIDE * std)
    return Difference(points, std, ("worse" if points > 0 else "better") if is_shown else "")


def comparisons(group: list[Run]) -> list[Comparison]:
    """Compare each net with the shallowest of its kind (plain, or residual with the same shortcuts)."""
    kinds: dict[str, list[list[Run]]] = {}
    for net, runs in by_net(group).items():
        if done := [run for run in runs if run.finished]:
            kinds.setdefault(net.replace(str(runs[0].depth), ""), []).append(done)
    return [compare(nets[0], deep) for nets in kinds.values() for deep in nets[1:]]


def table(group: list[Run], where: str = "") -> Table | None:
    """The comparisons as a table; None without two depths of one kind."""
    header = ["net", "training error", "test error", "against", "training: difference", "training: spread"]
    header += ["test: difference", "test: spread", "shown?"]
    result = Table(f"depth{where}", f"Depth: each net beside the shallowest of its kind, {group[0].data}", header)
    pairs = comparisons(group)
    for net in dict.fromkeys(net for pair in pairs for net in (pair.shallow.net, pair.deep.net)):
        done = [run for run in group if run.net == net and run.finished]
        row: list[Cell] = [net, spread([run.train_error for run in done]), spread([run.test_error for run in done])]
        pair = next((pair for pair in pairs if pair.deep.net == net), None)
        if pair:
            row += [pair.shallow.net, *_cells(pair.train), *_cells(pair.test)]
            row.append(_words(pair))
        result.rows.append([*row, *[None] * (len(header) - len(row))])
    result.notes = [
        f"Shown: with {SEEDS} seeds of each net or above {POINTS} points, and above {WIDE} times the spread, which is"
        " the standard deviation of the difference of two runs.",
        f"A training error is that of the last {100 // END} % of the iterations, of augmented images.",
        *(f"{pair.deep.net}: training is not shown, {pair.falling}." for pair in pairs if pair.falling),
    ]
    return result if pairs else None


def _cells(difference: Difference) -> list[Cell]:
    """Points and spread; empty where a curve was lost."""
    return [None, None] if math.isnan(difference.points) else [difference.points, difference.spread]


def _words(pair: Comparison) -> str:
    train, test = pair.train.word, pair.test.word
    if train == test:
        return f"yes, {train} in both" if train else "no"
    return ", ".join(f"{word} in {name}" for name, word in (("training", train), ("the test", test)) if word)


def sentence(group: list[Run]) -> str:
    """What the runs show for plain nets and for residual nets with each shortcut; may be empty.

    At the greatest depth that a kind has in common with the plain nets, else at its own.
    """
    kinds: dict[str, list[Comparison]] = {}
    for pair in comparisons(group):
        if pair.deep.depth < 1000:  # 1202 layers overfit
            kinds.setdefault("plain" if pair.deep.arch == "plain" else pair.deep.net[-1], []).append(pair)
    if not kinds:
        return ""
    residual = {pair.deep.depth for kind, pairs in kinds.items() if kind != "plain" for pair in pairs}
    chosen = []
    for kind, pairs in kinds.items():
        others = residual if kind == "plain" else {pair.deep.depth for pair in kinds.get("plain", [])}
        both = {pair.deep.depth for pair in pairs} & others
        chosen.append(next((pair for pair in pairs if both and pair.deep.depth == max(both)), pairs[-1]))
    several = len(kinds.keys() - {"plain"}) > 1
    first = group[0]
    length = f"After {first.iterations:,} iterations"
    if paper.shortened(first.data if first.published else "", first.family, first.iterations):
        whole = paper.RECIPES[first.family]["iterations"]
        length = (
            f"After {first.iterations:,} of the paper's {whole:,} iterations, which do not tell what all would give"
        )
    return f"{length}, {'; '.join(_clause(pair, several) for pair in chosen)}."


def _clause(pair: Comparison, several: bool) -> str:
    """What is shown of a net; with `several` kinds of shortcuts, which it has."""
    kind = "plain" if pair.deep.arch == "plain" else "residual"
    shortcut = f" with shortcuts {pair.deep.net[-1]}" if several and kind == "residual" else ""
    articles = {"worse": "a higher", "better": "a lower"}
    word = pair.train.word if pair.train.word == pair.test.word else ""
    parts = " and ".join(
        f"{articles[part.word]} {name} error"
        for name, part in (("training", pair.train), ("test", pair.test))
        if part.word
    )
    relation = (
        f"is {word} than" if word else f"has {parts} than" if parts else "is not shown to be better or worse than"
    )
    errors = f"training error {pair.train.points:+.2f} points, test error {pair.test.points:+.2f}"
    if math.isnan(pair.train.points):
        errors = f"training error not recorded, test error {pair.test.points:+.2f} points"
    return f"the {kind} net of {pair.deep.depth} layers{shortcut} {relation} that of {pair.shallow.depth} ({errors})"
