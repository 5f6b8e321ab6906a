"""docs/custom-architecture.md as a stranger follows it: its files outside the package, its commands, its message.

The code blocks are taken from the page; a block's first line names its file. Commands run as printed, in processes of
their own, with overrides that make them quick.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.journeys.support import ROOT, checkpoint_tensors, glowflow, record, write_corpus

tomllib = pytest.importorskip("tomllib", reason="tomllib is in the standard library since Python 3.11")

PAGE = (ROOT / "docs" / "custom-architecture.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = {body.split("\n", 1)[0].removeprefix("# "): body for kind, body in BLOCKS if kind in ("python", "yaml", "toml")}
COMMANDS = [
    line.removeprefix("$ glowflow ") for kind, body in BLOCKS if kind == "console" for line in body.splitlines() if line
]
QUICK = {
    "data.dataset": "corpus",
    "data.cache_dir": "cache",
    "data.context": 32,
    "training.max_steps": 3,
    "training.warmup_steps": 1,
    "training.batch_size": 4,
    "training.val_batches": 1,
    "training.threads": 1,
    "tracking.backend": "jsonl",
    "resources.accelerator": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the page's files, but for the one of the package, and a little text."""
    path = tmp_path_factory.mktemp("stranger")
    for name, body in FILES.items():
        if name != "pyproject.toml":
            (path / name).write_text(body, encoding="utf-8")
    write_corpus(path / "corpus", files=4)
    return path


def type_in(command: str, folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the page in the folder."""
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
    quick = [f"{key}={value}" for key, value in QUICK.items()] if words[0] in ("train", "plan") else []
    return glowflow(*words, *quick, cwd=folder, **extra)


def followed(command: str, folder: Path, **extra: str) -> str:
    done = type_in(command, folder, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def the_command(part: str) -> str:
    (found,) = [command for command in COMMANDS if part in command]
    return found


def test_the_model_has_less_than_sixty_lines() -> None:
    assert len([line for line in FILES["conv_lm.py"].splitlines() if line.strip() and not line.startswith("#")]) < 60
    assert set(FILES) == {"conv_lm.py", "conv_lm.yaml", "broken_lm.py", "conv_lanes.py", "pyproject.toml"}


def test_from_a_file_to_a_trained_evaluated_writing_model(folder: Path) -> None:
    plan, train, evaluate, generate = COMMANDS[:4]
    assert [command.split()[0] for command in COMMANDS[:4]] == ["plan", "train", "eval", "generate"]
    assert "FLOPs" in followed(plan, folder)
    followed(train, folder)
    run = folder / "runs" / "first"
    assert record(run)["status"] == "FINISHED" and record(run)["config"]["model"]["kernel"] == 12
    assert any("blocks.1.conv.weight" in name for name in checkpoint_tensors(run, 3))
    assert "bits per byte" in followed(evaluate, folder)
    assert followed(generate, folder).startswith("def ")


def test_memory_between_sequences_is_saved_and_roles_scale_the_rate(folder: Path) -> None:
    followed(the_command("conv_lanes"), folder)
    tensors = checkpoint_tensors(folder / "runs" / "lanes", 3)
    assert tensors["carry.block1"].shape == (4, 11, 96)
    # AdamW's first steps are as large as the rate: filters, which start near zero, have moved half as far.
    moved = {name: tensors[f"model.blocks.0.{name}.bias"].abs().max() for name in ("conv", "up")}
    assert 0.3 < moved["conv"] / moved["up"] < 0.7


def test_a_broken_model_is_told_in_the_words_of_the_page_and_nothing_is_written(folder: Path) -> None:
    (shown,) = [body for kind, body in BLOCKS if kind == "text"]
    command, _, message = shown.partition("\n")
    done = type_in(command.removeprefix("$ glowflow "), folder)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    said = done.stderr[done.stderr.index("error:") :]
    assert said.split() == message.split(), said
    assert not (folder / "runs" / "broken").exists()


def install(site: Path) -> dict[str, Any]:
    """What an installer writes for the page's pyproject.toml: the module, its metadata and its entry points."""
    project: dict[str, Any] = tomllib.loads(FILES["pyproject.toml"])["project"]
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (site / "conv_lm.py").write_text(FILES["conv_lm.py"], encoding="utf-8")
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return project


def test_by_entry_point_of_an_installed_distribution(folder: Path, tmp_path: Path) -> None:
    install(tmp_path / "site")
    work = tmp_path / "work"  # the module is not here: only the distribution knows it
    work.mkdir()
    for name in ("conv_lm.yaml", "corpus", "cache"):
        if (folder / name).exists():
            (work / name).symlink_to(folder / name)
    path = f"{tmp_path / 'site'}:{ROOT}"
    followed(the_command("model.arch=conv-lm"), work, PYTHONPATH=path)
    run = work / "runs" / "named"
    assert record(run)["config"]["model"]["arch"] == "conv-lm"
