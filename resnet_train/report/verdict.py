"""The degradation problem in words: is the deeper net worse, in training and in the test, and is it shown?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from resnet_train import paper
from resnet_train.report.runs import END, Run, by_net, mean_and_std

# Shallow and deep, of each kind, as figures 1, 4 and 6 set them side by side.
PAIRS = {
    "cifar": [("plain-20", "plain-56"), ("resnet-20-A", "resnet-56-A"), ("resnet-20-A", "resnet-110-A")],
    "imagenet": [("plain-18", "plain-34"), ("resnet-18-A", "resnet-34-A")],
}
WIDE = 2  # a difference counts if it is larger than so many times its spread over seeds
SHORT = 0.01  # a run below this part of the paper's iterations is too short for any verdict


@dataclass(frozen=True)
class Verdict:
    """What a shallow and a deep net of one kind show; `worse`: the deep one, better: False, undecided: None."""

    shallow: str
    deep: str
    worse: bool | None
    words: str


def verdicts(group: list[Run]) -> list[Verdict]:
    """One for each pair of nets of which runs are there."""
    nets = by_net(group)
    return [compare(nets[a], nets[b]) for a, b in PAIRS[group[0].family] if a in nets and b in nets]


def compare(shallow: list[Run], deep: list[Run]) -> Verdict:
    """Runs of one shallow and of one deep net, seeds of the same setting."""
    here, there = ([run for run in runs if run.finished] for runs in (shallow, deep))
    names = shallow[0].net, deep[0].net
    if not here or not there:
        return Verdict(*names, None, f"not shown: no run of {names[0] if not here else names[1]} is finished")
    parts, signs, doubts = [], [], []
    for what in ("training", "test"):
        of = (lambda run: run.train_error) if what == "training" else (lambda run: run.test_error)
        (low, low_std), (high, high_std) = (mean_and_std([of(run) for run in runs]) for runs in (here, there))
        spread = _spread(low_std, high_std)
        shown = "unknown, one seed each" if spread is None else f"{spread:.2f}"
        parts.append(
            f"{what} error {_with(low, low_std, len(here))} at {here[0].depth} layers and"
            f" {_with(high, high_std, len(there))} at {there[0].depth}, difference {high - low:+.2f}, spread {shown}"
        )
        signs.append(high > low)
        if spread is None:
            doubts.append("one seed each, so the spread over seeds is unknown")
        elif not abs(high - low) > WIDE * spread:
            doubts.append(f"the difference in {what} error is not above {WIDE} times its spread over seeds")
        if what == "training":
            gain = max(run.late_gain for run in (*here, *there))
            whole = paper.RECIPES[here[0].family]["iterations"]
            assert isinstance(whole, int)
            if here[0].iterations < SHORT * whole:
                doubts.append(f"the runs are too short, below {100 * SHORT:g} % of the paper's iterations")
            elif not gain < abs(high - low):
                doubts.append(
                    f"the runs are too short: the training error still fell by {gain:.2f} points in the last"
                    f" {100 // END} % of the iterations"
                )
    measured = "; ".join(parts)
    if signs[0] != signs[1]:
        doubts.append("training and test error disagree")
    if doubts:
        return Verdict(*names, None, f"not shown ({'; '.join(dict.fromkeys(doubts))}): {measured}")
    said = "shown: the deeper net is worse in both" if signs[0] else "not seen: the deeper net is better in both"
    return Verdict(*names, signs[0], f"{said}: {measured}")


def _spread(one: float | None, other: float | None) -> float | None:
    """That of a difference of two single runs. Where a net has one seed, the other's stands for it; None: no net."""
    known = [std for std in (one, other) if std is not None]
    if not known:
        return None
    return math.hypot(*known) if len(known) == 2 else math.sqrt(2) * known[0]


def _with(mean: float, std: float | None, n: int) -> str:
    return f"{mean:.2f} %" + (f" ± {std:.2f} (n={n})" if std is not None else " (n=1)")


def summary(group: list[Run]) -> str:
    """One sentence on figures 1, 4 and 6, and of shortened runs another on how much it says."""
    said, first = _summary(verdicts(group)), group[0]
    if paper.shortened(first.family, first.iterations):
        said += " All after a shortened schedule, which does not tell what the whole one gives."
    return said


def _summary(found: list[Verdict]) -> str:
    plain = [v.worse for v in found if v.shallow.startswith("plain")]
    residual = [v.worse for v in found if not v.shallow.startswith("plain")]
    if not found:
        return "Degradation: no verdict, there are no two depths of one kind to compare."
    words = {True: "shown", False: "not seen", None: "not shown"}
    one = f"Degradation in plain nets: {words[plain[0]]}." if plain else "Plain nets: not run in two depths."
    if not residual:
        return f"{one} Residual nets: not run in two depths."
    if all(worse is False for worse in residual):
        return f"{one} Residual nets: the deeper, the better: shown."
    seen = "shown" if True in residual else "not seen" if None not in residual else "not shown, nor its absence"
    return f"{one} Degradation in residual nets: {seen}."


def gaps(group: list[Run]) -> str:
    """By how much depth raises the training error without and with shortcuts; nothing where a net is missing."""
    nets = {net: [run for run in runs if run.finished] for net, runs in by_net(group).items()}
    (shallow, deep), (residual, deeper) = PAIRS[group[0].family][:2]
    if not all(nets.get(net) for net in (shallow, deep, residual, deeper)):
        return ""
    means = {net: mean_and_std([run.train_error for run in nets[net]])[0] for net in (shallow, deep, residual, deeper)}
    depths = f"{nets[shallow][0].depth} to {nets[deep][0].depth}"
    return (
        f"From {depths} layers the training error changes by {means[deep] - means[shallow]:+.2f} points in plain nets"
        f" and by {means[deeper] - means[residual]:+.2f} in residual nets."
    )


def ordering(group: list[Run]) -> str:
    """Whether the residual nets are in the order of table 6 by mean test error; nothing with less than two nets."""
    means = {
        net: mean_and_std([run.test_error for run in runs if run.finished])[0]
        for net, runs in by_net(group).items()
        if any(run.finished for run in runs) and paper.TABLES["table 6"].get(net, (None,))[0] is not None
    }
    if len(means) < 2 or group[0].family != "cifar":
        return ""
    published = {net: error for net, (error, _) in paper.TABLES["table 6"].items() if net in means and error}
    ours, theirs = sorted(means, key=means.__getitem__), sorted(published, key=published.__getitem__)
    agree = "the same order" if ours == theirs else "another order"
    return (
        f"Residual nets from the lowest test error on, here: {', '.join(ours)}; in table 6: {', '.join(theirs)}:"
        f" {agree}."
    )
