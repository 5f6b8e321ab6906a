# Wide or deep, and do grouped queries cost anything? Every shape has 1.57M parameters (within 1 %).
# glowflow sweep configs/quickstart.yaml tune_spaces/shape_search.py

from __future__ import annotations

from typing import Any

from glowflow.config.space import Draw

PARAMETERS = 1_568_160
VOCABULARY = 2048
HEAD_DIM = 32
DEPTHS = {3: (9, 14), 4: (5, 8), 5: (3, 5), 6: (2, 3)}  # heads -> depths that leave a feed-forward of usual width

SPACE = {
    "metric": "val_loss",
    "set": {"resources.workers": 1, "training.min_lr": None},
    "scheduler": {"name": "asha", "interval_steps": 25, "grace_steps": 50, "reduction_factor": 2},
    "trials": 12,
}


def space(draw: Draw) -> dict[str, Any]:
    """One shape; the feed-forward gets the parameters that embedding and attention leave over."""
    heads = draw.choice("model.heads", list(DEPTHS))
    depth = draw.randint("model.depth", *DEPTHS[heads])
    point: dict[str, Any] = {"training.lr": draw.loguniform("training.lr", 1e-3, 1e-2)}
    point |= {"model.heads": heads, "model.depth": depth, "model.dim": HEAD_DIM * heads}
    if heads % 2 == 0:
        point["model.kv_heads"] = draw.choice("model.kv_heads", [None, 2])  # None: as many as heads
    point["model.ffn_dim"] = feed_forward(HEAD_DIM * heads, depth, point.get("model.kv_heads") or heads)
    return point


def feed_forward(dim: int, depth: int, kv_heads: int) -> int:
    """Hidden width, a multiple of 4, that fills up the parameters of a model with a tied embedding."""
    block = (PARAMETERS - VOCABULARY * dim) / depth
    attention = 2 * dim * dim + 2 * dim * kv_heads * HEAD_DIM
    return round((block - attention) / (3 * dim) / 4) * 4
