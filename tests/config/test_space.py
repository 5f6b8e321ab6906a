"""Spaces: what a file may say, and how points are drawn."""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.loader import load_config
from glowflow.config.space import RandomDraw, Scheduler, Searcher, Space, check_space, load_space
from glowflow.config.spaces.values import same

CONFIG = load_config({"training": {"max_steps": 200, "batch_size": 16, "min_lr": 1e-5}, "model": {"dim": 64}})
LR = {"training.lr": {"loguniform": [1e-4, 1e-2]}}


def problems(raw: Any, **overrides: Any) -> dict[str, Problem]:
    """The problems of a bad file by key; fails when two have the same key."""
    with pytest.raises(ConfigError) as error:
        load_space(raw, overrides)
    return by_key(error.value)


def by_key(error: ConfigError) -> dict[str, Problem]:
    found = {problem.key: problem for problem in error.problems}
    assert len(found) == len(error.problems), str(error)
    return found


def of(dimensions: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"trials": 4, "space": dimensions, **more}


def write(tmp_path: Path, text: str, name: str = "space.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# --- what a file says ----------------------------------------------------------------------------------------------


def test_a_whole_file(tmp_path: Path) -> None:
    text = """
        metric: [val_loss, tokens_per_second]
        mode: [min, max]
        set: {resources: {workers: 1}, training.grad_clip: null}
        space:
          training.warmup_steps: {choice: [0, 20], when: {training.schedule: [cosine, wsd]}}
          training.schedule: {choice: [cosine, wsd, constant]}
          training.lr: {loguniform: [1e-4, 1e-2]}
          training.batch_size: {randint: [8, 16], step: 8}
          model: {choice: [{dim: 64, heads: 2}, {dim: 96}]}
        searcher: {name: optuna, seed: 3}
        trials: 9
        seeds: [5, 7]
        concurrency: 2
        time_budget: 1.5h
        max_failed: 0.25
    """
    space = load_space(write(tmp_path, text, "mine.yaml"))
    assert (space.name, space.source) == ("mine", str(tmp_path / "mine.yaml"))
    assert (space.metrics, space.modes) == (("val_loss", "tokens_per_second"), ("min", "max"))
    assert space.fixed == {"resources.workers": 1, "training.grad_clip": None}
    assert (space.searcher, space.scheduler) == (Searcher("optuna", 3), Scheduler("fifo"))
    assert (space.trials, space.concurrency, space.time_budget_s, space.max_failed) == (9, 2, 5400.0, 0.25)
    assert space.seed_values(100) == (5, 7)
    assert set(space.keys()) == {
        "training.schedule", "training.warmup_steps", "training.lr", "training.batch_size", "model.dim", "model.heads"
    }  # fmt: skip
    assert not space.numeric("training.schedule") and space.numeric("model.dim")
    assert space.log_scaled("training.lr") and not space.log_scaled("training.batch_size")
    assert check_space(space, CONFIG) == []


def test_defaults() -> None:
    space = load_space({"space": {"training.lr": {"grid": [1e-3, 2e-3]}, "model.depth": {"grid": [1, 2, 3]}}})
    assert (space.metrics, space.modes, space.searcher) == (("val_loss",), ("min",), Searcher("grid"))
    assert (space.trials, space.num_points(), space.size, space.max_failed) == (None, 6, 6, 0.5)
    assert load_space({"variants": {"a": {}}}).searcher.name == "variants"
    assert load_space(of(LR)).searcher == Searcher("random")
    assert load_space(of(LR, seeds=3)).seed_values(10) == (10, 11, 12)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("2h", 7200), ("1.5h", 5400), (".5h", 1800), ("1d", 86400), (7, 7), ("45", 45)],
)
def test_durations(text: Any, seconds: float) -> None:
    assert load_space(of(LR, time_budget=text)).time_budget_s == seconds


@pytest.mark.parametrize("text", ["2 hours", "", "h", "-3s", 0, -1, True, math.inf, [1], "1h30m"])
def test_bad_durations(text: Any) -> None:
    assert set(problems(of(LR, time_budget=text))) == {"time_budget"}


@pytest.mark.parametrize(
    ("body", "key", "rule"),
    [
        ({"uniform": [2, 1]}, "", r"low \(2\) must be less than high \(1\)"),
        ({"uniform": [1, 1]}, "", "must be less than"),
        ({"uniform": [0, math.inf]}, "", "high must be a finite number"),
        ({"uniform": [0, "x"]}, "", "high must be a finite number, not x"),
        ({"uniform": [0, True]}, "", "high must be a finite number"),
        ({"uniform": [0, 1, 2]}, "", "a list of two"),
        ({"uniform": 3}, "", "a list of two"),
        ({"uniform": [0, 1], "step": 0.3}, "", r"must divide high - low \(1\): .* is 0.9"),
        ({"uniform": [0, 1], "step": 0}, "", "greater than 0"),
        ({"uniform": [0, 1], "step": 2}, "", "greater than high - low"),
        ({"uniform": [0, 1], "step": None}, "", "not null"),
        ({"loguniform": [0, 1]}, "", "low must be greater than 0"),
        ({"loguniform": [1, 2], "step": 1}, "", "no `step`"),
        ({"randint": [1, 4.0]}, "", "high must be a whole number"),
        ({"randint": [1, 4], "step": 2}, "", "must divide"),
        ({"randint": [1, 4], "step": 1.0}, "", "step must be a whole number"),
        ({"choice": []}, "", "at least one value"),
        ({"choice": [1, 2, 1.0]}, "", "holds 1.0 twice"),
        ({"choice": [1, math.nan]}, "", "value 2 must be a finite number"),
        ({"choice": [{3: 4}]}, "", "keys must be text"),
        ({"choice": "abc"}, "", "must be a list of values"),
        ({"choice": [1], "step": 1}, "", "no `step`"),
        ({"choice": [1], "grid": [2]}, "", "one of uniform"),
        ({}, "", "one of uniform"),
        ([1, 2], "", "one of uniform"),
        (3, "", "one of uniform"),
        ({"loguniforn": [1, 2]}, ".loguniforn", "not a known key"),
        ({"uniform": [0, 1], "wen": {}}, ".wen", "not a known key"),
        ({"uniform": [0, 1], "when": 3}, ".when", "must be a mapping"),
        ({"uniform": [0, 1], "when": {"training.lr": []}}, ".when.training.lr", "at least one value"),
    ],
)
def test_bad_dimensions(body: Any, key: str, rule: str) -> None:
    ((found, problem),) = problems(of({"model.dropout": body})).items()
    assert found == f"space.model.dropout{key}"
    assert re.search(rule, problem.rule), problem.rule


@pytest.mark.parametrize(
    ("change", "key", "text"),
    [
        ({"metrc": "x"}, "metrc", "did you mean 'metric'"),
        ({"training.lr": {"choice": [1]}}, "training.lr", "under `space`"),
        ({"metric": "val_los"}, "metric", "did you mean 'val_loss'"),
        ({"metric": []}, "metric", "name of a metric"),
        ({"metric": ["val_loss", "val_loss"]}, "metric", "twice"),
        ({"mode": "up"}, "mode", "min or max"),
        ({"mode": ["min", "max"]}, "mode", "2 modes for 1 metrics"),
        ({"searcher": "optnua"}, "searcher.name", "did you mean 'optuna'"),
        ({"searcher": {"name": "random", "sed": 1}}, "searcher.sed", "did you mean 'seed'"),
        ({"searcher": {"name": "random", "seed": -1}}, "searcher.seed", "at least 0"),
        ({"searcher": 3}, "searcher", "a name or a mapping"),
        ({"scheduler": "ashes"}, "scheduler.name", "did you mean 'asha'"),
        ({"scheduler": {"name": "asha", "grace_step": 1}}, "scheduler.grace_step", "did you mean 'grace_steps'"),
        ({"scheduler": {"name": "asha", "quantile": 1}}, "scheduler.quantile", "not a key of asha"),
        ({"scheduler": {"name": "asha", "reduction_factor": 1}}, "scheduler.reduction_factor", "greater than 1"),
        ({"scheduler": {"name": "pbt", "quantile": 0.6}}, "scheduler.quantile", "at most 0.5"),
        ({"scheduler": {"name": "fifo", "interval_steps": 0}}, "scheduler.interval_steps", "at least 1"),
        ({"trials": -1}, "trials", "at least 1"),
        ({"trials": True}, "trials", "at least 1"),
        ({"seeds": 0}, "seeds", "at least 1"),
        ({"seeds": []}, "seeds", "whole numbers"),
        ({"seeds": [1, 1]}, "seeds", "holds 1 twice"),
        ({"concurrency": 1.5}, "concurrency", "whole number"),
        ({"max_failed": 1.1}, "max_failed", "from 0 to 1"),
        ({"set": 3}, "set", "must be a mapping"),
        ({"set": {"a..b": 1}}, "set.a..b", "dotted key"),
        ({"set": {"model.depth": 1, "model": {"depth": 2}}}, "set.model.depth", "set twice"),
        ({"set": {"training": {"lr": 1e-3}}}, "space.training.lr", "fixed for every trial"),
        ({"variants": {"a": {}}}, "variants", "one of the two"),
        ({"space": {}}, "space", "is empty"),
        ({"space": [1]}, "space", "must be a mapping"),
    ],
)
def test_bad_settings(change: dict[str, Any], key: str, text: str) -> None:
    assert text in str(problems({**of(LR), **change})[key])


@pytest.mark.parametrize(
    ("when", "key", "text"),
    [
        ({"training.schedul": "wsd"}, "training.schedul", "did you mean 'training.schedule'"),
        ({"training.schedule": ["wsd", "linear"]}, "training.schedule", "never has the value linear"),
        ({"training.lr": 1e-3}, "training.lr", "continuous"),
        ({"model": {"dim": 64}}, "model", "name one of the keys"),
        ({"model.dim": 65}, "model.dim", "never has the value 65"),
        ({"model.depth": 5}, "model.depth", "never has the value 5"),
        ({"model.depth": True}, "model.depth", "never has the value true"),
    ],
)
def test_bad_conditions(when: dict[str, Any], key: str, text: str) -> None:
    dimensions = {
        **LR,
        "training.schedule": {"choice": ["cosine", "wsd"]},
        "model": {"choice": [{"dim": 64}, {"dim": 128}]},
        "model.depth": {"randint": [2, 6], "step": 2},
        "training.decay_fraction": {"choice": [0.1], "when": when},
    }
    ((found, problem),) = problems(of(dimensions)).items()
    assert found == f"space.training.decay_fraction.when.{key}"
    assert text in str(problem)


# Each optimiser with rates and decays of its own.
OPTIMIZERS = {
    "training.lr": [
        {"grid": [1e-3, 2e-3], "when": {"training.optimizer": "adamw"}},
        {"grid": [1e-4, 2e-4, 4e-4], "when": {"training.optimizer": ["lion"]}},
    ],
    "training.optimizer.weight_decay": [
        {"grid": [0.1, 0.3], "when": {"training.optimizer": "adamw"}},
        {"grid": [1.0], "when": {"training.optimizer": "lion"}},
    ],
    "training.optimizer": {"grid": ["adamw", "lion"]},
}


def test_a_key_may_have_other_values_under_another_condition() -> None:
    space = load_space({"space": OPTIMIZERS})
    points = space.grid_points()
    assert (space.searcher, space.size, space.num_points()) == (Searcher("grid"), 7, 7) and len(points) == 7
    found = {(p["training.optimizer"], p["training.lr"], p["training.optimizer.weight_decay"]) for p in points}
    adamw = {("adamw", lr, decay) for lr in (1e-3, 2e-3) for decay in (0.1, 0.3)}
    assert found == adamw | {("lion", lr, 1.0) for lr in (1e-4, 2e-4, 4e-4)}
    assert set(space.keys()) == set(OPTIMIZERS) and space.numeric("training.lr")
    assert Space.from_dict(json.loads(json.dumps(space.to_dict(), sort_keys=True))) == space
    tuned = load_config({"training": {"optimizer": {"name": "adamw", "betas": [0.9, 0.99]}, "warmup_steps": 10}})
    assert check_space(space, tuned) == [], "a named optimiser begins with its defaults, whatever the config had set"


def test_every_value_of_every_entry_is_held_against_the_config() -> None:
    entries: list[dict[str, Any]] = [
        {"grid": [1e-3], "when": {"training.optimizer": "adamw"}},
        {"grid": [1e-3, 2e-3, -1], "when": {"training.optimizer": "lion"}},
    ]
    with pytest.raises(ConfigError, match=r"space\.training\.lr: the config refuses training.lr=-1"):
        check_space(load_space({"space": {**OPTIMIZERS, "training.lr": entries}}), CONFIG)


def test_random_points_of_several_entries_and_learning_searchers_know_the_key() -> None:
    rates = [
        {"loguniform": [1e-3, 1e-2], "when": {"training.optimizer": "adamw"}},
        {"loguniform": [1e-5, 1e-4], "when": {"training.optimizer": "lion"}},
    ]
    space = load_space(of({"training.optimizer": {"choice": ["adamw", "lion"]}, "training.lr": rates}))
    assert space.log_scaled("training.lr") and space.size is None
    seen = set()
    for index in range(40):
        point = space.draw(RandomDraw(0, index))
        assert set(point) == {"training.optimizer", "training.lr"}
        assert (point["training.lr"] < 5e-4) == (point["training.optimizer"] == "lion")
        seen.add(point["training.optimizer"])
    assert seen == {"adamw", "lion"}


@pytest.mark.parametrize(
    ("second", "key", "text"),
    [
        ({"choice": [2]}, "space.training.lr[1]", "may be there together with space.training.lr[0]"),
        ({"choice": [2], "when": {"training.optimizer": ["adamw", "lion"]}}, "space.training.lr[1]", "together"),
        ({"choice": [2], "when": {"training.schedule": "wsd"}}, "space.training.lr[1]", "same key, with other values"),
        ({"choise": [2]}, "space.training.lr[1].choise", "did you mean 'choice'"),
        ({"choice": [2], "when": {"training.optimizer": 3}}, "space.training.lr[1].when.training.optimizer", "value 3"),
    ],
)  # fmt: skip
def test_entries_that_do_not_exclude_each_other_are_refused(second: Any, key: str, text: str) -> None:
    first = {"choice": [1], "when": {"training.optimizer": "adamw"}}
    others = {"training.optimizer": {"choice": ["adamw", "lion"]}, "training.schedule": {"choice": ["wsd", "cosine"]}}
    ((found, problem),) = problems(of({**others, "training.lr": [first, second]})).items()
    assert found == key and text in str(problem)


def test_a_condition_may_read_a_key_that_has_several_entries() -> None:
    dimensions = {
        "model.depth": {"choice": [1, 2]},
        "training.schedule": [
            {"choice": ["wsd"], "when": {"model.depth": 1}},
            {"choice": ["cosine", "wsd"], "when": {"model.depth": 2}},
        ],
        "training.decay_fraction": {"choice": [0.1, 0.2], "when": {"training.schedule": "wsd"}},
    }
    assert load_space(of(dimensions, searcher="grid")).size == len(load_space(of(dimensions)).grid_points()) == 5
    dimensions["training.decay_fraction"]["when"] = {"training.schedule": "linear"}  # type: ignore[call-overload, index]
    ((key, problem),) = problems(of(dimensions)).items()
    assert key == "space.training.decay_fraction.when.training.schedule"
    assert "space.training.schedule[0], space.training.schedule[1] never has the value linear" in str(problem)


def test_an_optimizer_as_a_mapping_is_its_name_and_its_keys() -> None:
    mapping = {"name": "lion", "weight_decay": 1.0}
    flat = {"training.optimizer": "lion", "training.optimizer.weight_decay": 1.0}
    assert load_space({"variants": {"lion": {"training.optimizer": mapping}}}).variants["lion"] == flat
    assert load_space({"variants": {"lion": {"training": {"optimizer": mapping}}}}).variants["lion"] == flat
    space = load_space({"space": {"training.optimizer": {"grid": ["adamw", mapping]}}})
    assert space.grid_points() == [{"training.optimizer": "adamw"}, flat]
    assert load_space(of(LR, set={"training.optimizer": mapping})).fixed == flat
    twice = {"training.optimizer": mapping, "training.optimizer.name": "adamw"}
    assert "set twice" in str(problems({"variants": {"lion": twice}})["variants.lion.training.optimizer.name"])


def test_conditions_in_a_circle() -> None:
    circle = {"a.x": ("a.y", 1), "a.y": ("a.z", 1), "a.z": ("a.x", 1)}
    found = problems(of({key: {"choice": [1], "when": {other: value}} for key, (other, value) in circle.items()}))
    assert "a.x needs a.y needs a.z needs a.x" in found["space.a.x.when"].rule


@pytest.mark.parametrize("label", ["a b", "", ".a", "a/b", "ü", "a.", "-a", "x" * 65, "report", "journal.jsonl", 1])
def test_labels_that_are_no_directory_names(label: Any) -> None:
    assert set(problems({"variants": {label: {}, "ok": {}}})) == {f"variants.{label}"}


def test_labels_twice(tmp_path: Path) -> None:
    assert "upper and lower case" in problems({"variants": {"A": {}, "a": {}}})["variants.a"].rule
    path = write(tmp_path, "variants:\n  a: {}\n  a: {}\n")
    assert "'a' stands twice" in problems(path)[str(path)].rule


def test_all_problems_of_a_file_come_out_together(tmp_path: Path) -> None:
    text = "metrc: x\nspace: {training.lr: {uniform: [2, 1]}, model.dim: {choise: [1]}}\nseeds: 0\ntrials: -1\n"
    path = write(tmp_path, text)
    keys = {"metrc", "space.training.lr", "space.model.dim.choise", "seeds", "trials"}
    assert set(problems(path)) == keys
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: 5 problems\n"):
        load_space(path)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("", "is empty"),
        ("- 1", "must hold a mapping"),
        ("space: {a: [1}", "YAML syntax error in line 1"),
        ("3: 4", "3"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        load_space(write(tmp_path, content))


def test_a_bare_name_is_looked_for_in_tune_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tune_spaces").mkdir()
    write(tmp_path / "tune_spaces", "trials: 3\nspace: {training.lr: {uniform: [0.1, 0.2]}}", "rates.yaml")
    assert load_space("rates") == load_space("rates.yaml") == load_space(Path("tune_spaces") / "rates.yaml")
    assert problems("rats")["rats"].hint == "did you mean 'rates'?"
    assert "is a directory" in problems("tune_spaces")["tune_spaces"].rule
    assert problems(7)["space"].value == 7


def test_the_command_line_replaces_settings() -> None:
    file = load_space(of(LR, scheduler={"name": "asha", "interval_steps": 10}, searcher={"name": "random", "seed": 4}))
    space = load_space(file, {"trials": 9, "seeds": 2, "time_budget": "1m", "searcher": "optuna", "scheduler": "fifo"})
    assert (space.trials, space.seeds, space.time_budget_s) == (9, (0, 1), 60.0)
    assert (space.searcher, space.scheduler) == (Searcher("optuna", 4), Scheduler("fifo", interval_steps=10))
    assert load_space(file, {"scheduler": "asha"}).scheduler == file.scheduler
    assert load_space(file, {"trials": None}) is file
    speed = load_space(of(LR, metric="tokens_per_second", mode="max"), {"metric": "val_loss"})
    assert (speed.metrics, speed.modes) == (("val_loss",), ("min",))
    assert set(problems(file, trails=3, seeds=0)) == {"trails", "seeds"}


def test_the_digest_is_of_the_file_without_what_may_change_in_a_sweep() -> None:
    file = load_space(of(LR))
    assert load_space(file, {"trials": 9, "seeds": 2}).digest == file.digest
    assert load_space(of(LR, trials=7, concurrency=1, time_budget=3, max_failed=1)).digest == file.digest
    others = [of({"training.lr": {"loguniform": [1e-4, 2e-2]}}), of(LR, seeds=2), of(LR, metric="perplexity")]
    assert len({load_space(other).digest for other in others} | {file.digest}) == 4
    grid = {"model.dim": {"grid": [1, 2]}, "model.depth": {"grid": [1, 2]}}
    assert load_space(of(grid)).digest != load_space(of(dict(reversed(grid.items())))).digest


# --- points --------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3))
PAIRS = st.tuples(NUMBERS, NUMBERS).filter(lambda pair: pair[0] < pair[1]).map(list)
ITEMS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=4), NUMBERS, st.lists(st.integers(), max_size=2)
)
VALUES = st.lists(ITEMS, min_size=1, max_size=4).filter(
    lambda values: not any(same(a, b) for index, a in enumerate(values) for b in values[:index])
)


@st.composite
def dimensions(draw: st.DrawFn) -> dict[str, Any]:
    """One dimension of any kind."""
    kind = draw(st.sampled_from(["uniform", "loguniform", "randint", "choice", "grid", "steps", "ints"]))
    if kind in ("choice", "grid"):
        return {kind: draw(VALUES)}
    if kind == "uniform":
        return {kind: draw(PAIRS)}
    if kind == "loguniform":
        low = draw(st.floats(1e-9, 1e3))
        return {kind: [low, low * draw(st.floats(1.001, 1e6))]}
    low, step, count = draw(st.integers(-50, 50)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    if kind == "randint":
        return {kind: [low, low + count]}
    if kind == "ints":
        return {"randint": [low, low + step * count], "step": step}
    return {"uniform": [low / 10, (low + step * count) / 10], "step": step / 10}


@st.composite
def spaces(draw: st.DrawFn) -> dict[str, Any]:
    """A space whose later dimensions may depend on earlier ones, in any order in the file."""
    body: dict[str, Any] = {}
    for index in range(draw(st.integers(1, 5))):
        body[f"k.{index}"] = dimension = draw(dimensions())
        listed = [(key, d.get("choice", d.get("grid"))) for key, d in body.items() if key != f"k.{index}"]
        parents = [(key, values) for key, values in listed if values]
        if parents and draw(st.booleans()):
            key, values = draw(st.sampled_from(parents))
            dimension["when"] = {key: draw(st.lists(st.sampled_from(values), min_size=1, unique_by=json.dumps))}
    return of({key: body[key] for key in draw(st.permutations(list(body)))})


def inside(body: dict[str, Any], value: Any) -> bool:
    for kind in ("choice", "grid"):
        if kind in body:
            return any(same(value, other) for other in body[kind])
    low, high = next(body[kind] for kind in ("uniform", "loguniform", "randint") if kind in body)
    steps = (value - low) / body.get("step", 1)
    whole = isinstance(value, int) if "randint" in body else True
    return low <= value <= high and whole and ("step" not in body or abs(steps - round(steps)) < 1e-9)


@given(spaces(), st.integers(0, 2**31), st.integers(0, 1000))
def test_every_draw_is_inside_and_conditional_keys_are_there_when_they_apply(
    raw: dict[str, Any], seed: int, index: int
) -> None:
    space, body = load_space(raw), raw["space"]
    point = space.draw(RandomDraw(seed, index))
    assert point == space.draw(RandomDraw(seed, index))
    assert set(point) <= set(space.keys()) == set(body)
    for key, dimension in body.items():
        when = dimension.get("when", {})
        active = all(other in point and any(same(point[other], v) for v in values) for other, values in when.items())
        assert active == (key in point)
        assert not active or inside(dimension, point[key])


@given(spaces())
def test_a_space_survives_json(raw: dict[str, Any]) -> None:
    space = load_space(raw)
    for text in (json.dumps(space.to_dict()), json.dumps(space.to_dict(), sort_keys=True)):
        back = Space.from_dict(json.loads(text))
        assert back == space
        assert list(back.dimensions) == list(space.dimensions)
    assert pickle.loads(pickle.dumps(space)) == space


@given(spaces())
def test_the_grid_is_complete(raw: dict[str, Any]) -> None:
    space = load_space(raw)
    if space.size is None:
        with pytest.raises(ValueError, match="continuous"):
            space.grid_points()
    elif space.size <= 5000:
        points = space.grid_points()
        texts = {json.dumps(point, sort_keys=True) for point in points}
        assert len(texts) == len(points) == space.size
        drawn = (space.draw(RandomDraw(0, index)) for index in range(30))
        assert all(json.dumps(point, sort_keys=True) in texts for point in drawn)


def test_grid_order_and_joint_values() -> None:
    body = {"model": {"grid": [{"dim": 64, "heads": 2}, {"dim": 96}]}, "training.lr": {"grid": [0.1, 0.2]}}
    assert load_space({"space": body}).grid_points() == [
        {"model.dim": 64, "model.heads": 2, "training.lr": 0.1},
        {"model.dim": 64, "model.heads": 2, "training.lr": 0.2},
        {"model.dim": 96, "training.lr": 0.1},
        {"model.dim": 96, "training.lr": 0.2},
    ]
    few = load_space({"space": body, "trials": 3})
    assert (few.num_points(), few.size) == (3, 4)
    assert check_space(few, CONFIG) == ["trials (3): this grid has 4 points, only the first of them are run"]


def test_random_draws_are_spread_and_stay_the_same() -> None:
    space = load_space(of({**LR, "model.depth": {"randint": [1, 4]}}))
    points = [space.draw(RandomDraw(0, index)) for index in range(2000)]
    rates = sorted(math.log10(point["training.lr"]) for point in points)
    assert abs(rates[1000] + 3) < 0.08 and rates[20] < -3.97 and rates[-20] > -2.03
    depths = [point["model.depth"] for point in points]
    assert all(abs(depths.count(depth) - 500) < 90 for depth in (1, 2, 3, 4))
    # Written down: a resumed sweep must go on with the same points on any machine and any Python.
    assert points[:2] == [
        {"training.lr": pytest.approx(0.0013105160430980421, rel=1e-12), "model.depth": 3},
        {"training.lr": pytest.approx(0.0001312153870040725, rel=1e-12), "model.depth": 4},
    ]


def test_quantised_values_are_those_that_one_would_write() -> None:
    space = load_space({"searcher": "grid", "space": {"model.dropout": {"uniform": [0, 0.5], "step": 0.1}}})
    assert [point["model.dropout"] for point in space.grid_points()] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]


def test_variants_keep_their_order_and_are_not_drawn() -> None:
    space = load_space({"variants": {"b": {"model": {"depth": 2}}, "a": {}}, "seeds": 3})
    assert space.variants == {"b": {"model.depth": 2}, "a": {}}
    assert space.grid_points() == [{"model.depth": 2}, {}]
    assert list(Space.from_dict(json.loads(json.dumps(space.to_dict(), sort_keys=True))).variants) == ["b", "a"]
    with pytest.raises(ValueError, match="not drawn"):
        space.draw(RandomDraw(0, 0))
