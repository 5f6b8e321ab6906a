"""The generated reference and JSON Schema are up to date and true; every shipped config is valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from glowflow.config.fields import known_keys, walk
from glowflow.config.json_schema import json_schema, write_json_schema
from glowflow.config.loader import load_config, to_dict, warnings
from glowflow.config.reference import reference_page, write_reference
from glowflow.config.registry import ARCHITECTURES, OPTIMIZERS
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.yaml12 import parse_yaml

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def is_valid(data: dict[str, Any]) -> bool:
    return jsonschema.Draft202012Validator(json_schema(builtin_only=True)).is_valid(data)


def test_reference_is_not_stale(repository: Path, tmp_path: Path) -> None:
    write_reference(tmp_path / "config.md", builtin_only=True)
    fresh = (tmp_path / "config.md").read_text(encoding="utf-8")
    assert fresh == (repository / "docs" / "config.md").read_text(encoding="utf-8"), "run `make docs`"


def test_json_schema_is_not_stale(repository: Path, tmp_path: Path) -> None:
    write_json_schema(tmp_path / "schema.json", builtin_only=True)
    fresh = json.loads((tmp_path / "schema.json").read_text(encoding="utf-8"))
    stored = json.loads((repository / "docs" / "config.schema.json").read_text(encoding="utf-8"))
    assert fresh == stored, "run `make docs`"


def test_every_key_is_described_on_the_page() -> None:
    page = reference_page()
    for key in known_keys():
        assert f"`{key}`" in page
    schemas = [GlowFlowConfig, *(e.schema() for registry in (ARCHITECTURES, OPTIMIZERS) for e in registry.entries())]
    assert [key.name for schema in schemas for key in walk(schema) if not key.description] == []


def test_json_schema_is_itself_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_json_schema_takes_every_resolved_default() -> None:
    assert is_valid(to_dict(GlowFlowConfig()))


@pytest.mark.parametrize(
    "data",
    [
        {"modle": {}},
        {"model": {"dept": 3}},
        {"model": {"arch": "mamba"}},
        {"model": {"arch": "transformer-xl", "position": "rope"}},
        {"model": {"depth": "four"}},
        {"training": {"optimizer": "lyon"}},
        {"training": {"optimizer": {"name": "adamw", "rho": 1}}},
        {"training": {"schedule": "cosin"}},
        {"data": {"context": 1}},
    ],
)
def test_json_schema_refuses_what_the_loader_refuses(data: dict[str, Any]) -> None:
    assert not is_valid(data)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"model": {"arch": "mine:Net", "any": 1}},
        {"training": {"optimizer": "adamw"}},
        {"training": {"grad_clip": None}},
    ],
)
def test_json_schema_takes_what_the_loader_takes(data: dict[str, Any]) -> None:
    assert is_valid(data)


def test_base_yaml_is_as_in_the_first_description(repository: Path) -> None:
    assert parse_yaml((repository / "configs" / "base.yaml").read_text(), "base") == {
        "model": {"arch": "transformer-xl", "dim": 1024, "depth": 24, "heads": 16},
        "training": {"batch_size": 128, "optimizer": "lion", "lr": 3e-4, "warmup_steps": 10000},
    }


def test_the_shipped_configs_are_there() -> None:
    names = {path.stem for path in CONFIGS}
    texts = {"base", "quickstart", "shakespeare_char", "shakespeare_muon", "wikitext2"}
    assert texts | {"lm_124m", "lm_350m", "lm_1b3", "lm_3b8"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_loads_without_a_warning(path: Path) -> None:
    # The first description's Python sets how long base.yaml trains; by itself it never leaves its warm-up.
    config = load_config(path, ["training.max_steps=100000"] if path.stem == "base" else [])
    assert warnings(config) == []
    assert is_valid(parse_yaml(path.read_text(encoding="utf-8"), path.name))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("lm_124m", 124), ("lm_350m", 350), ("lm_1b3", 1300), ("lm_3b8", 3800)],
)
def test_language_models_have_the_size_of_their_names(repository: Path, name: str, millions: int) -> None:
    from glowflow.core.model import GlowFlowModel

    model = GlowFlowModel.from_config(repository / "configs" / f"{name}.yaml")
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.05)


def test_shakespeare_has_the_size_of_the_published_recipe(repository: Path) -> None:
    from glowflow.core.model import GlowFlowModel

    # 65 characters and two specials
    model = GlowFlowModel.from_config(repository / "configs" / "shakespeare_char.yaml", ["model.vocab_size=67"])
    assert model.num_parameters() == pytest.approx(0.80e6, rel=0.01)
