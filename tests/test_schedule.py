"""The learning rate, iteration by iteration."""

import itertools
import math

import pytest

from resnet_train.engine.schedule import Progress, end_warmup, learning_rate, watch_plateau

STEP = {"name": "step", "lr": 0.1, "warmup_lr": 0.01, "factor": 0.1, "drops": (0.5, 0.75)}
PLATEAU = {"name": "plateau", "lr": 0.1, "warmup_lr": 0.01, "factor": 0.1}
COSINE = {"name": "cosine", "lr": 0.1, "warmup_lr": 0.01}


def rates(iterations, schedule, warm_until=0):
    """The rate of every step; the warm-up, if any, ends after `warm_until` steps."""
    return [learning_rate(i, iterations, Progress(warm=i < warm_until), **schedule) for i in range(iterations)]


def runs(values):
    """[(value, how often in a row), ...], values to 12 digits."""
    return [(float(f"{value:.12g}"), len(list(group))) for value, group in itertools.groupby(values)]


def watch(errors, *, patience, threshold, every=100, progress=None):
    """The iterations at which the plateau drops, with `errors` seen at every, 2 every, 3 every …"""
    progress = progress or Progress(warm=False)
    drops = []
    for index, error in enumerate(errors, start=1):
        before = progress.dropped
        watch_plateau(progress, index * every, error, patience=patience, threshold=threshold)
        drops += (progress.dropped - before) * [index * every]
    return drops


# --- Step ------------------------------------------------------------------------------------------------------------


def test_step_at_the_papers_length():
    """Section 4.2: 0.1, divided by 10 at 32k and 48k, stop at 64k."""
    found = rates(64_000, STEP)
    assert runs(found) == [(0.1, 32_000), (0.01, 16_000), (0.001, 16_000)]
    assert found[31_999] == 0.1
    assert [found[32_000], found[47_999]] == pytest.approx([0.01, 0.01], rel=1e-12)
    assert found[48_000] == pytest.approx(0.001, rel=1e-12)


@pytest.mark.parametrize(("iterations", "lengths"), [(6_400, (3_200, 1_600, 1_600)), (10, (5, 3, 2)), (7, (4, 1, 2))])
def test_step_shortens_in_proportion(iterations, lengths):
    assert runs(rates(iterations, STEP)) == list(zip((0.1, 0.01, 0.001), lengths, strict=True))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"drops": ()}, [(0.1, 100)]),
        ({"drops": (0.1, 0.2, 0.9)}, [(0.1, 10), (0.01, 10), (0.001, 70), (0.0001, 10)]),
        ({"factor": 0.5, "lr": 1}, [(1, 50), (0.5, 25), (0.25, 25)]),
    ],
)
def test_step_with_other_values(change, expected):
    assert runs(rates(100, STEP | change)) == expected


@pytest.mark.parametrize(
    ("iterations", "drops", "expected"),
    [
        (1, (0.5, 0.75), [(0.1, 1)]),
        (2, (0.5, 0.75), [(0.1, 1), (0.01, 1)]),
        (100, (0.0, 0.004, 0.02), [(0.1, 1), (0.001, 1), (0.0001, 98)]),
    ],
)
def test_the_first_step_is_never_below_the_first_rate(iterations, drops, expected):
    """However early a drop, and however short the run."""
    assert runs(rates(iterations, STEP | {"drops": drops})) == expected


def test_step_is_not_moved_by_the_plateaus_state():
    assert learning_rate(0, 100, Progress(warm=False, dropped=2, best=1, best_at=50), **STEP) == 0.1


# --- Cosine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [100, 64_000])
def test_cosine(iterations):
    found = [*rates(iterations, COSINE), learning_rate(iterations, iterations, Progress(warm=False), **COSINE)]
    assert found[0] == 0.1
    assert found[iterations // 2] == pytest.approx(0.05, rel=1e-12)
    assert found[iterations // 4] == pytest.approx(0.05 * (1 + math.sqrt(0.5)), rel=1e-12)
    assert found[-2] > 0
    assert found[-1] == pytest.approx(0, abs=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(found))


# --- Plateau ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dropped", "expected"), [(0, 0.1), (1, 0.01), (2, 0.001), (3, 0.0001)])
@pytest.mark.parametrize("iteration", [0, 599_999])
def test_plateau_rate(iteration, dropped, expected):
    progress = Progress(warm=False, dropped=dropped)
    assert learning_rate(iteration, 600_000, progress, **PLATEAU) == pytest.approx(expected, rel=1e-12)


def test_plateau_never_drops_while_the_error_falls():
    assert watch([90 - 0.2 * i for i in range(400)], patience=300, threshold=0.1) == []


def test_plateau_drops_once_patience_is_over_and_again_after_as_long():
    """The last fall is seen at 200; 300 later is 500, and from there 800."""
    assert watch([60, 50] + 8 * [50], patience=300, threshold=0.1) == [500, 800]


@pytest.mark.parametrize(("patience", "drops"), [(299, [500]), (300, [500]), (301, [600]), (400, [600]), (401, [])])
def test_plateau_drops_at_the_first_look_at_or_after_patience(patience, drops):
    assert watch([60, 50, 50, 50, 50, 50], patience=patience, threshold=0.1) == drops


def test_plateau_counts_iterations_not_looks():
    errors = [60, 50, 50, 50, 50, 50]
    assert watch(errors, patience=300, threshold=0.1, every=100) == [500]
    assert watch(errors, patience=300, threshold=0.1, every=150) == [600, 900]
    assert watch(errors, patience=300, threshold=0.1, every=10) == []


@pytest.mark.parametrize(
    ("fall", "drops"),
    [(0.25, [400]), (0.5, [400]), (0.75, [])],  # exact in binary
)
def test_plateau_threshold(fall, drops):
    """Only a fall by more than the threshold counts."""
    assert watch([50, 50 - fall, 50 - fall, 50 - fall], patience=300, threshold=0.5) == drops


def test_plateau_slow_falls_add_up():
    """Each look is 0.25 below the one before; every third is more than 0.5 below the last best."""
    assert watch([50 - 0.25 * i for i in range(40)], patience=400, threshold=0.5) == []
    assert watch([50 - 0.25 * i for i in range(40)], patience=200, threshold=0.5)[0] == 300


def test_plateau_holds_against_the_best_not_the_last():
    """Falling again after a rise is no fall."""
    assert watch([50, 70, 60, 51, 52, 49], patience=300, threshold=0.1) == [400]


def test_plateau_fall_after_a_drop_starts_patience_anew():
    assert watch([50, 50, 50, 50, 40, 40, 40, 40, 40], patience=300, threshold=0.1) == [400, 800]


def test_plateau_patience_begins_with_the_end_of_the_warm_up():
    progress = Progress(warm=True)
    for iteration in range(100, 1_100, 100):
        progress.warm = iteration <= 500
        watch_plateau(progress, iteration, 50.0, patience=300, threshold=0.1)
        assert progress.dropped == (iteration >= 800)


def test_plateau_drives_the_rate():
    """A whole run: three looks without a fall after each of three falls."""
    progress, found = Progress(warm=False), []
    errors = iter([60, 30, 30, 30, 30, 20, 20, 20, 20, 20])
    for iteration in range(1_000):
        found.append(learning_rate(iteration, 1_000, progress, **PLATEAU))
        if (iteration + 1) % 100 == 0:
            watch_plateau(progress, iteration + 1, next(errors), patience=300, threshold=0.1)
    assert runs(found) == [(0.1, 500), (0.01, 400), (0.001, 100)]


def test_plateau_never_drops_during_warmup():
    progress = Progress(warm=True)
    assert watch(100 * [90], patience=300, threshold=0.1, progress=progress) == []
    assert learning_rate(10_000, 20_000, progress, **PLATEAU) == 0.01


# --- Warm-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [STEP, PLATEAU, COSINE], ids=lambda s: s["name"])
@pytest.mark.parametrize("iteration", [0, 399, 32_000, 63_999])
def test_warmup_rate_lasts_as_long_as_the_warmup(schedule, iteration):
    """No drop and no cosine compounds with it."""
    assert learning_rate(iteration, 64_000, Progress(warm=True, dropped=1), **schedule) == 0.01


def test_warmup_ends_with_the_first_error_below_80_and_never_comes_back():
    progress, found = Progress(warm=True), []
    for iteration, error in enumerate([90, 85, 80.0, 79.99, 95, 60], 4):
        end_warmup(progress, 100 * iteration, error, below=80, at_least=400)
        found.append(learning_rate(0, 64_000, progress, **STEP))
    assert found == [0.01, 0.01, 0.01, 0.1, 0.1, 0.1]


def test_warmup_lasts_400_iterations_at_least():
    """Section 4.2: about 400. An error that is below 80 % earlier may rise again, and did here at a rate of 0.1."""
    progress, found = Progress(warm=True), []
    for iteration, error in [(100, 74.1), (200, 70.0), (399, 65.0), (400, 64.0)]:
        end_warmup(progress, iteration, error, below=80, at_least=400)
        found.append(progress.warm)
    assert found == [True, True, True, False]


def test_an_error_that_is_no_number_does_not_end_the_warmup():
    progress = Progress(warm=True)
    end_warmup(progress, 1000, math.nan, below=80, at_least=400)
    assert progress.warm


def test_without_warmup_no_error_starts_one():
    progress = Progress(warm=False)
    end_warmup(progress, 1000, 99, below=80, at_least=400)
    assert not progress.warm


@pytest.mark.parametrize(
    ("warm_until", "expected"),
    [
        (400, [(0.01, 400), (0.1, 31_600), (0.01, 16_000), (0.001, 16_000)]),
        (40_000, [(0.01, 48_000), (0.001, 16_000)]),
        (50_000, [(0.01, 50_000), (0.001, 14_000)]),
    ],
)
def test_step_drops_are_counted_from_iteration_0_after_a_warmup(warm_until, expected):
    found = rates(64_000, STEP, warm_until=warm_until)
    # 0.01 of the warm-up and 0.1 * 0.1 differ in their last bit.
    assert runs(float(f"{rate:.12g}") for rate in found) == expected
