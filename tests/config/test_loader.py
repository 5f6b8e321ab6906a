"""Loading, overriding, and reporting every problem at once."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.fields import known_keys
from glowflow.config.loader import apply_overrides, config_fingerprint, load_config, to_dict, to_yaml, warnings
from glowflow.config.optimizers import AdamWConfig
from glowflow.config.registry import ARCHITECTURES, OPTIMIZERS
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.yaml12 import parse_yaml


def problems(source: Any, *overrides: str) -> dict[str, Problem]:
    """The problems of a bad config by key; fails when two have the same key."""
    with pytest.raises(ConfigError) as error:
        load_config(source, overrides)
    found = {problem.key: problem for problem in error.value.problems}
    assert len(found) == len(error.value.problems)
    return found


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- order of precedence, overrides -------------------------------------------------------------------------------


def test_defaults_then_yaml_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {lr: 3e-4, max_steps: 7}\nmodel:\n")
    config = load_config(path, ["training.max_steps=9"])
    assert config.training.lr == 3e-4
    assert config.training.max_steps == 9
    assert config.training.batch_size == GlowFlowConfig().training.batch_size
    assert config.model.arch == "transformer"


def test_nothing_at_all_gives_the_defaults() -> None:
    assert load_config(None) == GlowFlowConfig() == load_config({})


def test_the_source_is_not_changed() -> None:
    source: dict[str, Any] = {"training": {"optimizer": "adamw"}}
    load_config(source, ["training.optimizer.eps=1e-6", "model.depth=2"])
    assert source == {"training": {"optimizer": "adamw"}}


@pytest.mark.parametrize(
    "given_optimizer",
    ["adamw", {"name": "adamw"}, {"weight_decay": 0.0}, None],
    ids=["name", "mapping", "keys", "none"],
)
def test_optimizer_keys_can_be_overridden(given_optimizer: Any) -> None:
    source = {} if given_optimizer is None else {"training": {"optimizer": given_optimizer}}
    optimizer = load_config(source, ["training.optimizer.betas=[0.9,0.99]"]).training.optimizer
    assert isinstance(optimizer, AdamWConfig)
    assert optimizer.betas == (0.9, 0.99)
    assert optimizer.weight_decay == (0.0 if given_optimizer == {"weight_decay": 0.0} else 0.1)


# What a section that sets AdamW's own keys says, and what another optimiser may keep of it: the weight decay.
TUNED = {"training": {"optimizer": {"name": "adamw", "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.3}}}


@pytest.mark.parametrize("source", [TUNED, apply_overrides(load_config(TUNED), ["training.lr=1e-2"])])
@pytest.mark.parametrize(
    "overrides",
    [
        ["training.optimizer.name=lion"],
        ["training.optimizer.name=lion", "training.optimizer.weight_decay=1"],
        {"training.optimizer.name": "lion"},
    ],
)
def test_another_optimizer_by_name_does_not_inherit_what_was_set_for_the_one_before(
    source: Any, overrides: Any
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(source, overrides)
    (problem,) = error.value.problems
    assert (problem.key, problem.value) == ("training.optimizer.name", "lion")
    assert "set for adamw: betas ([0.9, 0.99]) and eps (1e-06)" in problem.rule
    # eps is no key of Lion: setting it too would not help.
    assert "training.optimizer=lion" in problem.hint and "training.optimizer.betas" not in problem.hint


def test_a_key_that_the_new_optimizer_knows_may_be_set_with_its_name() -> None:
    source = {"training": {"optimizer": {"betas": [0.9, 0.99]}}}
    found = problems(source, "training.optimizer.name=lion", "training.lr=-1")
    assert found["training.optimizer.name"].hint.endswith("or set training.optimizer.betas too")
    assert set(found) == {"training.optimizer.name", "training.lr"}, "with everything else that is wrong"
    both = ["training.optimizer.name=lion", "training.optimizer.betas=[0.95,0.98]"]
    for overrides in (both, both[::-1]):
        optimizer = load_config(source, overrides).training.optimizer
        assert (optimizer.name, optimizer.model_dump()["betas"]) == ("lion", (0.95, 0.98))


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.optimizer=lion"],
        ["training.optimizer={name: lion}"],
        ["training={optimizer: lion}"],
        {"training.optimizer": "lion"},
        {"training.optimizer": {"name": "lion"}},
    ],
)
def test_another_optimizer_as_a_whole_begins_with_its_defaults(overrides: Any) -> None:
    lion = load_config({"training": {"optimizer": "lion"}}).training.optimizer
    assert load_config(TUNED, overrides).training.optimizer == lion


def test_what_every_optimizer_has_stays_under_another_name() -> None:
    source = {"training": {"optimizer": {"weight_decay": 0.3}}}
    for base in (source, load_config(source)):
        optimizer = load_config(base, ["training.optimizer.name=lion"]).training.optimizer
        assert (optimizer.name, optimizer.weight_decay) == ("lion", 0.3)
    same = load_config(TUNED, ["training.optimizer.name=adamw"]).training.optimizer
    assert isinstance(same, AdamWConfig) and same.betas == (0.9, 0.99)


def test_an_unknown_name_is_the_only_problem_of_its_section() -> None:
    assert set(problems(TUNED, "training.optimizer.name=lyon")) == {"training.optimizer.name"}
    assert set(problems(TUNED, "training=7")) == {"training"}


@pytest.mark.parametrize("turn", [1, -1])
def test_in_a_mapping_a_section_comes_before_its_keys(turn: int) -> None:
    pairs = [("training.optimizer", "lion"), ("training.optimizer.weight_decay", 1.0)][::turn]
    optimizer = load_config(TUNED, dict(pairs)).training.optimizer
    assert (optimizer.name, optimizer.weight_decay) == ("lion", 1.0)


def test_override_values_are_yaml() -> None:
    config = load_config(
        None,
        [
            "training.lr=3e-4",
            "training.grad_clip=null",
            "training.compile=true",
            "tracking.tags={a: x, b: '1'}",
            "tracking.uri=http://localhost:5000/a=b",
            "data.sources=[{dataset: a, weight: 2}, {dataset: b}]",
        ],
    )
    assert config.training.lr == 3e-4
    assert config.training.grad_clip is None
    assert config.training.compile is True
    assert config.tracking.tags == {"a": "x", "b": "1"}
    assert config.tracking.uri == "http://localhost:5000/a=b"
    assert [(source.dataset, source.weight) for source in config.data.sources] == [("a", 2.0), ("b", 1.0)]


def test_a_section_as_override_keeps_its_other_keys() -> None:
    config = apply_overrides(load_config({"training": {"lr": 0.5}}), {"training": {"max_steps": 3}})
    assert (config.training.lr, config.training.max_steps) == (0.5, 3)


def test_overrides_as_mapping_hold_plain_values() -> None:
    config = apply_overrides(GlowFlowConfig(), {"training.max_steps": 5, "tracking.run": "3e-4"})
    assert (config.training.max_steps, config.tracking.run) == (5, "3e-4")


def test_malformed_overrides_are_reported_with_everything_else() -> None:
    found = problems({"model": {"depth": 0}}, "lr", "=3", "a..b=1", "training.lr=[1", "data.context.x=2")
    assert {"lr", "=3", "a..b=1", "training.lr", "data.context", "model.depth"} <= set(found)
    assert "section.key=value" in found["lr"].rule
    assert "YAML syntax error" in found["training.lr"].rule


def test_an_override_through_a_given_scalar_is_refused() -> None:
    found = problems({"data": {"context": 64}}, "data.context.x=2")
    assert "data.context is not a section" in found["data.context.x"].rule


# --- unknown keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("model.dept=4", "model.depth"),
        ("trainng.lr=1", "training.lr"),
        ("training.learning_rate=1", "training.lr"),
        ("n_layer=4", "model.depth"),
        ("training.quantum=1", None),
        ("training.optimizer.rho=1", None),
        ("lr=1", "training.lr"),
        ("model.lr=1", "training.lr"),
        ("checkpoint_interval=5", "training.checkpoint_interval"),
        ("training.optimizer.bettas=[0.9,0.9]", "training.optimizer.betas"),
        ("model.attention.backends=sdpa", "model.attention.backend"),
        ("data.sources=[{dataset: a}, {dataset: b, wight: 2}]", "data.sources.1.weight"),
        ("modle={depth: 3, dim: 8}", "model"),
    ],
)
def test_did_you_mean(override: str, meant: str | None) -> None:
    (problem,) = problems(None, override).values()
    assert "not a known key" in problem.rule
    if meant is None:
        assert problem.hint.startswith("known here: ")
    else:
        assert problem.hint == f"did you mean {meant!r}?"


def test_not_strict_drops_unknown_keys_but_no_other_problem(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config({"model": {"from_the_future": 1, "depth": 3}}, strict=False)
    assert config.model.model_dump()["depth"] == 3
    assert "model.from_the_future" in caplog.text
    with pytest.raises(ConfigError, match=r"model\.depth"):
        load_config({"model": {"from_the_future": 1, "depth": 0}}, strict=False)


@given(st.sampled_from(known_keys()), st.data())
def test_a_slip_of_one_letter_is_understood(key: str, data: st.DataObject) -> None:
    leaf = key.rpartition(".")[2]
    if len(leaf) < 5 or "[]" in key or "." not in key:
        return
    position = data.draw(st.integers(0, len(leaf) - 1))
    slip = key[: len(key) - len(leaf)] + leaf[:position] + leaf[position + 1 :]
    if slip in known_keys():
        return
    # Beside the keys of the default architecture and optimiser there are those of others.
    chosen = [{"model": {"arch": name}, "training": {"optimizer": "adamw"}} for name in ARCHITECTURES.names()]
    chosen += [{"model": {"arch": "transformer"}, "training": {"optimizer": name}} for name in OPTIMIZERS.names()]
    source = next(config for config in chosen if key in known_keys(config))
    found = problems(source, f"{slip}=1")
    assert found.pop(slip).hint == f"did you mean {key!r}?"
    # A section that was not there has begun now, and wants the keys without a default.
    assert all(problem.rule == "is required" for problem in found.values())


# --- wrong values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("model.depth=four", "must be a whole number"),
        ("model.depth=true", "must not be true or false"),
        ("model.depth=2.5", "must be a whole number"),
        ("model.depth=0", "must be at least 1"),
        ("model.dropout=1", "must be less than 1"),
        ("training.lr=0", "must be greater than 0"),
        ("training.lr=.inf", "must be a finite number"),
        ("training.lr=null", "must be a number, not null"),
        ("training.compile=maybe", "must be true or false"),
        ("training.schedule=cosin", "'cosine'"),
        ("training.optimizer=7", "must be a registered name"),
        ("training.optimizer.betas=[0.9]", "at least 2 entries"),
        ("training.optimizer.betas=[0.9,0.9,0.9]", "at most 2 entries"),
        ("training.optimizer.betas=[0.9,1.0]", "less than 1"),
        ("training.monitor_metrics=loss", "must be a list"),
        ("tracking.run=2026", "must be text"),
        ("tracking.tags.a=1", "must be text"),
        ("resources.cpus_per_worker=abc", "must be a number, or 'auto'"),
        ("resources.cpus_per_worker=0", "greater than 0"),
        ("data.tokenizer=wrods", "did you mean 'words'"),
        ("data.tokenizer=bpe:12", "at least 257"),
        ("model=3", "mapping"),
        ("training=[1]", "must be a mapping"),
    ],
)
def test_wrong_value_names_key_rule_and_value(override: str, rule: str) -> None:
    key, _, value = override.partition("=")
    ((found, problem),) = problems(None, override).items()
    assert found == key
    assert rule in problem.rule
    assert problem.value == parse_yaml(value, key)


def test_three_errors_in_one_file_come_out_together(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {dept: 3}\ntraining: {lr: fast, optimizer: {name: adamw, betas: 1}}\n")
    found = problems(path)
    assert set(found) == {"model.dept", "training.lr", "training.optimizer.betas"}
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: 3 problems")


def test_cross_field_rules_are_checked_beside_other_errors() -> None:
    found = problems(
        {
            "model": {"dim": 258, "heads": 7, "kv_heads": 3, "dept": 2},
            "training": {"lr": "abc", "batch_size": 33, "strategy": "single"},
            "resources": {"workers": 2},
            "data": {"context": 1},
        }
    )
    assert set(found) == {
        "model.dept",
        "model.heads",
        "model.kv_heads",
        "training.lr",
        "training.batch_size",
        "training.strategy",
        "data.context",
    }
    assert "258 % 7 = 6" in found["model.heads"].rule


def test_a_rule_on_a_wrong_key_is_not_repeated() -> None:
    assert set(problems({"model": {"dim": "wide", "heads": 7}})) == {"model.dim"}
    assert set(problems({"training": {"batch_size": "x"}, "resources": {"workers": 3}})) == {"training.batch_size"}
    assert set(problems({"training": {"lr": "x", "min_lr": 5}})) == {"training.lr"}


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ({"model": {"dim": 30, "heads": 4}}, "model.heads"),
        ({"model": {"dim": 12, "heads": 4}}, "model.heads"),  # heads of width 3 cannot be rotated
        ({"model": {"dim": 64, "heads": 4, "kv_heads": 3}}, "model.kv_heads"),
        ({"training": {"batch_size": 9}, "resources": {"workers": 2}}, "training.batch_size"),
        (
            {"training": {"batch_size": 8, "micro_batch_size": 3}, "resources": {"workers": 2}},
            "training.micro_batch_size",
        ),
        ({"training": {"lr": 1e-4, "min_lr": 1e-3}}, "training.min_lr"),
        ({"training": {"strategy": "single"}, "resources": {"workers": 2}}, "training.strategy"),
    ],
)
def test_cross_field_rules(source: dict[str, Any], key: str) -> None:
    assert set(problems(source)) == {key}


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_accumulation_covers_the_global_batch(workers: int, accumulation: int, micro: int) -> None:
    source = {
        "training": {"batch_size": workers * accumulation * micro, "micro_batch_size": micro},
        "resources": {"workers": workers},
    }
    config = load_config(source)
    assert config.grad_accum_steps == accumulation
    assert config.grad_accum_steps * config.micro_batch_size * workers == config.training.batch_size


def test_intervals_default_to_a_tenth_of_the_run() -> None:
    assert load_config({"training": {"max_steps": 200}}).interval("val_interval") == 20
    assert load_config({"training": {"max_steps": 3}}).interval("checkpoint_interval") == 1
    assert load_config({"training": {"max_steps": 3, "val_interval": 2}}).interval("val_interval") == 2


# --- selected sections ---------------------------------------------------------------------------------------------


def test_unregistered_names_are_listed_in_one_error() -> None:
    found = problems({"model": {"arch": "transformer-xxl"}, "training": {"optimizer": "lyon"}})
    assert set(found) == {"model.arch", "training.optimizer"}
    assert (
        found["model.arch"].value == "transformer-xxl"
        and "registered: multimodal, transformer" in found["model.arch"].rule
    )
    assert (
        found["training.optimizer"].value == "lyon"
        and "registered: adamw, adan, lion" in found["training.optimizer"].rule
    )


def test_keys_of_an_unknown_architecture_are_not_judged() -> None:
    assert set(problems({"model": {"arch": "mamba", "d_state": 16}})) == {"model.arch"}
    found = problems({"training": {"optimizer": {"name": "lyon", "rho": 1}, "lr": -1}})
    assert set(found) == {"training.optimizer.name", "training.lr"}


def test_custom_architecture_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "my_custom_arch.py").write_text(
        "from glowflow.config.architectures import ArchitectureConfig\n"
        "class Config(ArchitectureConfig):\n    width: int = 3\n"
        "class Net:\n    config_class = Config\n"
        "class Bare: pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    config = load_config({"model": {"arch": "my_custom_arch:Net", "width": 5}})
    assert config.model.model_dump() == {"arch": "my_custom_arch:Net", "vocab_size": None, "width": 5}
    assert "my_custom_arch:Net" in caplog.text
    assert load_config(to_dict(config)) == config
    (problem,) = problems({"model": {"arch": "my_custom_arch:Net", "widht": 5}}).values()
    assert problem.hint == "did you mean 'model.width'?"
    assert "config_class" in problems({"model": {"arch": "my_custom_arch:Bare"}})["model.arch"].rule


@pytest.mark.parametrize(
    "arch", ["os:system", "no_such_module_at_all:Net", "os:no_such_name", "antigravity_:", 5, None]
)
def test_unusable_architectures_are_a_config_error(arch: Any) -> None:
    assert set(problems({"model": {"arch": arch}})) == {"model.arch"}


# --- files ---------------------------------------------------------------------------------------------------------


def test_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "model: {}")
    missing = tmp_path / "experimnt.yaml"
    (problem,) = problems(missing).values()
    assert problem.key == str(missing) and "does not exist" in problem.rule and "experiment.yaml" in problem.hint


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- 1\n- 2\n", "mapping of sections"),
        (b"just text", "mapping of sections"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"model: {depth: 3", "YAML syntax error in line 1"),
        (b"model: {3: 4}", "keys must be text"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, rule: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rule):
        load_config(path)


def test_a_directory_is_not_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: {depth: 3}\n")
    assert load_config(path).model.model_dump()["depth"] == 3


# --- the way back --------------------------------------------------------------------------------------------------


def test_dict_and_yaml_are_read_back_equal() -> None:
    config = load_config(
        {"training": {"lr": 3e-5, "optimizer": {"betas": [0.8, 0.9]}}, "tracking": {"tags": {"a": "1e3", "b": "no"}}}
    )
    assert load_config(to_dict(config)) == config
    assert load_config(parse_yaml(to_yaml(config), "x")) == config
    assert to_dict(config)["training"]["optimizer"]["betas"] == [0.8, 0.9]
    assert to_dict(config)["model"]["depth"] == 4  # the architecture's own keys are there too


def test_fingerprint_is_of_what_decides_the_numbers() -> None:
    config = load_config(None)
    same = ["resources.workers=2", "tracking.run=x", "data.cache_dir=/elsewhere", "training.log_interval=1"]
    assert config_fingerprint(apply_overrides(config, same)) == config_fingerprint(config)
    fingerprints = {
        config_fingerprint(apply_overrides(config, [override]))
        for override in ["model.depth=5", "data.context=64", "training.seed=1", "training.optimizer.eps=1e-6"]
    }
    assert len(fingerprints | {config_fingerprint(config)}) == 5


def test_warmup_not_shorter_than_the_run_is_a_warning() -> None:
    assert warnings(load_config(None)) == []
    (warning,) = warnings(load_config({"training": {"warmup_steps": 50, "max_steps": 50}}))
    assert "training.warmup_steps (50)" in warning and "training.max_steps (50)" in warning


def test_other_warnings_name_their_keys() -> None:
    (warning,) = warnings(load_config({"training": {"schedule": "wsd", "warmup_steps": 90, "max_steps": 100}}))
    assert "training.decay_fraction" in warning
    (warning,) = warnings(load_config({"training": {"val_interval": 2000}}))
    assert "training.val_interval (2000)" in warning


def test_config_errors_cross_process_borders() -> None:
    with pytest.raises(ConfigError) as error:
        load_config({"model": {"dept": 1}, "training": {"lr": 0}})
    copy = pickle.loads(pickle.dumps(error.value))
    assert type(copy) is ConfigError and str(copy) == str(error.value) and copy.problems == error.value.problems
