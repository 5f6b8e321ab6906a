"""Checkpoints of others, written here from the descriptions of their formats: small files of llama2.c."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]

WORDS = [
    "he",
    "th",
    "the",
    " the",
    " t",
    "qu",
    "ck",
    " qu",
    "ui",
    " qui",
    "ick",
    " quick",
    "é",
    "🙂",
    "ab",
    "ba",
    "aba",
]


def tokenizer_bin(words: list[str] = WORDS, scores: list[float] | None = None) -> bytes:
    """A tokenizer.bin: three special tokens, 256 bytes, printable characters, then words with falling scores."""
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    pieces += [chr(code).encode() for code in range(32, 127)] + [b"\n"]
    values = [0.0] * len(pieces) + (scores or [-float(rank) for rank in range(len(words))])
    pieces += [word.encode() for word in words]
    content = struct.pack("<i", max(map(len, pieces)))
    for piece, score in zip(pieces, values, strict=True):
        content += struct.pack("<fi", score, len(piece)) + piece
    return content


VOCABULARY = 3 + 256 + 95 + 1 + len(WORDS)


@dataclass
class TinyLlama:
    """A Llama of random weights, its file and its forward pass in plain float64."""

    tied: bool = True
    dim: int = 16
    hidden: int = 24
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = VOCABULARY
    context: int = 32
    weights: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(0)
        keys = self.kv_heads * self.dim // self.heads
        shapes: dict[str, tuple[int, ...]] = {
            "embedding": (self.vocabulary, self.dim),
            "attention_norm": (self.layers, self.dim),
            "q": (self.layers, self.dim, self.dim),
            "k": (self.layers, keys, self.dim),
            "v": (self.layers, keys, self.dim),
            "out": (self.layers, self.dim, self.dim),
            "ffn_norm": (self.layers, self.dim),
            "w1": (self.layers, self.hidden, self.dim),
            "w2": (self.layers, self.dim, self.hidden),
            "w3": (self.layers, self.hidden, self.dim),
            "norm": (self.dim,),
            "head": (self.vocabulary, self.dim),
        }
        for name, shape in shapes.items():
            drawn = generator.normal(1.0 if "norm" in name else 0.0, 0.3, shape)
            self.weights[name] = drawn.astype(np.float32)
        if self.tied:
            self.weights["head"] = self.weights["embedding"]

    def content(self, version: int) -> bytes:
        """The whole file."""
        sizes = (self.dim, self.hidden, self.layers, self.heads, self.kv_heads)
        layers = ["q", "k", "v", "out"]
        if version == 0:
            signed = self.vocabulary if self.tied else -self.vocabulary
            head = struct.pack("<7i", *sizes, signed, self.context)
            order = ["embedding", "attention_norm", *layers, "ffn_norm", "w1", "w2", "w3", "norm"]
        else:
            head = struct.pack("<4sii", b"24ka", 1, self.dim) + struct.pack("<4i", *sizes[1:])
            head = (head + struct.pack("<iiB", self.vocabulary, self.context, self.tied)).ljust(256, b"\0")
            order = ["attention_norm", "ffn_norm", "norm", "embedding", *layers, "w1", "w2", "w3"]
        parts = [self.weights[name] for name in order]
        if version == 0:
            half = self.dim // self.heads // 2
            each = 1.0 / (10000.0 ** (torch.arange(half).float() * 2 / (2 * half)))
            angles = torch.outer(torch.arange(self.context).float(), each)
            parts += [angles.cos().numpy(), angles.sin().numpy()]
        if not self.tied:
            parts.append(self.weights["head"])
        return head + b"".join(part.tobytes() for part in parts)

    def write(self, path: Path, version: int = 0) -> Path:
        path.write_bytes(self.content(version))
        return path

    def logits(self, tokens: list[int]) -> Array:
        """(T, V), as run.c computes them."""
        w = {name: value.astype(np.float64) for name, value in self.weights.items()}
        x, width, group = w["embedding"][tokens], self.dim // self.heads, self.heads // self.kv_heads
        for layer in range(self.layers):
            y = norm(x, w["attention_norm"][layer])
            q, k, v = (y @ w[name][layer].T for name in "qkv")
            q, k = turned(q, width), turned(k, width)
            mixed = np.zeros_like(q)
            for head in range(self.heads):
                mine, theirs = slice(head * width, (head + 1) * width), head // group * width
                keys, values = k[:, theirs : theirs + width], v[:, theirs : theirs + width]
                scores = q[:, mine] @ keys.T / np.sqrt(width)
                scores[np.triu_indices(len(tokens), 1)] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                mixed[:, mine] = weights / weights.sum(-1, keepdims=True) @ values
            x = x + mixed @ w["out"][layer].T
            y = norm(x, w["ffn_norm"][layer])
            gate = y @ w["w1"][layer].T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"][layer].T)) @ w["w2"][layer].T
        return norm(x, w["norm"]) @ w["head"].T


def norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def turned(x: Array, width: int) -> Array:
    """Pairs of neighbouring channels, turned by position times 10000^(-2i / width)."""
    out = x.copy()
    for position in range(len(x)):
        for i in range(0, x.shape[1], 2):
            angle = position * 10000.0 ** -((i % width) / width)
            a, b = x[position, i], x[position, i + 1]
            out[position, i] = a * np.cos(angle) - b * np.sin(angle)
            out[position, i + 1] = a * np.sin(angle) + b * np.cos(angle)
    return out
