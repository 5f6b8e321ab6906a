"""The figures: of searches and tables of every shape, whole inside their borders, and byte for byte the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glowflow.config.space import RandomDraw
from glowflow.experiments import views
from glowflow.experiments.plots import write_plots
from glowflow.experiments.results import pareto_front, read_results
from tests.experiments.written_sweeps import MIXED, WrittenSweep, loss_curve, lr_search, two_metrics, variants_table

LONG = "rotary-embeddings-with-grouped-query-attention-qk-norm-"
SPACE_FIGURES = ["slices", "learning_curves", "parallel_coordinates"]
SEED_FIGURES = ["intervals", "learning_curves", "leaderboard"]


def odd_search(folder: Path) -> Path:
    """A maximised metric, NaN, a value out of all proportion, trials that still run and one that never reported."""
    body = {"metric": "goodput", "mode": "max", "space": {"training.lr": {"loguniform": [1e-4, 1]}}, "trials": 11}
    sweep = WrittenSweep(folder, body)
    for index in range(11):
        params = sweep.space.draw(RandomDraw(0, index))
        curve = [(25, 0.5), (50, math.nan if index == 4 else 0.5 + 0.04 * index)]
        curve += [] if index == 4 else [(75, -300.0 if index == 9 else 0.6 + 0.03 * index)]
        curve = [] if index == 10 else curve
        sweep.trial(f"{index:03d}", index, params, curve, status="FINISHED" if index < 8 else None)
    sweep.journal.close()
    return folder


def seeds_of_points(folder: Path) -> Path:
    """A search with two seeds for each point."""
    body = {"space": {"training.lr": {"grid": [1e-3, 3e-3, 1e-2]}}, "seeds": 2}
    sweep = WrittenSweep(folder, body)
    for point, params in enumerate(sweep.space.grid_points()):
        for seed in (0, 1):
            curve = loss_curve(2.3 + 0.1 * point + 0.003 * seed, 200)
            sweep.trial(f"{point:03d}-s{seed}", point, params, curve, seed=seed)
    return sweep.end()


def once_at_the_end(folder: Path) -> Path:
    """A table whose trials were validated after their last step alone."""
    sweep = WrittenSweep(folder, {"variants": {"a": {}, "b": {"training.lr": 0.1}}, "seeds": 2})
    for point, label in enumerate("ab"):
        for seed in (0, 1):
            curve = [(200, 1.6 + 0.1 * point + 0.01 * seed)]
            sweep.trial(f"{label}-s{seed}", point, {}, curve, label=label, seed=seed)
    return sweep.end()


SWEEPS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "one trial": (lambda f: lr_search(f, 1), [*SPACE_FIGURES, "leaderboard"]),
    "one dimension": (lambda f: lr_search(f, 8), [*SPACE_FIGURES, "leaderboard"]),
    "mixed": (
        lambda f: lr_search(f, 24, body=MIXED, failed=(3, 7, 11)),
        [*SPACE_FIGURES, "importance", "leaderboard"],
    ),
    "odd": (odd_search, [*SPACE_FIGURES, "leaderboard"]),
    "two metrics": (two_metrics, ["pareto", *SPACE_FIGURES, "importance", "leaderboard"]),
    "variants": (lambda f: variants_table(f, {"baseline": 1.62, "same": 1.621, "low": 1.75}), SEED_FIGURES),
    "one seed": (lambda f: variants_table(f, {"baseline": 1.62, "other": 1.65}, seeds=1), SEED_FIGURES),
    "measured once": (once_at_the_end, ["intervals", "leaderboard"]),
    "long names": (lambda f: variants_table(f, {f"{LONG}{i}": 1.6 + 0.02 * i for i in range(4)}), SEED_FIGURES),
    "many variants": (lambda f: variants_table(f, {f"v{i}": 1.6 + i / 300 for i in range(40)}, seeds=2), SEED_FIGURES),
    "seeds of points": (seeds_of_points, ["intervals", *SPACE_FIGURES, "leaderboard"]),
}


@pytest.mark.parametrize("kind", SWEEPS)
def test_every_figure_is_drawn_whole_and_the_same_each_time(tmp_path: Path, kind: str) -> None:
    make, names = SWEEPS[kind]
    results = read_results(make(tmp_path / "sweep"))
    first, again = write_plots(results, tmp_path / "a"), write_plots(results, tmp_path / "b")
    assert list(first) == names
    for name, path in first.items():
        assert path.read_bytes() == again[name].read_bytes(), name
        with Image.open(path) as image:
            assert not getattr(image, "text", {}), "no date, no program in the file"
            pixels = np.asarray(image.convert("L"))
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edge == 255).all(), f"{name}: something is cut off at the border"
        assert (pixels < 128).mean() > 0.002, f"{name} is empty"
        assert 600 <= pixels.shape[1] <= 3000


def test_a_sweep_without_trials_gives_no_figures(tmp_path: Path) -> None:
    sweep = WrittenSweep(tmp_path / "sweep", MIXED)
    assert write_plots(read_results(sweep.end()), tmp_path) == {}


def test_200_trials_take_seconds(tmp_path: Path) -> None:
    results = read_results(lr_search(tmp_path / "sweep", 200, body=MIXED, failed=(3, 7)))
    assert len(write_plots(results, tmp_path)) == 5
    assert views.count_line(results.outcomes) == "200 trials: 67 finished, 131 stopped early, 2 failed"


def test_the_front_is_what_no_other_trial_beats(tmp_path: Path) -> None:
    results = read_results(two_metrics(tmp_path / "sweep"))
    front = {outcome.trial for outcome in pareto_front(results)}
    scores = {o.trial: (o.values["val_loss"], -o.values["tokens_per_second"]) for o in results.outcomes}
    for trial, (loss, speed) in scores.items():
        beaten = any(a <= loss and b <= speed and (a, b) != (loss, speed) for a, b in scores.values())
        assert (trial in front) == (not beaten)


def test_a_window_leaves_out_what_diverged_and_nothing_else() -> None:
    assert views.window([2.3, 2.4, 2.5, 2.7, 900.0], "min") == (2.3, 2.7)
    assert views.window([0.9, 0.8, 0.7, -50.0], "max") == (0.7, 0.9)
    assert views.window([2.3, 2.4, 2.5, 4.0], "min") == (2.3, 4.0)
    # Seeds that agree do not push a variant out that is a quarter worse.
    assert views.window([1.93, 1.94, 1.93, 1.94, 2.51, 2.5], "min") == (1.93, 2.51)
    assert views.window([2.0, 9000.0], "min") == (2.0, 9000.0)  # two values: which one is out of proportion?
    assert views.window([2.0], "min") == (2.0, 2.0)
    assert views.window([2.0, 2.0, 2.0, 5.0], "min") == (2.0, 5.0)


def test_axes_of_parameters(tmp_path: Path) -> None:
    results = read_results(lr_search(tmp_path / "sweep", 24, body=MIXED))
    lr = views.axis_of(results, "training.lr")
    assert (lr.kind, lr.title) == ("log", "lr")
    positions = [lr.position(outcome.params) for outcome in results.outcomes]
    assert min(positions) == 0.0 and max(positions) == pytest.approx(1.0)
    middle = math.sqrt(lr.low * lr.high)
    assert lr.position({"training.lr": middle}) == pytest.approx(0.5)
    decay = views.axis_of(results, "training.decay_fraction")
    assert decay.absent and decay.position({}) < 0 and decay.ticks()[0][1] == "not set"
    clip = views.axis_of(results, "training.grad_clip")
    assert (clip.kind, [text for _, text in clip.ticks()]) == ("category", ["0.5", "1", "none"])
    depth = views.axis_of(results, "model.depth")
    assert [text for _, text in depth.ticks()] == ["4", "6"], "the choices, not numbers between them"


def test_a_grid_of_decades_is_drawn_by_ratio(tmp_path: Path) -> None:
    for index, (values, kind) in enumerate({(1e-4, 1e-3, 1e-2): "log", (10, 20, 30): "linear"}.items()):
        sweep = WrittenSweep(tmp_path / str(index), {"space": {"training.lr": {"grid": list(values)}}})
        for point, params in enumerate(sweep.space.grid_points()):
            sweep.trial(f"{point:03d}", point, params, loss_curve(2.3, 200))
        assert views.axis_of(read_results(sweep.end()), "training.lr").kind == kind


def test_ticks_of_a_scale() -> None:
    wide = views.Axis("a", "a", "log", 1e-5, 1.0)
    assert [text for _, text in wide.ticks(5)] == ["1e-05", "0.0001", "0.001", "0.01", "0.1", "1"]
    narrow = views.Axis("a", "a", "log", 0.0011, 0.0019)
    assert len(narrow.ticks()) >= 3
    assert [text for _, text in views.Axis("a", "a", "linear", 0.0, 1.0).ticks(5)] == [
        "0",
        "0.2",
        "0.4",
        "0.6",
        "0.8",
        "1",
    ]
    assert views.Axis("a", "a", "linear", 3.0, 3.0).ticks() == [(0.5, "3")]


def test_short_texts_of_different_values_differ() -> None:
    values = [{"name": "x" * 60, "last": i} for i in range(3)] + [None, True, 2, 0.5]
    named = views.order_of_values(values)
    assert len({text for _, text in named}) == len(values)
    assert max(len(text) for _, text in named) <= 27


def test_shades_run_from_dark_to_light() -> None:
    levels = [sum(int(views.shade(i / 10)[k : k + 2], 16) for k in (1, 3, 5)) for i in range(11)]
    assert levels[0] < levels[-1] and views.shade(-1) == views.shade(0) and views.shade(2) == views.shade(1)
