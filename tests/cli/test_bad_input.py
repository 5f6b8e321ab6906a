"""Bad input: one clear message that names what to change, exit code 2, no stack trace, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from glowflow.cli.main import run

from .conftest import TINY, Workshop

Fails = Callable[..., str]


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time, lock files left out."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.fixture
def fails(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail as a user error; returns what it printed."""

    def check(*args: str, mentions: tuple[str, ...] = ()) -> str:
        before = _tree(workshop.storage)
        capsys.readouterr()
        code = run(list(args))
        printed = capsys.readouterr()
        assert code == 2, printed.err
        assert "Traceback" not in printed.err and printed.out == ""
        for text in mentions:
            assert text in printed.err, f"{text!r} is not in:\n{printed.err}"
        assert _tree(workshop.storage) == before, "something was written"
        return printed.err

    return check


def test_unknown_command_and_option(fails: Fails) -> None:
    fails("trian", mentions=("train",))
    fails("runs", "list", "--jsn", mentions=("--json",))


def test_neither_config_nor_run(fails: Fails) -> None:
    fails("train", mentions=("--resume",))


def test_unknown_key_suggests_the_right_one(workshop: Workshop, fails: Fails) -> None:
    fails("train", str(workshop.config), "model.dept=4", mentions=("model.dept", "model.depth"))


def test_wrong_type_names_key_and_value(workshop: Workshop, fails: Fails) -> None:
    fails("train", str(workshop.config), "training.lr=fast", mentions=("training.lr", "'fast'"))


def test_three_errors_of_one_file_come_together(workshop: Workshop, fails: Fails, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: {dim: 30, heads: 4}\ntraining: {max_steps: 0, optimiser: adamw}\n")
    fails("train", str(bad), mentions=("3 problems", "model.heads", "training.max_steps", "training.optimizer"))


def test_missing_file_and_yaml_syntax(fails: Fails, tmp_path: Path) -> None:
    fails("train", str(tmp_path / "none.yaml"), mentions=("none.yaml",))
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: {dim: 16\ntraining: 3")
    fails("plan", str(broken), mentions=("broken.yaml", "line"))


def test_names_that_are_not_registered_are_listed_together(fails: Fails, repository: Path) -> None:
    base = str(repository / "configs/base.yaml")
    fails("train", base, "training.optimizer=lyon", mentions=("lyon", "adamw, adan, lion"))
    both = ("model.arch=mamba", "training.optimizer=lyon")
    fails("train", base, *both, mentions=("mamba", "transformer-xl", "lyon", "adamw"))


def test_data_directory_without_manifest(workshop: Workshop, fails: Fails, tmp_path: Path) -> None:
    broken = tmp_path / "no-manifest"
    shutil.copytree(workshop.built, broken)
    (broken / "manifest.json").unlink()
    fails("data", "inspect", str(broken), mentions=("manifest",))
    fails("data", "verify", str(broken), mentions=("manifest",))


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_changed_shard_is_named(workshop: Workshop, fails: Fails, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(workshop.built, damaged)
    shard = sorted(damaged.glob("*.parquet"))[0]
    _flip_a_byte(shard)
    fails("data", "verify", str(damaged), mentions=(shard.name,))
    fails("train", str(workshop.config), "--local", f"data.dataset={damaged}", *TINY, mentions=(shard.name,))


def test_tokenizer_of_another_fingerprint(workshop: Workshop, fails: Fails, tmp_path: Path) -> None:
    assert run(["data", "build", str(workshop.text), str(tmp_path / "chars"), "--tokenizer", "chars", "--local"]) == 0
    fails("train", str(workshop.config), "--local", "data.tokenizer=chars", *TINY, mentions=("data.tokenizer", "bytes"))
    options = ("--storage", str(workshop.storage), "--dataset", str(tmp_path / "chars"))
    fails("eval", workshop.run, *options, mentions=("tokenizer",))


def test_corrupt_checkpoint_that_the_user_names(workshop: Workshop, fails: Fails, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "damaged"
    shutil.copytree(workshop.storage / workshop.run, copy)
    checkpoint = sorted((copy / "checkpoints").glob("step-*"))[-1]
    _flip_a_byte(sorted(checkpoint.glob("*.distcp"))[0])
    fails("train", "--local", "--resume", str(checkpoint), "training.max_steps=9", mentions=("step-6",))
    fails("eval", str(checkpoint), mentions=("step-6",))
    (copy / "checkpoints/model-6.pt").write_bytes(b"not a checkpoint")
    fails("generate", str(copy / "checkpoints/model-6.pt"), mentions=("model-6.pt",))


def test_checkpoint_of_another_architecture(workshop: Workshop, fails: Fails, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "other"
    shutil.copytree(workshop.storage / workshop.run, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("dim: 16", "dim: 24"))
    fails("train", "--local", "--resume", str(copy), "training.max_steps=9", mentions=("checkpoint",))


def test_changing_the_numbers_of_a_run_is_refused(workshop: Workshop, fails: Fails) -> None:
    run_dir = str(workshop.storage / workshop.run)
    changes = ("training.lr=1", "model.depth=2")
    fails("train", "--local", "--resume", run_dir, *changes, mentions=("training.lr", "model.depth"))


def test_resume_of_an_unknown_run(workshop: Workshop, fails: Fails) -> None:
    fails("train", "--resume", "frist", f"tracking.storage={workshop.storage}", mentions=("frist", "first"))
    fails("runs", "show", "frist", "--storage", str(workshop.storage), mentions=("frist", "first"))


def test_reuse_of_a_run_name(workshop: Workshop, fails: Fails) -> None:
    fails("train", str(workshop.config), "--local", "--run", workshop.run, *TINY, mentions=("first", "tracking.run"))


def test_more_workers_than_the_machine_can_hold(workshop: Workshop, fails: Fails) -> None:
    workers = 32 * (os.cpu_count() or 1)
    given = (f"resources.workers={workers}", f"training.batch_size={workers}")
    fails("train", str(workshop.config), *given, mentions=("resources.workers", str(workers)))


def test_gpu_where_there_is_none(workshop: Workshop, fails: Fails) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    given = ("--local", *TINY, "resources.accelerator=gpu")
    fails("train", str(workshop.config), *given, mentions=("resources.accelerator",))


def test_storage_that_cannot_be_written(workshop: Workshop, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a directory should be")
    storage = f"tracking.storage={tmp_path / 'file' / 'runs'}"
    fails("train", str(workshop.config), "--local", *TINY, storage, mentions=("tracking.storage",))


def test_empty_corpus(workshop: Workshop, fails: Fails, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "nothing.txt").write_text("")
    fails("data", "build", str(empty), str(tmp_path / "out"), "--local", mentions=("empty",))
    assert not (tmp_path / "out").exists()


def test_binary_garbage_is_named_and_refused_or_skipped(workshop: Workshop, fails: Fails, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(workshop.text, mixed)
    (mixed / "garbage.txt").write_bytes(bytes(range(256)) * 40)
    args = ("data", "build", str(mixed), str(tmp_path / "out"), "--tokenizer", "bytes", "--local")
    fails(*args, mentions=("garbage.txt",))
    assert not (tmp_path / "out").exists()
    assert run([*args, "--on-bad-file", "skip"]) == 0
    skipped = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["skipped"]
    assert [file["name"] for file in skipped] == ["garbage.txt"]
