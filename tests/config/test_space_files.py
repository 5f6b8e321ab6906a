"""Spaces as Python functions, and the files in tune_spaces/."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.loader import apply_overrides, load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.space import RandomDraw, Scheduler, Searcher, Space, check_space, load_space
from tests.config.test_space import CONFIG, by_key, write

PROGRAM = """
SPACE = {"trials": 5, "seeds": 2, "set": {"model.depth": 2}}

def space(draw):
    point = {"training.lr": draw.loguniform("training.lr", 1e-4, 1e-2)}
    schedule = point["training.schedule"] = draw.choice("training.schedule", ["cosine", "wsd"])
    if schedule == "wsd":
        point["training.decay_fraction"] = draw.uniform("training.decay_fraction", 0.25, 0.5, step=0.25)
    point["model"] = draw.choice("model", [{"dim": 64}, {"dim": 32, "heads": 2}])
    point["training.warmup_steps"] = round(1 / point["training.lr"] ** 0.5)
    return point
"""


# --- Python --------------------------------------------------------------------------------------------------------


def test_a_python_space(tmp_path: Path) -> None:
    space = load_space(write(tmp_path, PROGRAM, "mine.py"))
    assert (space.name, space.trials, space.num_points(), space.size) == ("mine", 5, 5, None)
    assert (space.searcher, space.seed_values(3)) == (Searcher("random"), (3, 4))
    assert check_space(space, CONFIG) == []
    assert set(space.keys()) == {
        "training.lr", "training.schedule", "training.decay_fraction", "model.dim", "model.heads",
        "training.warmup_steps",
    }  # fmt: skip
    assert space.log_scaled("training.lr") and not space.numeric("training.schedule")
    for index in range(50):
        point = space.draw(RandomDraw(1, index))
        assert point == space.draw(RandomDraw(1, index))
        assert ("training.decay_fraction" in point) == (point["training.schedule"] == "wsd")
        assert ("model.heads" in point) == (point["model.dim"] == 32)
    with pytest.raises(ValueError, match="no grid"):
        space.grid_points()


def test_a_python_space_comes_back_from_json_as_long_as_its_file_is_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, PROGRAM, "mine.py")
    space = load_space(path, {"trials": 7})
    back = Space.from_dict(json.loads(json.dumps(space.to_dict())))
    assert back == space == pickle.loads(pickle.dumps(space))
    assert back.draw(RandomDraw(0, 3)) == space.draw(RandomDraw(0, 3))
    path.write_text(PROGRAM + "\n# changed\n", encoding="utf-8")
    assert load_space(path).digest != space.digest
    moved = json.loads(json.dumps(space.to_dict()).replace("mine.py", "gone.py"))
    gone = Space.from_dict(moved)  # a report needs the keys, not the file
    assert gone.keys() == space.keys() and gone.num_points() == 7
    with pytest.raises(ConfigError, match=r"gone\.py: the space's file cannot be read"):
        gone.draw(RandomDraw(0, 0))


def test_a_python_space_that_was_changed_draws_no_more(tmp_path: Path) -> None:
    path = write(tmp_path, PROGRAM, "mine.py")
    stored = load_space(path).to_dict()
    path.write_text(PROGRAM.replace("1e-2", "2e-2"), encoding="utf-8")
    from glowflow.config.spaces.program import _load

    _load.cache_clear()  # as in another process
    with pytest.raises(ConfigError, match="changed since the sweep was started"):
        Space.from_dict(stored).draw(RandomDraw(0, 0))


@pytest.mark.parametrize(
    ("text", "line", "rule"),
    [
        ("def space(draw)\n    return {}\n", 1, "is not Python: SyntaxError: expected ':'"),
        ("import os\nX = 1 / 0\n", 2, "raised ZeroDivisionError: division by zero"),
        ("import no_such_module_at_all\n", 1, "raised ModuleNotFoundError: No module named"),
        ("import sys\nsys.exit(3)\n", 2, "raised SystemExit: 3"),
        ("def space(draw):\n    x = {}\n    return x['k']\n", 3, "space() raised KeyError: 'k'"),
        ("def space(draw):\n    return draw.normal('a.b')\n", 2, "no attribute 'normal'"),
        ("def space(draw):\n    return help(draw)\ndef help(draw):\n    return draw.choice('a.b', [])\n", 4,
         "draw.choice('a.b'): needs at least one value"),
        ("def space(draw):\n    return draw.uniform('a.b', 2, 1)\n", 2, "low (2) must be less than high (1)"),
        ("def space(draw):\n    return draw.loguniform('a.b', 0, 1)\n", 2, "greater than 0 on a logarithmic scale"),
        ("def space(draw):\n    return draw.randint('a.b', 0, 1.5)\n", 2, "high must be a whole number"),
        ("def space(draw):\n    return draw.uniform('', 0, 1)\n", 2, "dotted key"),
        ("def space(draw):\n    draw.randint('a', 1, 2)\n    draw.randint('a', 1, 2)\n", 3, "drawn the key already"),
    ],
)  # fmt: skip
def test_whatever_a_python_space_raises_is_one_sentence_with_its_line(
    tmp_path: Path, text: str, line: int, rule: str
) -> None:
    path = write(tmp_path, text, "bad.py")
    with pytest.raises(ConfigError) as error:
        load_space(path)
    (problem,) = error.value.problems
    assert problem.key == f"{path}:{line}"
    assert rule in problem.rule
    assert error.value.__cause__ is None and error.value.__suppress_context__


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("SPACE = {'space': {}, 'variants': {}}\n", {"space", "SPACE.space", "SPACE.variants"}),
        ("SPACE = 3\ndef space(draw): return {}\n", {"SPACE"}),
        ("SPACE = {'trails': 3, 'seeds': 0}\ndef space(draw): return {}\n", {"trails", "seeds"}),
        ("def space(draw): return 3\n", {"space(draw)"}),
        ("def space(draw): return {3: 4}\n", {"space(draw)"}),
        ("def space(draw): return {'model.depth': object()}\n", {"space(draw)"}),
        ("def space(draw): return {'model': {'depth': 1}, 'model.depth': 2}\n", {"model.depth"}),
        ("def space(draw):\n    draw.randint('model.depth', 1, 2)\n    return {}\n", {"model.depth"}),
        ("def space(draw): return {'model.depth': 1 + draw.randint('model.depth', 1, 2)}\n", {"model.depth"}),
    ],
)
def test_python_spaces_that_are_none(tmp_path: Path, text: str, keys: set[str]) -> None:
    path = write(tmp_path, text, "bad.py")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: ") as error:
        load_space(path)
    assert set(by_key(error.value)) == keys


def check(tmp_path: Path, text: str) -> dict[str, Problem]:
    space = load_space(write(tmp_path, text, "bad.py"))
    with pytest.raises(ConfigError) as error:
        check_space(space, CONFIG)
    return by_key(error.value)


def test_what_a_config_refuses_of_a_python_space(tmp_path: Path) -> None:
    # At the lower end of the rates only: random points would hardly show it.
    rare = 'if point["training.warmup_steps"] == 100: point["model.dept"] = 1\n    return point'
    text = PROGRAM.replace("return point", rare).replace("0.25, 0.5, step", "0, 0.5, step")
    found = check(tmp_path, text.replace("SPACE = {", "SPACE = {'searcher': 'grid', "))
    assert found["space.model.dept"].hint == "did you mean 'model.depth'?"
    assert "training.decay_fraction=0.0: must be greater than 0" in found["space.training.decay_fraction"].rule
    assert "no grid" in found["searcher"].rule
    assert set(found) == {"space.model.dept", "space.training.decay_fraction", "searcher"}


def test_a_python_space_must_be_a_function_of_its_draws(tmp_path: Path) -> None:
    text = "import random\nSPACE = {'trials': 2}\ndef space(draw): return {'training.lr': random.random()}\n"
    assert "not give the same point" in check(tmp_path, text)["space(draw)"].rule
    assert "sets no key" in check(tmp_path, "SPACE = {'trials': 2}\ndef space(draw): return {}\n")["space"].rule


def test_optuna_takes_one_list_for_a_key(tmp_path: Path) -> None:
    text = (
        "def space(draw):\n    d = draw.choice('model.dim', [64, 32])\n    h = draw.choice('model.heads', [d // 16])\n"
    )
    text += "    return {'model.dim': d, 'model.heads': h}\nSPACE = {'trials': 2, 'searcher': 'optuna'}\n"
    assert "different lists, [4] and [2]" in check(tmp_path, text)["space.model.heads"].rule
    assert check_space(load_space(tmp_path / "bad.py", {"searcher": "random"}), CONFIG) == []


# --- the files that are shipped ------------------------------------------------------------------------------------


def shipped(repository: Path) -> list[Path]:
    return sorted(path for path in (repository / "tune_spaces").iterdir() if path.is_file())


def config_of(path: Path, repository: Path) -> GlowFlowConfig:
    """The config that the file's own command names."""
    (name,) = re.findall(r"^# glowflow sweep (configs/\w+\.yaml) ", path.read_text(encoding="utf-8"), re.MULTILINE)
    return load_config(repository / name)


def test_every_shipped_space_fits_its_config(repository: Path) -> None:
    names = set()
    for path in shipped(repository):
        space, config = load_space(path), config_of(path, repository)
        assert check_space(space, config) == [], path
        assert space.num_points() is not None
        assert Space.from_dict(json.loads(json.dumps(space.to_dict()))) == space
        names.add(space.name)
    assert names >= {"lr", "lr_wd", "schedule", "shape", "batch", "variants", "shape_search", "optimizer"}


def test_every_shipped_space_opens_with_its_question_and_its_command(repository: Path) -> None:
    for path in shipped(repository):
        text = path.read_text(encoding="utf-8")
        comments = text[: re.search(r"^(?!#)", text, re.MULTILINE).start()].splitlines()  # type: ignore[union-attr]
        assert 1 <= len(comments) <= 3, path
        assert "?" in comments[0]
        assert any(re.match(rf"# glowflow sweep \S+ tune_spaces/{re.escape(path.name)}\b", line) for line in comments)


def parameters(config: GlowFlowConfig, point: dict[str, Any]) -> int:
    from glowflow.core.model import build_module

    vocabulary = int(config.data.tokenizer.partition(":")[2])
    return build_module(apply_overrides(config, {**point, "model.vocab_size": vocabulary}), "meta").num_parameters()


def test_the_shapes_have_the_quickstarts_parameters(repository: Path) -> None:
    config = load_config(repository / "configs" / "quickstart.yaml")
    own = parameters(config, {})
    listed = load_space(repository / "tune_spaces" / "shape.yaml").grid_points()
    search = load_space(repository / "tune_spaces" / "shape_search.py")
    found = [search.draw(RandomDraw(0, index)) for index in range(40)]
    assert {"model.dim": 160, "model.depth": 4, "model.heads": 5, "model.ffn_dim": 432} in listed
    for point in [*listed, *found]:
        assert parameters(config, point) == pytest.approx(own, rel=0.01), point
        assert point["model.dim"] == 32 * point["model.heads"]
        assert 1.5 <= point["model.ffn_dim"] / point["model.dim"] <= 4.5
    assert {("model.kv_heads" in point) for point in found} == {True, False}


def test_batches_see_equal_tokens_and_the_same_validation(repository: Path) -> None:
    config = load_config(repository / "configs" / "quickstart.yaml")
    trainings = [
        apply_overrides(config, point).training
        for point in load_space(repository / "tune_spaces" / "batch.yaml").grid_points()
    ]
    assert len({training.batch_size for training in trainings}) == 3
    assert {training.batch_size * training.max_steps for training in trainings} == {16 * 200}
    assert {training.batch_size * (training.val_batches or 0) for training in trainings} == {160}
    assert {training.max_steps // training.warmup_steps for training in trainings} == {10}


def test_the_optimizers_get_eight_points_each(repository: Path) -> None:
    space = load_space(repository / "tune_spaces" / "optimizer.yaml")
    config = load_config(repository / "configs" / "shakespeare_char.yaml")
    points = space.grid_points()
    assert (space.size, space.num_points(), len(points)) == (48, 48, 48)
    assert len({json.dumps(point, sort_keys=True) for point in points}) == 48
    configs = [apply_overrides(config, {**space.fixed, **point}) for point in points]
    found: dict[str, set[tuple[float, float]]] = {}
    for one in configs:
        training = one.training
        found.setdefault(training.optimizer.name, set()).add((training.lr, training.optimizer.weight_decay))
        assert (training.schedule, training.min_lr, one.data.dataset) == ("linear", 0.0, "tinyshakespeare-tune")
        assert (training.max_steps, training.batch_size) == (500, config.training.batch_size)
    assert set(found) == {"adamw", "lion", "adan", "sophia-g", "sophia-h", "muon"}
    for pairs in found.values():
        rates, decays = {lr for lr, _ in pairs}, {decay for _, decay in pairs}
        assert pairs == {(lr, decay) for lr in rates for decay in decays} and (len(rates), len(decays)) == (4, 2)
    # Of a named optimiser nothing is left that the config had set for AdamW.
    own = {one.training.optimizer.name: one.training.optimizer for one in configs}
    for name in ("lion", "adan", "sophia-g", "sophia-h"):
        defaults = load_config({"training": {"optimizer": name}}).training.optimizer
        assert own[name] == defaults.model_copy(update={"weight_decay": own[name].weight_decay})


def test_the_shipped_numbers_that_the_documents_quote(repository: Path) -> None:
    rates = load_space(repository / "tune_spaces" / "lr.yaml")
    assert rates.scheduler == Scheduler("asha", grace_steps=25, reduction_factor=4, interval_steps=25)
    assert (rates.trials, rates.metrics, rates.fixed) == (8, ("val_loss",), {"resources.workers": 1})
    table = load_space(repository / "tune_spaces" / "variants.yaml")
    assert table.fixed["training.max_steps"] == 500 and table.seed_values(0) == (0, 1, 2)
    assert table.variants["baseline"] == table.variants["same"] == {}
