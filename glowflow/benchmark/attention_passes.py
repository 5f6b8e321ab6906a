"""The passes that ``glowflow bench attention`` times: one kernel forward, forward and backward, or one decoding step.

``prepare`` makes random inputs on the device and gives back a function that runs the pass once. Forward and backward
are the kernel alone. Decoding is a whole attention layer with its cache, since what a step costs is reading and writing
that cache; it goes on from where the last step ended.

Legend: B batch, H heads, K key/value heads, T positions, D head width, X width of the layer.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.benchmark.attention_options import KINDS, Pass
from glowflow.config.architectures import TransformerConfig
from glowflow.config.errors import ConfigError, Problem
from glowflow.config.loader import load_config
from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.build import build_attention, layer_spec
from glowflow.core.attention.cache import DecodeCache, FullKV, RingKV
from glowflow.core.attention.dispatch import resolve
from glowflow.core.attention.layer import AttentionContext
from glowflow.core.attention.linear.base import LinearInputs
from glowflow.core.attention.linear.kernels import resolve_linear
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["Case", "Prepared", "Shape", "prepare", "timed"]

_PREFILL = 4096  # positions at a time that a recurrent layer reads before its first step is timed


@dataclass(frozen=True)
class Shape:
    """Sizes that all cases share.

    Args:
        batch, heads, kv_heads, head_dim: B, H, K, D.
        window: keys that ``windowed`` sees; the local part of the sparse patterns, whose stride, number of global
            positions and block size are a quarter of it.
        dtype: name of a floating-point dtype of torch.
        device: name of the device.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    dtype: str
    device: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def config(self, kind: str) -> TransformerConfig:
        """The model section whose attention layers are of this kind, without positions: those cost every kind the same.

        Raises:
            ConfigError: a kind that is not of `KINDS`, or sizes that no model may have.
        """
        if kind not in KINDS:
            raise ConfigError(Problem("--kinds", f"must be of {', '.join(KINDS)}", kind))
        base, _, variant = kind.partition(".")
        attention: dict[str, Any] = {"kind": base}
        quarter = max(2, self.window // 4)
        if base == "windowed":
            attention["window"] = self.window
        elif base == "sparse":
            sparse: dict[str, Any] = {"pattern": variant or "strided", "local": self.window, "stride": quarter}
            sparse |= {"global_tokens": quarter, "block_size": quarter}
            if variant == "blocks":
                sparse["blocks"] = [[int(column <= row) for column in range(4)] for row in range(4)]
            attention["sparse"] = sparse
        elif base == "linear" and variant:
            attention["linear"] = {"variant": variant}
        sizes = {"dim": self.heads * self.head_dim, "heads": self.heads, "kv_heads": self.kv_heads}
        model = load_config({"model": {**sizes, "position": "none", "attention": attention}}).model
        assert isinstance(model, TransformerConfig)
        return model

    def spec(self, kind: str) -> AttentionSpec:
        """What a layer of this kind computes."""
        config = self.config(kind)
        return layer_spec(config, config.attention.layer_kind(0))

    def conditions(self, which: Pass) -> Conditions:
        """Where a pass runs."""
        more = {"training": which == "backward", "decoding": which == "decode"}
        return Conditions.here(self.device, self.torch_dtype, **more)


@dataclass(frozen=True)
class Case:
    """One thing that is timed, at every length.

    Args:
        kind: one of ``KINDS``.
        backend: name of the kernel.
        which: the pass.
    """

    kind: str
    backend: str
    which: Pass


@dataclass
class Prepared:
    """A pass that is ready to run.

    Args:
        run: one pass; of ``decode`` one step.
        warm: what comes before passes that are timed: masks are made, and code is compiled.
        cache_bytes: what the layer remembers; of ``decode`` alone.
    """

    run: Callable[[], object]
    warm: Callable[[], object]
    cache_bytes: int | None = None


def prepare(shape: Shape, case: Case, length: int, steps: int) -> Prepared:
    """Inputs on the device, and the pass over them.

    Args:
        length: T; of ``decode`` the position of the first step.
        steps: how often ``run`` and ``warm`` will be called together.
    """
    if case.which == "decode":
        return _decode(shape, case, length, steps)
    call, inputs = (_linear if case.kind.startswith("linear") else _softmax)(shape, case, length)
    forward = torch.no_grad()(call)
    if case.which == "forward":
        return Prepared(forward, forward)
    grad_bhtd = torch.randn(shape.batch, shape.heads, length, shape.head_dim, **_place(shape))
    for tensor in inputs:
        tensor.requires_grad_()
    return Prepared(lambda: torch.autograd.grad(call(), inputs, grad_bhtd), forward)


def _place(shape: Shape) -> dict[str, Any]:
    return {"device": shape.device, "dtype": shape.torch_dtype}


def _softmax(shape: Shape, case: Case, length: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A softmax kernel; its masks are made in the first call and kept, as the layers of a model share them."""
    spec = shape.spec(case.kind)
    kernel, _ = resolve(spec, case.backend, shape.conditions(case.which))
    visibility = Visibility(length, length, torch.device(shape.device))
    counts = (shape.heads, shape.kv_heads, shape.kv_heads)
    inputs = [torch.randn(shape.batch, count, length, shape.head_dim, **_place(shape)) for count in counts]
    q_bhtd, k_bktd, v_bktd = inputs
    training = case.which == "backward"
    return lambda: kernel.run(q_bhtd, k_bktd, v_bktd, spec, visibility, training), inputs


def _linear(shape: Shape, case: Case, length: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A linear kernel, on inputs such as a layer gives it: keys and values for every head."""
    spec = shape.spec(case.kind)
    assert spec.linear is not None
    kernel, _ = resolve_linear(spec, case.backend, shape.conditions(case.which))
    size = (shape.batch, shape.heads, length)
    q_bhtd, k_bhtd, v_bhtd = (torch.randn(*size, shape.head_dim, **_place(shape)) for _ in range(3))
    decay_bht: Tensor | None = F.logsigmoid(torch.randn(size, **_place(shape))) / 16
    beta_bht = None
    variant = spec.linear.variant
    if variant == "feature_map":
        q_bhtd, k_bhtd, decay_bht = F.elu(q_bhtd) + 1, F.elu(k_bhtd) + 1, None
    elif variant == "gated_delta":
        k_bhtd, beta_bht = F.normalize(k_bhtd, dim=-1), torch.rand(size, **_place(shape))
    inputs = LinearInputs(q_bhtd, k_bhtd, v_bhtd, decay_bht, beta_bht)
    learned = [q_bhtd, k_bhtd, v_bhtd]
    if variant != "retention":  # its decay is fixed
        learned += [tensor for tensor in (decay_bht, beta_bht) if tensor is not None]
    return lambda: kernel.run(inputs, spec)[0], learned


def _decode(shape: Shape, case: Case, position: int, steps: int) -> Prepared:
    """A layer that has read ``position`` positions, and its next steps."""
    layer: Any = build_attention(shape.config(case.kind), 0).to(**_place(shape)).eval()
    device, longest = torch.device(shape.device), position + 1 + steps
    part = layer.new_cache(shape.batch, longest, device, shape.torch_dtype)
    cache = DecodeCache([part], longest)
    context = AttentionContext(
        Visibility(1, longest, device), shape.conditions("decode"), case.backend, cache=cache, length=longest
    )
    x_b1x = torch.randn(shape.batch, 1, shape.heads * shape.head_dim, **_place(shape))

    def read(x_btx: Tensor) -> Tensor:
        cache.require(x_btx.shape[1])
        y_btx: Tensor = layer(x_btx, context)
        cache.advance(x_btx.shape[1])
        return y_btx

    with torch.no_grad():
        if isinstance(part, FullKV | RingKV):  # what they hold does not depend on what was attended to
            size = (shape.batch, shape.kv_heads, position, shape.head_dim)
            part.update(torch.randn(size, **_place(shape)), torch.randn(size, **_place(shape)), 0)
            cache.advance(position)
        else:
            for start in range(0, position, _PREFILL):
                read(x_b1x.expand(-1, min(_PREFILL, position - start), -1))
    step = torch.no_grad()(lambda: read(x_b1x))
    step()  # a state has its size from its first position on
    return Prepared(step, step, part.nbytes())


def timed(run: Callable[[], object], device: torch.device, times: int) -> list[float]:
    """Milliseconds of each of several calls; on CUDA by events, without waiting between the calls."""
    if device.type != "cuda":
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            run()
            taken.append(1000 * (time.perf_counter() - start))
        return taken
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
