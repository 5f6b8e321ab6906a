"""A little world to evaluate in: pictures of one colour, tones of two pitches, words that name them, models of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glowflow.config.loader import load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.model import GlowFlowModel
from glowflow.data.manifest import Manifest
from glowflow.data.processors.text import train_tokenizer
from glowflow.data.samples.collate import collate
from glowflow.evaluation.load import Target
from glowflow.evaluation.sample_reader import SampleReader
from tests.data.media_sets import MediaRow, tone, write_media_set

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}
PITCHES = {"low": 300.0, "high": 2500.0}
IMAGE: dict[str, Any] = {"encoder": "linear", "patch": 8, "dim": 24, "heads": 2}
AUDIO: dict[str, Any] = {"encoder": "linear", "patch": 4, "dim": 24, "heads": 2}


def picture(colour: str, seed: int, side: int = 8) -> bytes:
    """One colour with a little noise, so that no two are the same bytes."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(-19, 20, (side, side, 3))
    stream = io.BytesIO()
    Image.fromarray((np.array(COLOURS[colour]) + noise).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def rows(pictures: int, seed: int = 0, *, told: bool = True) -> list[MediaRow]:
    """Two samples of each picture, one with each pitch: ``<image><audio> is`` ``red and low``.

    Args:
        told: the text names colour and pitch; else it is the same for all.
    """
    rng, found = np.random.default_rng(seed), []
    for number in range(pictures):
        colour = str(rng.choice(list(COLOURS)))
        image = picture(colour, 1000 * seed + number)
        for pitch, hertz in PITCHES.items():
            sound = tone(float(rng.choice([0.1, 0.16])), hertz + float(rng.integers(0, 50)))
            text, group = f"{colour} and {pitch}" if told else "and", f"picture {seed} {number}"
            found.append(MediaRow(text, "<image><audio> is ", [image], [sound], label=colour, group=group))
    return found


def build(root: Path, *, told: bool = True) -> Manifest:
    """The world as a data set of words; ``told`` as for ``rows``."""
    words = train_tokenizer("words", ["is red green blue and low high"])
    splits = {"train": rows(60, 1, told=told), "validation": rows(24, 2, told=told)}
    return write_media_set(root, splits, base=words)


def config_of(
    manifest: Manifest, fusion: str = "prefix", task: str = "language_modelling", **keys: Any
) -> GlowFlowConfig:
    model = {
        "arch": "multimodal", "fusion": fusion, "task": task, "dim": 32, "depth": 1, "heads": 2, "image": IMAGE,
        "audio": AUDIO, "vocab_size": manifest.tokenizer().vocab_size, "init_std": 0.2,
    }  # fmt: skip
    if task == "classification":
        model["num_classes"] = len(manifest.media["labels"])
    if task == "contrastive":
        model |= {"audio": None, "embedding_dim": 16}
    audio = {"rate": 8000, "n_fft": 256, "hop": 80, "mels": 8, "max_seconds": 0.5}
    data = {"dataset": str(manifest.root), "context": 64, "image": {"size": 8}, "audio": audio}
    data |= keys.pop("data", {})
    return load_config({"model": {**model, **keys}, "data": data, "training": {"max_steps": 5, "warmup_steps": 1}})


def target_of(config: GlowFlowConfig, manifest: Manifest) -> Target:
    """An untrained model."""
    model = GlowFlowModel(config, manifest.tokenizer_spec)
    return Target(model, dict(manifest.tokenizer_spec), 0, Path("model.pt"), None)


def reader_of(target: Target, manifest: Manifest, split: str = "validation", **options: Any) -> SampleReader:
    return SampleReader(target.module, target.config, manifest, split, **options)


def train(target: Target, manifest: Manifest, steps: int = 80, lr: float = 3e-3) -> Target:
    """A few passes over the training split, all of it in each step."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several only wait for each other in a model this small
    module = target.model.module
    reader = reader_of(target, manifest, "train")
    view = reader.view()
    batch = collate(list(reader.usable(view)), view)
    optimizer = torch.optim.AdamW(module.parameters(), lr)
    module.train()
    for _ in range(steps):
        output = module(batch)[0]
        if output.pairs is not None:
            texts, media = output.pairs
            scores = output.logit_scale * texts @ media.T
            wanted = torch.arange(len(texts))
            cross = torch.nn.functional.cross_entropy
            loss = cross(scores, wanted) + cross(scores.T, wanted)
        else:
            loss = output.loss_sum / output.weight_sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.eval()
    torch.set_num_threads(threads)
    return target
