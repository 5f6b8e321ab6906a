"""GlowFlowModel: recipe, lazy parameters, single-file checkpoints, what is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glowflow.config.errors import CheckpointError, ConfigError, GlowFlowError
from glowflow.config.schema import GlowFlowConfig
from glowflow.core import model as model_module
from glowflow.core.model import GlowFlowModel, build_module, read_single_file

TOKENIZER = {"kind": "chars", "vocab_size": 37, "characters": "abc", "nested": {"list": [1, 2]}}
MakeConfig = Callable[..., GlowFlowConfig]


@pytest.fixture
def model(make_config: MakeConfig) -> GlowFlowModel:
    return GlowFlowModel(make_config(vocab_size=None), TOKENIZER)


def test_counting_allocates_nothing_and_touches_nothing(make_config: MakeConfig) -> None:
    big = GlowFlowModel(
        make_config(dim=8192, depth=80, heads=64, ffn_dim=28672, vocab_size=128256, tie_embeddings=False)
    )
    assert big.num_parameters() > 70e9
    assert big.num_parameters() - big.num_parameters(embedding=False) == 128256 * 8192
    assert big.flops_per_token(2048) > 6 * 69e9
    assert not big.touched


def test_parameters_come_with_the_first_use_from_the_seed(model: GlowFlowModel) -> None:
    again = GlowFlowModel(model.config, TOKENIZER)
    assert not model.touched
    pickle.loads(pickle.dumps(model))
    first = model.module
    assert model.touched
    assert model.module is first
    for ours, theirs in zip(first.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(GlowFlowError, match="not pickled"):
        pickle.dumps(model)


def test_from_config_takes_mappings_files_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text("model: {dim: 32, depth: 1, heads: 2, vocab_size: 11}\n")
    loaded = GlowFlowModel.from_config(path, ["model.depth=3"])
    assert (loaded.config.model.dim, loaded.config.model.depth) == (32, 3)  # type: ignore[attr-defined]
    assert GlowFlowModel.from_config(loaded.config).config == loaded.config
    assert "recipe" in repr(loaded)
    with pytest.raises(ConfigError, match="dpeth"):
        GlowFlowModel.from_config({"model": {"dpeth": 3}})


def test_tokenizer_gives_the_vocabulary_or_must_fit(make_config: MakeConfig) -> None:
    assert GlowFlowModel(make_config(vocab_size=None), TOKENIZER).config.model.vocab_size == 37
    assert GlowFlowModel(make_config(vocab_size=64), TOKENIZER).config.model.vocab_size == 64
    with pytest.raises(ConfigError, match="37 tokens"):
        GlowFlowModel(make_config(vocab_size=36), TOKENIZER)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_single_file_round_trip(model: GlowFlowModel, tmp_path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / "deep" / f"model-5{suffix}"
    model.save(path, step=5)
    loaded = GlowFlowModel.load(path)
    assert loaded.touched
    assert (loaded.step, loaded.tokenizer_spec, loaded.config) == (5, TOKENIZER, model.config)
    for name, value in model.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], value)
    assert loaded.generate([1, 2], 6, seed=2) == model.generate([1, 2], 6, seed=2)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_pt_holds_plain_data_only(model: GlowFlowModel, tmp_path: Path) -> None:
    model.save(tmp_path / "m.pt", step=3)
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    assert set(content) == {"format", "config", "tokenizer", "step", "digest", "state_dict"}
    assert content["config"]["model"]["dim"] == 32
    assert content["tokenizer"] == TOKENIZER


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "garbage", "empty"])
def test_damaged_files_are_refused(model: GlowFlowModel, tmp_path: Path, suffix: str, damage: str) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"m{suffix}"
    model.save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"flip": bytes(content), "cut": bytes(content[:3000]), "garbage": b"hello world" * 50, "empty": b""}
    path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match="corrupt"):
        GlowFlowModel.load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("foreign.pt", "list.pt"):
        with pytest.raises(CheckpointError, match="not a GlowFlow model file"):
            GlowFlowModel.load(tmp_path / name)
    with pytest.raises(CheckpointError, match="does not exist"):
        GlowFlowModel.load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="glowflow export"):
        GlowFlowModel.load(tmp_path)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"format": subprocess.Popen}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="corrupt or no model file") as caught:
        read_single_file(tmp_path / "evil.pt")
    assert "weights_only" not in str(caught.value)  # torch advises to load it all the same


def test_weights_of_another_architecture_are_refused(
    model: GlowFlowModel, make_config: MakeConfig, tmp_path: Path
) -> None:
    path = tmp_path / "m.pt"
    model.save(path)
    deeper = GlowFlowModel(make_config(depth=3, vocab_size=40))
    with pytest.raises(CheckpointError) as caught:
        deeper.load_weights(path)
    text = str(caught.value)
    assert "lacks the parameter blocks.2.attention.qkv.weight (96, 32)" in text
    assert "embedding.weight must have the shape (40, 32) (got (37, 32))" in text
    assert not deeper.touched
    content = torch.load(path, weights_only=True)
    renamed = copy.deepcopy(content)
    renamed["config"]["model"]["arch"] = "mamba"
    torch.save(renamed, path)
    for load in (lambda: GlowFlowModel.load(path), lambda: deeper.load_weights(path)):
        with pytest.raises(CheckpointError, match="mamba"):
            load()


def test_matching_weights_are_taken_over(model: GlowFlowModel, make_config: MakeConfig, tmp_path: Path) -> None:
    model.save(tmp_path / "m.pt", step=9)
    other = GlowFlowModel(make_config(dropout=0.3))
    other.load_weights(tmp_path / "m.pt")
    assert other.step == 9
    assert torch.equal(other.module.get_parameter("norm.weight"), model.module.get_parameter("norm.weight"))
    assert other.config.model.dropout == 0.3  # type: ignore[attr-defined]


def test_unusable_places_and_suffixes_are_refused(model: GlowFlowModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        model.save(tmp_path / "file" / "m.pt")
    with pytest.raises(CheckpointError, match=r"\.pt or \.safetensors"):
        model.save(tmp_path / "m.onnx")


def test_missing_safetensors_is_a_clear_error(
    model: GlowFlowModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        model.save(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_custom_architecture_by_path_and_wrong_targets(make_config: MakeConfig) -> None:
    config = make_config()
    config.model.arch = "glowflow.core.architectures.transformer:Transformer"
    assert build_module(config).num_parameters() == build_module(make_config()).num_parameters()
    config.model.arch = "collections:OrderedDict"
    with pytest.raises(ConfigError, match="subclass"):
        build_module(config)
    config.model.arch = "nothing"
    with pytest.raises(ConfigError, match="registered: multimodal, transformer"):
        build_module(config)


def test_core_imports_with_torch_numpy_pydantic_and_yaml_alone() -> None:
    core = Path(model_module.__file__).parent
    names = sorted(
        ".".join(("glowflow.core", *path.relative_to(core).with_suffix("").parts)) for path in core.rglob("[a-z]*.py")
    )
    blocked = ("ray", "mlflow", "pyarrow", "tokenizers", "safetensors", "pandas", "fsspec", "glowflow.data")
    code = (
        "import importlib, sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    assert len(names) > 12
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
