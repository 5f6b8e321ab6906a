"""From names of runs, checkpoints and files to the same model; and clear errors for everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from glowflow.config.errors import CheckpointError, DataError, RunError
from glowflow.config.loader import to_dict
from glowflow.core.model import GlowFlowModel
from glowflow.data.manifest import Manifest
from glowflow.evaluation.load import export_target, load_manifest, load_target
from glowflow.tracking.runrecord import RunRecord, create_run_dir
from glowflow.training.checkpoint import CheckpointStore


@pytest.fixture
def run(tmp_path: Path, model: GlowFlowModel) -> Path:
    """A run with two checkpoints, whose weights differ by a factor; the first one validates better."""
    run_dir = create_run_dir(tmp_path / "runs", "quick-1")
    RunRecord("quick-1").save(run_dir)
    store = CheckpointStore(run_dir, keep=5, asynchronous=False)
    for step, val_loss in ((10, 1.0), (20, 2.0)):
        extra = {"step": step, "config": to_dict(model.config), "tokenizer": model.tokenizer_spec}
        store.save(step, model.module, None, extra, {"val_loss": val_loss})
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.mul_(2.0)
    return run_dir


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in module.state_dict().values()])


def test_a_run_is_found_by_name_path_and_checkpoint(run: Path, model: GlowFlowModel, monkeypatch) -> None:
    newest = load_target("quick-1", run.parent)
    assert newest.step == 20 and newest.path.name == "step-20" and newest.run_dir == run
    assert newest.config == model.config and newest.tokenizer_spec == model.tokenizer_spec
    assert not newest.module.training
    torch.testing.assert_close(weights(newest.module) * 2, weights(model.module))
    for target in (run, run / "checkpoints" / "step-20", "quick-1/checkpoints/step-20"):
        assert torch.equal(weights(load_target(target, run.parent).module), weights(newest.module))
    assert load_target(run / "checkpoints" / "step-10").step == 10
    assert load_target("quick-1", run.parent, best_metric="val_loss").step == 10
    monkeypatch.chdir(run.parent.parent)
    (run.parent.parent / "quick-1").mkdir()  # an unrelated directory of the same name is not meant
    assert load_target("quick-1").step == 20


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_exported_file_is_the_same_model(run: Path, tmp_path: Path, suffix: str) -> None:
    file = export_target("quick-1", run.parent, tmp_path / f"model{suffix}")
    loaded, original = load_target(file), load_target(run)
    assert loaded.step == 20 and loaded.run_dir is None
    assert loaded.tokenizer_spec == original.tokenizer_spec and loaded.config.model == original.config.model
    assert torch.equal(weights(loaded.module), weights(original.module))


def test_the_data_of_the_run_are_found_again_and_others_are_checked(
    run: Path, byte_manifest: Manifest, char_manifest: Manifest
) -> None:
    target = load_target(run)
    assert load_manifest(target).fingerprint == byte_manifest.fingerprint
    assert load_manifest(target, dataset=str(byte_manifest.root)).fingerprint == byte_manifest.fingerprint
    with pytest.raises(DataError, match="tokenizer"):
        load_manifest(target, dataset=str(char_manifest.root))


def test_unknown_names_get_a_suggestion(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="did you mean 'quick-1'"):
        load_target("quik-1", run.parent)
    with pytest.raises(CheckpointError, match=r"missing\.pt.*does not exist"):
        load_target("missing.pt", run.parent)
    with pytest.raises(CheckpointError, match="step-10"):
        load_target(run / "checkpoints" / "step-11")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_target(tmp_path)


def test_a_flipped_byte_is_an_error(run: Path) -> None:
    file = next((run / "checkpoints" / "step-20").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_target(run)


def test_a_checkpoint_of_another_shape_is_an_error(run: Path, model: GlowFlowModel) -> None:
    config = to_dict(model.config)
    config["model"]["depth"] = 3
    store = CheckpointStore(run, keep=5, asynchronous=False)
    extra = {"step": 30, "config": config, "tokenizer": model.tokenizer_spec}
    store.save(30, model.module, None, extra, {})
    with pytest.raises(CheckpointError, match="do not fit"):
        load_target(run)
    store.save(40, model.module, None, {"step": 40, "config": {"model": {"arch": "gone"}}, "tokenizer": None}, {})
    with pytest.raises(CheckpointError, match="gone"):
        load_target(run)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, model: GlowFlowModel) -> None:
    GlowFlowModel(model.config).save(tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="carries no tokenizer"):
        load_target(tmp_path / "bare.pt")


def test_a_run_directory_that_moved_still_loads(run: Path, tmp_path: Path) -> None:
    moved = run.rename(tmp_path / "moved")
    assert json.loads((moved / "run.json").read_text())["run"] == "quick-1"
    assert load_target(moved).run_dir == moved
