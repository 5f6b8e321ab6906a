"""A small corpus of many files, built for two tokenizers, and a small model for it; samples with media, and a model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glowflow.config.loader import load_config
from glowflow.config.schema import DataConfig, GlowFlowConfig
from glowflow.core.model import GlowFlowModel
from glowflow.data.manifest import Manifest
from glowflow.data.prepare import ensure_built
from glowflow.evaluation.load import Target
from tests.data.media_sets import mixed_rows, write_media_set

from .colours import build, config_of, target_of, train

WORDS = "the cat sat on a mat and saw the small dog run — été 猫".split()


def write_corpus(folder: Path, files: int = 700) -> Path:
    generator = random.Random(0)
    folder.mkdir()
    for number in range(files):
        words = generator.choices(WORDS, k=generator.randint(3, 60))
        (folder / f"{number:04d}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


def data_config(corpus: Path, cache: Path, tokenizer: str = "bytes") -> DataConfig:
    return DataConfig(dataset=str(corpus), tokenizer=tokenizer, context=32, cache_dir=str(cache))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def byte_manifest(corpus: Path, cache: Path) -> Manifest:
    return ensure_built(data_config(corpus, cache), use_ray=False)[0][0]


@pytest.fixture(scope="session")
def char_manifest(corpus: Path, cache: Path) -> Manifest:
    return ensure_built(data_config(corpus, cache, "chars"), use_ray=False)[0][0]


def small_config(corpus: Path, cache: Path, vocab_size: int) -> GlowFlowConfig:
    shape = {"dim": 16, "depth": 2, "heads": 2, "init_std": 0.2}
    return load_config(
        {
            "model": {"arch": "transformer", "vocab_size": vocab_size, **shape},
            "data": data_config(corpus, cache).model_dump(),
            "training": {"batch_size": 4, "max_steps": 5, "warmup_steps": 1},
        }
    )


@pytest.fixture
def model(corpus: Path, cache: Path, byte_manifest: Manifest) -> GlowFlowModel:
    return GlowFlowModel(small_config(corpus, cache, 257), byte_manifest.tokenizer_spec)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Pictures of one colour and tones of two pitches, with texts that name both."""
    return build(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Samples with none to two media, of several sizes, with and without prompts; one is bad."""
    validation = mixed_rows(40, 3, sizes=(8, 12, 16))
    validation[7] = replace(validation[7], bad="image_decode: is cut off")
    return write_media_set(tmp_path_factory.mktemp("mixed"), {"train": mixed_rows(10), "validation": validation})


@pytest.fixture(scope="session")
def trained(manifest: Manifest) -> Target:
    """A model that has learnt to name colours and pitches."""
    return train(target_of(config_of(manifest), manifest), manifest)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads only wait for each other in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
