"""Searchers: the points they propose, what they learn, and that a search goes on from a journal as if never stopped."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glowflow.config.errors import ConfigError
from glowflow.config.loader import load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.space import RandomDraw, Searcher, Space, load_space
from glowflow.config.spaces.values import same
from glowflow.experiments.journal import Journal, SweepState, Trial, read_journal
from glowflow.experiments.searchers import (
    SEARCHER_NAMES,
    Ask,
    SearchStrategy,
    history_of_sweep,
    make_strategy,
    outcome_of,
    replay,
    unclaimed,
    warm_start,
)
from glowflow.experiments.searchers.questions import Asker, answers_of

PLAIN = {"training.lr": {"loguniform": [1e-4, 1e-1]}, "training.optimizer.weight_decay": {"uniform": [0, 0.3]}}
RICH = {
    **PLAIN,
    "training.schedule": {"choice": ["cosine", "constant"]},
    "training.warmup_steps": {"choice": [0, None, 20], "when": {"training.schedule": "cosine"}},
    "training.grad_clip": {"uniform": [0.1, 2.1], "step": 0.1},
    "training.batch_size": {"randint": [8, 64], "step": 8, "when": {"training.warmup_steps": [0, None]}},
    "model": {"choice": [{"dim": 128}, {"dim": 128, "depth": 6}, {"dim": 160, "depth": 4, "ffn": {"mult": 2}}]},
    "training.min_lr": {"grid": [1e-4, 1e-3]},
    "tracking.tags": {"choice": [["a"], ["a", "b"]]},
    "training.decay_fraction": [
        {"loguniform": [0.1, 0.3], "when": {"training.schedule": "cosine"}},
        {"choice": [0.5, 0.7], "when": {"training.schedule": "constant"}},
    ],
}
GRID = {
    "training.schedule": {"grid": ["cosine", "constant"]},
    "training.warmup_steps": {"grid": [0, 20, 40], "when": {"training.schedule": "cosine"}},
    "model.depth": {"grid": [2, 4, 8]},
}
PROGRAM = """
SPACE = {"searcher": "optuna", "trials": 12}

def space(draw):
    point = {"training.lr": draw.loguniform("training.lr", 1e-4, 1e-2)}
    kind = draw.choice("model.arch", ["a", "b"])
    if kind == "a":
        # Another range, another kind and another list under the same keys, depending on what was drawn before.
        point["model.depth"] = draw.randint("model.depth", 2, 8, 2)
        point["model.dim"] = draw.choice("model.dim", [64, 128])
    else:
        point["model.depth"] = draw.choice("model.depth", [3, 5])
        point["model.dim"] = draw.choice("model.dim", [64, 96, 128])
    return {**point, "model.arch": kind}
"""


@pytest.fixture(scope="module")
def config() -> GlowFlowConfig:
    return load_config({})


def space_of(searcher: str, dimensions: dict[str, Any], seed: int = 0, **more: Any) -> Space:
    """A space with any searcher of this package, those that need a package of their own included."""
    planned = searcher if searcher in ("random", "grid") else "random"
    space = load_space({"space": dimensions, "searcher": planned, **more})
    return dataclasses.replace(space, searcher=Searcher(searcher, seed))


def needs(name: str) -> Any:
    marks = [pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")]
    return pytest.param(name, marks=[*marks, pytest.mark.slow] if name == "ax" else marks)


LEARNERS = [needs(name) for name in SEARCHER_NAMES if name not in ("random", "grid", "variants")]


def loss(params: dict[str, Any]) -> float:
    """Least at lr 3e-3, weight decay 0.1."""
    return (math.log10(params["training.lr"]) + 2.5) ** 2 + 20 * (params["training.optimizer.weight_decay"] - 0.1) ** 2


def asks(strategy: SearchStrategy, most: int = 100) -> list[Ask]:
    return [ask for ask, _ in zip(iter(strategy.ask, None), range(most), strict=False)]


# -- planned points ---------------------------------------------------------------------------------------------------


def test_random_points_are_a_function_of_seed_and_number(config: GlowFlowConfig) -> None:
    space = space_of("random", RICH, seed=3, trials=7)
    assert asks(make_strategy(space, config)) == [Ask(n, None, space.draw(RandomDraw(3, n))) for n in range(7)]


def test_a_grid_is_gone_through_in_order(config: GlowFlowConfig) -> None:
    space = space_of("grid", GRID)
    found = asks(make_strategy(space, config))
    assert [ask.params for ask in found] == space.grid_points() and len(found) == 12
    assert [ask.point for ask in found] == list(range(12))
    assert found[:5] == asks(make_strategy(dataclasses.replace(space, trials=5), config))


def test_variants_come_with_their_labels(config: GlowFlowConfig) -> None:
    space = load_space({"variants": {"baseline": {}, "fast": {"training.lr": 0.01, "model.depth": 2}}})
    expected = [Ask(0, "baseline", {}), Ask(1, "fast", {"training.lr": 0.01, "model.depth": 2})]
    assert asks(make_strategy(space, config)) == expected


def test_an_unknown_searcher_is_refused(config: GlowFlowConfig) -> None:
    with pytest.raises(ConfigError, match=r"searcher\.name: is not known \(got 'bohb'\)"):
        make_strategy(space_of("bohb", PLAIN, trials=3), config)


# -- a point and its answers ------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_a_point_is_found_again_by_its_answers(index: int) -> None:
    space = space_of("random", RICH, trials=1)
    point = space.draw(RandomDraw(0, index))
    answers = answers_of(space, point)
    assert answers is not None
    by_question = dict(answers)
    assert same(space.draw(Asker(lambda question: by_question[question])), point)
    # What such a point does not have is passed over; what it must have is not.
    assert answers_of(space, {**point, "training.seed": 1}) == answers
    for key in point:
        if key != "model.depth":  # without it, {dim: 128} is a point too
            assert answers_of(space, {k: v for k, v in point.items() if k != key}) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.lr", 1.0), ("training.lr", "0.01"), ("training.lr", None), ("training.lr", math.nan),
        ("training.schedule", "wsd"), ("training.grad_clip", 0.25), ("training.grad_clip", True),
        ("training.batch_size", 12), ("training.batch_size", 72), ("training.batch_size", 16.0),
        ("training.warmup_steps", False), ("model.dim", 160), ("tracking.tags", ["b"]),
        ("training.decay_fraction", 0.5),
    ],
)  # fmt: skip
def test_a_point_out_of_range_has_no_answers(key: str, value: Any) -> None:
    space = space_of("random", RICH, trials=1)
    point = {
        "training.lr": 0.01, "training.optimizer.weight_decay": 0, "training.schedule": "cosine",
        "training.warmup_steps": None, "training.grad_clip": 0.3, "training.batch_size": 16, "model.dim": 128,
        "model.depth": 6, "training.min_lr": 0.001, "tracking.tags": ["a", "b"], "training.decay_fraction": 0.2,
    }  # fmt: skip
    assert answers_of(space, point) is not None
    assert answers_of(space, {**point, key: value}) is None


# -- going on from a journal ------------------------------------------------------------------------------------------


class Sweep:
    """Asks, trains (a formula) and tells as a driver does, and writes the journal."""

    def __init__(self, space: Space, folder: Path, config: GlowFlowConfig) -> None:
        self.space, self.folder, self.config = space, folder, config
        self.strategy = make_strategy(space, config)
        self.journal = Journal(folder)
        self.journal.append("sweep", name="s", metric=list(space.metrics), mode=list(space.modes))
        self.open: dict[int, Ask] = {}

    def ask(self) -> Ask | None:
        ask = self.strategy.ask()
        if ask is not None:
            self.open[ask.point] = ask
            for seed in self.space.seeds:
                trial = {"trial": f"{ask.point}-s{seed}", "point": ask.point, "label": ask.label, "seed": seed}
                self.journal.append("claimed", **trial, params=ask.params)
        return ask

    def end(self, which: int, how: str) -> None:
        """One of the open points ends: all its seeds as ``how`` says, the last one FINISHED where that is MIXED."""
        ask = self.open.pop(sorted(self.open)[which % len(self.open)])
        for seed in self.space.seeds:
            trial, last = f"{ask.point}-s{seed}", seed == self.space.seeds[-1]
            status = ("FINISHED" if last else "FAILED") if how == "MIXED" else how
            values = {metric: math.sin(17 * ask.point + 3 * seed + i) for i, metric in enumerate(self.space.metrics)}
            self.journal.append("running", trial=trial, directory=trial, attempt=1, from_step=0)
            self.journal.append("reported", trial=trial, step=25, metrics=values)
            if len(self.space.metrics) == 1:
                self.strategy.prune(ask.point, 25, values[self.space.metrics[0]])
            step = 25 if status == "STOPPED" else 100
            self.journal.append("done", trial=trial, status=status, step=step, metrics=values)
        state = read_journal(self.folder)
        outcome = outcome_of(state.points()[ask.point], self.space.metrics, len(self.space.seeds))
        assert outcome is not None
        self.strategy.tell(ask.point, outcome.values, ask.params, step=outcome.step)

    def crash_and_resume(self) -> None:
        self.journal.close()
        self.journal = Journal(self.folder)
        self.strategy = make_strategy(self.space, self.config)
        replay(self.strategy, read_journal(self.folder), self.space)


ACTIONS = st.lists(
    st.one_of(
        st.just(("ask", 0, "")),
        st.tuples(st.just("end"), st.integers(0, 9), st.sampled_from(["STOPPED", "FINISHED", "MIXED", "FAILED"])),
    ),
    min_size=3,
    max_size=45,
)


def spaces(tmp: Path) -> dict[str, Space]:
    (tmp / "shape.py").write_text(PROGRAM)
    two = {"metric": ["val_loss", "tokens_per_second"], "mode": ["min", "max"]}
    return {
        "random": space_of("random", RICH, trials=30, seeds=2),
        "grid": space_of("grid", GRID),
        "variants": load_space({"variants": {str(n): {"model.depth": n} for n in range(1, 9)}, "seeds": [5, 7]}),
        "optuna": space_of("optuna", RICH, trials=30, seeds=2),
        "optuna, two metrics": space_of("optuna", RICH, trials=30, **two),
        "optuna, Python": load_space(tmp / "shape.py", {"trials": 30}),
    }


@pytest.mark.parametrize("name", ["random", "grid", "variants", "optuna", "optuna, two metrics", "optuna, Python"])
def test_a_replayed_search_goes_on_as_if_never_interrupted(name: str, config: GlowFlowConfig, tmp_path: Path) -> None:
    space = spaces(tmp_path)[name]

    @settings(max_examples=8)
    @given(warmed=st.sampled_from([0, 9, 14]), actions=ACTIONS, crashes=st.sets(st.integers(0, 44), max_size=3))
    def check(warmed: int, actions: list[tuple[str, int, str]], crashes: set[int]) -> None:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            straight, broken = Sweep(space, Path(one), config), Sweep(space, Path(two), config)
            plan = [("ask", 0, ""), ("end", 0, "FINISHED")] * warmed  # so that a learning search has something to learn
            for number, (action, which, how) in enumerate([*plan, *actions]):
                if number - len(plan) in crashes:
                    broken.crash_and_resume()
                if action == "ask":
                    assert straight.ask() == broken.ask()
                elif straight.open:
                    straight.end(which, how)
                    broken.end(which, how)
            broken.crash_and_resume()
            assert asks(straight.strategy, 3) == asks(broken.strategy, 3)

    check()


def test_replay_of_the_same_journal_gives_the_same_next_points(config: GlowFlowConfig, tmp_path: Path) -> None:
    sweep = Sweep(space_of("optuna", PLAIN, trials=60), tmp_path, config)
    for number in range(30):
        sweep.ask()
        sweep.end(0, ["FINISHED", "STOPPED", "FAILED"][number % 3])
    sweep.ask()
    first = sweep.strategy
    sweep.crash_and_resume()
    second = sweep.strategy
    sweep.crash_and_resume()
    following = asks(sweep.strategy, 3)
    assert following == asks(second, 3) == asks(first, 3) and [ask.point for ask in following] == [31, 32, 33]


def test_a_point_that_was_claimed_for_some_seeds_only(config: GlowFlowConfig, tmp_path: Path) -> None:
    space = space_of("random", PLAIN, trials=5, seeds=3)
    sweep = Sweep(space, tmp_path, config)
    sweep.ask()
    sweep.end(0, "FINISHED")
    lost = sweep.strategy.ask()
    assert lost is not None
    sweep.journal.append("claimed", trial="1-s0", point=1, label=None, seed=0, params=lost.params)
    state = read_journal(tmp_path)
    assert unclaimed(state, space.seed_values(0)) == [(lost, 1), (lost, 2)]
    assert outcome_of(state.points()[1], space.metrics, 3) is None
    sweep.crash_and_resume()
    assert [ask.point for ask in asks(sweep.strategy)] == [2, 3, 4]


def test_more_trials_than_at_first(config: GlowFlowConfig, tmp_path: Path) -> None:
    sweep = Sweep(space_of("random", PLAIN, trials=3), tmp_path, config)
    while sweep.ask():
        sweep.end(0, "FINISHED")
    sweep.space = dataclasses.replace(sweep.space, trials=5)
    sweep.crash_and_resume()
    assert [ask.point for ask in asks(sweep.strategy)] == [3, 4]


# -- what a point has given -------------------------------------------------------------------------------------------


def test_the_outcome_of_a_point_is_the_mean_of_its_seeds() -> None:
    def trials(*rows: tuple[str, float | None, int]) -> list[Trial]:
        return [
            Trial(f"0-s{i}", 0, None, i, {}, status, step=step, metrics={} if value is None else {"val_loss": value})
            for i, (status, value, step) in enumerate(rows)
        ]

    def outcome(*rows: tuple[str, float | None, int]) -> tuple[list[float] | None, int | None] | None:
        found = outcome_of(trials(*rows), ["val_loss"], 2)
        return None if found is None else (found.values, found.step)

    assert outcome(("FINISHED", 1.0, 100), ("FINISHED", 2.0, 100)) == ([1.5], None)
    assert outcome(("FINISHED", 1.0, 100), ("STOPPED", 2.0, 25)) == ([1.5], 25)
    assert outcome(("FINISHED", 1.0, 100), ("FAILED", 9.0, 25)) == ([1.0], None)
    assert outcome(("FINISHED", math.nan, 100), ("FAILED", 9.0, 25)) == (None, None)
    assert outcome(("FINISHED", None, 100), ("STOPPED", None, 25)) == (None, None)
    for status in ("CLAIMED", "RUNNING", "KILLED"):
        assert outcome(("FINISHED", 1.0, 100), (status, 1.0, 25)) is None
    assert outcome(("FINISHED", 1.0, 100)) is None


# -- learning ---------------------------------------------------------------------------------------------------------


def search(
    space: Space, config: GlowFlowConfig, parallel: int, result: Callable[[dict[str, Any]], list[float] | None]
) -> list[Ask]:
    """Runs a search with some points at a time."""
    strategy, waiting, found = make_strategy(space, config), [], []
    while (ask := strategy.ask()) is not None:
        found.append(ask)
        waiting.append(ask)
        if len(waiting) == parallel:
            done = waiting.pop(0)
            strategy.tell(done.point, result(done.params), done.params)
    return found


@pytest.mark.parametrize("name", [needs("optuna"), needs("hyperopt")])
def test_what_is_learnt_beats_chance(name: str, config: GlowFlowConfig) -> None:
    def best(searcher: str, seed: int) -> float:
        space = space_of(searcher, PLAIN, seed=seed, trials=40)
        return min(loss(ask.params) for ask in search(space, config, 2, lambda params: [loss(params)]))

    learnt, chance = ([best(searcher, seed) for seed in range(7)] for searcher in (name, "random"))
    assert statistics.median(learnt) < 0.5 * statistics.median(chance)


@pytest.mark.parametrize("name", LEARNERS)
def test_greater_is_better_where_the_mode_says_so(name: str, config: GlowFlowConfig) -> None:
    trials, late = (9, 2) if name == "ax" else (40, 10)
    space = space_of(name, PLAIN, trials=trials, metric="a/b", mode="max")
    found = [loss(ask.params) for ask in search(space, config, 1, lambda params: [-loss(params)])]
    assert statistics.median(found[-late:]) < statistics.median(found[:-late])


@pytest.mark.parametrize("name", LEARNERS)
def test_ten_points_of_a_rich_space(name: str, config: GlowFlowConfig) -> None:
    def result(params: dict[str, Any]) -> list[float] | None:
        return None if params["model.dim"] == 160 else [loss(params)]

    space = space_of(name, RICH, trials=10, seed=1)
    found = search(space, config, 3, result)
    assert [ask.point for ask in found] == list(range(10))
    assert all(answers_of(space, ask.params) is not None for ask in found)
    assert len({repr(ask.params) for ask in found}) == 10  # though three are always on their way
    assert found == search(space, config, 3, result)
    assert found != search(space_of(name, RICH, trials=10, seed=2), config, 3, result)


def test_all_points_may_fail(config: GlowFlowConfig) -> None:
    assert len(search(space_of("optuna", RICH, trials=25), config, 2, lambda params: None)) == 25
    assert len(search(space_of("optuna", RICH, trials=25), config, 2, lambda params: [math.nan])) == 25


def test_parallel_points_keep_apart(config: GlowFlowConfig) -> None:
    strategy = make_strategy(space_of("optuna", PLAIN, trials=40), config)
    for _ in range(15):
        ask = strategy.ask()
        assert ask is not None
        strategy.tell(ask.point, [loss(ask.params)], ask.params)
    rates = [math.log10(ask.params["training.lr"]) for ask in asks(strategy, 8)]
    assert max(rates) - min(rates) > 0.5 and len(set(rates)) == 8


def test_a_point_that_was_stopped_early_is_behind_all_that_were_not(config: GlowFlowConfig) -> None:
    """Its loss looks best (say, of a metric that grows as training goes on), yet the search must not go there."""

    def late_rates(step: int | None) -> list[float]:
        strategy = make_strategy(space_of("optuna", PLAIN, trials=100), config)
        for number in range(40):
            ask = strategy.ask()
            assert ask is not None
            high = ask.params["training.lr"] > 3e-3
            value = -10.0 - number / 100 if high else loss(ask.params)
            strategy.tell(ask.point, [value], ask.params, step=step if high else None)
        return [ask.params["training.lr"] for ask in asks(strategy, 10)]

    assert statistics.median(late_rates(None)) > 3e-3 > statistics.median(late_rates(25))


def test_two_objectives_approach_their_front(config: GlowFlowConfig) -> None:
    """f = x², g = (x - 2)² with x = log10(lr) + 4 from 0 to 3: all of x in [0, 2] is optimal, the rest is not."""
    two = {"metric": ["a/f", "a/g"], "mode": ["min", "max"]}

    def result(params: dict[str, Any]) -> list[float]:
        x = math.log10(params["training.lr"]) + 4
        return [x**2, -((x - 2) ** 2)]

    space = space_of("optuna", PLAIN, trials=60, **two)
    late = [math.log10(ask.params["training.lr"]) + 4 for ask in search(space, config, 2, result)][30:]
    assert statistics.fmean(x <= 2.1 for x in late) > 0.8  # 0.7 by chance
    assert min(late) < 0.5 and max(late) > 1.5


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ax") is None, reason="ax is not installed")
def test_ax_takes_two_objectives(config: GlowFlowConfig) -> None:
    space = space_of("ax", PLAIN, trials=7, metric=["a/f", "a/g"], mode=["min", "max"])
    assert len(search(space, config, 1, lambda params: [loss(params), params["training.lr"]])) == 7


@pytest.mark.skipif(importlib.util.find_spec("hyperopt") is None, reason="hyperopt is not installed")
def test_hyperopt_says_what_it_cannot_search(config: GlowFlowConfig, tmp_path: Path) -> None:
    (tmp_path / "shape.py").write_text(PROGRAM)
    space = load_space(tmp_path / "shape.py", {"metric": ["val_loss", "perplexity"]})
    space = dataclasses.replace(space, searcher=Searcher("hyperopt"))
    with pytest.raises(ConfigError, match=r"Python space(.|\n)*searches for one metric"):
        make_strategy(space, config)


def test_optuna_says_nothing_and_keeps_its_settings(
    config: GlowFlowConfig, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.INFO)
    try:
        search(space_of("optuna", RICH, trials=15), config, 2, lambda params: [loss(params)])
        assert optuna.logging.get_verbosity() == logging.INFO
    finally:
        optuna.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "") and not recwarn.list


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "searcher.name: needs the package optuna (got 'optuna'); pip install 'optuna'"),
        ("import a_module_that_is_not_there", "its package is there but cannot be imported: No module named 'a_mod"),
    ],
)
def test_a_missing_package_is_one_clear_error(tmp_path: Path, content: str | None, message: str) -> None:
    script = """
import sys
from glowflow.config.errors import ConfigError
from glowflow.config.space import load_space
from glowflow.experiments.searchers import make_strategy
assert "optuna" not in sys.modules  # nothing is loaded before it is asked for
if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])
else:
    sys.modules["optuna"] = None  # as Python marks what it could not find
space = load_space({"space": {"training.lr": {"uniform": [0.1, 0.2]}}, "searcher": "optuna", "trials": 2})
try:
    make_strategy(space, None)
except ConfigError as error:
    print(error)
"""
    arguments = []
    if content is not None:
        (tmp_path / "optuna.py").write_text(content)
        arguments = [str(tmp_path)]
    command = [sys.executable, "-c", script, *arguments]
    assert message in subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


# -- warm starts ------------------------------------------------------------------------------------------------------


def test_earlier_results_are_used_where_they_fit(config: GlowFlowConfig) -> None:
    good = [({"training.lr": 3e-3 * 1.02**n, "training.optimizer.weight_decay": 0.1}, [n / 100]) for n in range(12)]
    bad = [({"training.lr": 0.05 * 1.02**n, "training.optimizer.weight_decay": 0.2}, [9.0]) for n in range(12)]
    useless: list[Any] = [
        ({"training.lr": 3e-3}, [1.0]),
        ({"training.lr": 3.0, "training.optimizer.weight_decay": 0.1}, [1.0]),
        ({"training.lr": 3e-3, "training.optimizer.weight_decay": 0.1}, [math.nan]),
        ({"training.lr": 3e-3, "training.optimizer.weight_decay": 0.1}, [1.0, 2.0]),
    ]
    first: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(9):
        for warm in first:
            strategy = make_strategy(space_of("optuna", PLAIN, seed=seed, trials=8), config)
            assert not warm or warm_start(strategy, [*good, *useless, *bad]) == 24
            found = asks(strategy)
            assert [ask.point for ask in found] == list(range(8))
            first[warm].append(loss(found[0].params))
    assert statistics.median(first[True]) < 0.5 * statistics.median(first[False])
    random = make_strategy(space_of("random", PLAIN, trials=8), config)
    assert warm_start(random, good) == 0 and not random.learns


def test_a_warm_start_in_the_journal_outlives_the_driver(config: GlowFlowConfig, tmp_path: Path) -> None:
    history = [({"training.lr": 3e-3, "training.optimizer.weight_decay": n / 100}, [float(n)]) for n in range(15)]
    space = space_of("optuna", PLAIN, trials=8)
    straight = make_strategy(space, config)
    warm_start(straight, history)
    journal = Journal(tmp_path)
    journal.append("sweep", name="s", metric=["val_loss"], mode=["min"], history=history)
    journal.close()
    resumed = make_strategy(space, config)
    replay(resumed, read_journal(tmp_path), space)
    assert asks(straight) == asks(resumed)


def test_the_history_of_a_sweep_for_another(tmp_path: Path) -> None:
    def trial(point: int, seed: int, params: dict[str, Any], status: str, value: float) -> Trial:
        metrics = {"val_loss": value, "perplexity": math.exp(value)}
        return Trial(f"{point}-s{seed}", point, None, seed, params, status, metrics=metrics, step=100, proposed=params)

    trials = [
        trial(0, 0, {"training.lr": 0.01}, "FINISHED", 1.0),
        trial(0, 1, {"training.lr": 0.01}, "FINISHED", 2.0),
        trial(1, 0, {"training.lr": 0.02}, "STOPPED", 1.0),
        trial(2, 0, {"training.lr": 0.03}, "FAILED", 1.0),
        trial(3, 0, {"training.lr": 0.04, "training.grad_clip": 2.0}, "FINISHED", 3.0),
        trial(4, 0, {"training.lr": 0.05, "training.grad_clip": 1.0}, "FINISHED", 4.0),
        trial(5, 0, {"training.lr": 0.06}, "RUNNING", 1.0),
    ]
    settings = {"training": {"lr": 0.5, "grad_clip": 1.0, "optimizer": {"weight_decay": 0.1}}}
    about = {"config": settings, "space": {"set": {"training.optimizer.weight_decay": 0.2}}}
    state = SweepState(about, {trial.id: trial for trial in trials})
    decayed = {"training.optimizer.weight_decay": 0.2}
    assert history_of_sweep(state, space_of("optuna", PLAIN, trials=3)) == [
        ({"training.lr": 0.01, **decayed}, [1.5]),
        ({"training.lr": 0.05, "training.grad_clip": 1.0, **decayed}, [4.0]),
    ]
    two = space_of("optuna", PLAIN, trials=3, metric=["perplexity", "tokens"], mode="min")
    assert history_of_sweep(state, two) == []
