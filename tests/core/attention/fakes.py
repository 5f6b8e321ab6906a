"""Fake kernel packages: the documented signatures and semantics of the real ones, computed by torch's SDPA on the CPU.

Each fake checks what the real one asks of its arguments, keeps the call, and decides who sees whom by the words of the
real documentation, not by our masks. ``KernelPackages`` puts them where the adapters look.

Legend: B batch, H heads, K key/value heads, T queries, S keys, D head width, N positions end to end.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

Window = tuple[int | None, int | None]


def attend(
    q_bthd: Tensor,
    k_bskd: Tensor,
    v_bskd: Tensor,
    allowed_ts: Tensor,
    scale: float | None,
    softcap: float = 0.0,
    slopes_h: Tensor | None = None,
) -> Tensor:
    """[B, T, H, D] attention; SDPA wherever it can be said to SDPA. Fewer key/value heads are shared out in order."""
    q, k, v = (x.transpose(1, 2) for x in (q_bthd, k_bskd, v_bskd))
    assert q.shape[1] % k.shape[1] == 0
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    bias = torch.zeros(allowed_ts.shape, dtype=q.dtype).masked_fill(~allowed_ts, float("-inf"))
    if slopes_h is not None:
        queries, keys = allowed_ts.shape
        distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)[None, :]
        bias = bias - slopes_h.to(q.dtype)[:, None, None] * distance.abs()
    if not softcap:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.expand(1, q.shape[1], -1, -1), scale=scale
        ).transpose(1, 2)
    scores = softcap * torch.tanh(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) / softcap) + bias
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def flash_allowed(queries: int, keys: int, causal: bool, window: Window) -> Tensor:
    """(T, S): keys in [i + keys - queries - left, i + keys - queries + right]; a causal mask is aligned at the ends."""
    at = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)[None, :]
    left, right = window
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    if left is not None and left >= 0:
        allowed &= key >= at - left
    if right is not None and right >= 0:
        allowed &= key <= at + right
    return allowed & (key <= at) if causal else allowed


def end_to_end(
    q_nhd: Tensor, k_nkd: Tensor, v_nkd: Tensor, borders: tuple[Tensor, Tensor], longest: Any, one: Any
) -> Tensor:
    """Each sequence by itself; checks the borders as the kernels do."""
    for border, x, most in zip(borders, (q_nhd, k_nkd), longest, strict=True):
        assert border.dtype == torch.int32 and border[0] == 0 and border[-1] == x.shape[0]
        assert type(most) is int and most == int(border.diff().max())
    spans = zip(borders[0][:-1], borders[0][1:], borders[1][:-1], borders[1][1:], strict=True)
    parts = [one(q_nhd[a:b][None], k_nkd[c:d][None], v_nkd[c:d][None])[0] for a, b, c, d in spans]
    return torch.cat(parts)


class FlashAttn2:
    """flash-attn 2.8: ``flash_attn_func`` and ``flash_attn_varlen_func``."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def _one(self, q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> Tensor:
        assert q.dim() == 4 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        slopes = o["alibi_slopes"]
        assert slopes is None or (slopes.dtype == torch.float32 and slopes.shape == (q.shape[2],))
        allowed = flash_allowed(q.shape[1], k.shape[1], o["causal"], o["window_size"])
        return attend(q, k, v, allowed, o["softmax_scale"], o["softcap"], slopes)

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        options = {name: value for name, value in locals().items() if name not in ("self", "q", "k", "v")}
        self.calls.append({"function": "dense", **options})
        return self._one(q, k, v, options)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        options = {name: value for name, value in locals().items() if name not in ("self", "q", "k", "v")}
        self.calls.append({"function": "varlen", **options})
        borders, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return end_to_end(q, k, v, borders, longest, lambda q, k, v: self._one(q, k, v, options))


class FlashAttn4:
    """flash-attn-4 4.0.0b36, ``flash_attn.cute``: output and log-sum-exp come back together, asked for or not."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def _one(self, q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> Tensor:
        assert q.dim() == 4 and all(edge is None or edge >= 0 for edge in o["window_size"])
        allowed = flash_allowed(q.shape[1], k.shape[1], o["causal"], o["window_size"])
        return attend(q, k, v, allowed, o["softmax_scale"], o["softcap"])

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        gather_kv_indices: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Window = (None, None),
        learnable_sink: Tensor | None = None,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
        score_mod: Any = None,
        score_mod_bwd: Any = None,
        mask_mod: Any = None,
        aux_tensors: list[Any] | None = None,
        aux_scalars: tuple[Any, ...] | None = None,
        block_sparse_tensors: Any = None,
        block_sparse_tensors_bwd: Any = None,
        return_lse: bool = False,
        gather_bwd_recompute_p: bool = False,
        gather_bwd_token_chunk: int | None = None,
    ) -> tuple[Tensor, None]:
        options = {name: value for name, value in locals().items() if name not in ("self", "q", "k", "v")}
        self.calls.append({"function": "dense", **options})
        return self._one(q, k, v, options), None

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        min_seqlen_k: int | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        gather_kv_indices: Tensor | None = None,
        page_table: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Window = (None, None),
        learnable_sink: Tensor | None = None,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, None]:
        options = {name: value for name, value in locals().items() if name not in ("self", "q", "k", "v")}
        self.calls.append({"function": "varlen", **options})
        assert cu_seqlens_q is not None and cu_seqlens_k is not None
        borders, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return end_to_end(q, k, v, borders, longest, lambda q, k, v: self._one(q, k, v, options)), None


class TorchFlash3:
    """torch's side of FlashAttention 3: the registry and ``varlen_attn``, where (-1, 0) is the causal mask."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.active: str | None = None
        self.activations: list[str] = []

    def current_flash_attention_impl(self) -> str | None:
        return self.active

    def activate_flash_attention_impl(self, impl: str) -> None:
        self.activations.append(impl)
        self.active = impl

    def varlen_attn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        self.calls.append({"window_size": window_size, "scale": scale, "enable_gqa": enable_gqa})
        assert enable_gqa or query.shape[1] == key.shape[1]

        def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, flash_allowed(q.shape[1], k.shape[1], False, window_size), scale)

        return end_to_end(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), one)


@dataclass
class Bias:
    """xformers' biases of whole rows: aligned at the ends; left and right: how far a query sees, its own key aside."""

    left: int = -1
    right: int = -1

    def allowed(self, queries: int, keys: int) -> Tensor:
        return flash_allowed(queries, keys, False, (self.left, self.right))

    def make_local_attention(self, window_size: int) -> Bias:
        assert window_size > 0
        return Bias(window_size - 1, 0)


@dataclass
class BlockBias:
    """xformers' ``BlockDiagonalMask``: sequences end to end in one row."""

    lengths: list[int]
    inner: Bias

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: None = None, *, device: Any = None) -> BlockBias:
        assert all(type(length) is int and length > 0 for length in q_seqlen) and kv_seqlen is None
        return cls(q_seqlen, Bias())

    def make_causal(self) -> BlockBias:
        return BlockBias(self.lengths, Bias(-1, 0))

    def make_local_attention(self, window_size: int) -> BlockBias:
        return BlockBias(self.lengths, Bias(window_size - 1, 0))

    def allowed(self, queries: int, keys: int) -> Tensor:
        assert queries == keys == sum(self.lengths)
        return torch.block_diag(*(self.inner.allowed(n, n).float() for n in self.lengths)).bool()


class Xformers:
    """xformers 0.0.35: ``memory_efficient_attention`` and the biases that the adapter names."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def memory_efficient_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
        output_dtype: torch.dtype | None = None,
    ) -> Tensor:
        self.calls.append({"attn_bias": attn_bias, "p": p, "scale": scale, "shape": tuple(query.shape)})
        assert query.dim() == 4 and query.shape[2] == key.shape[2]  # it does not broadcast heads
        assert not isinstance(attn_bias, BlockBias) or query.shape[0] == 1
        return attend(query, key, value, (attn_bias or Bias()).allowed(query.shape[1], key.shape[1]), scale)

    def biases(self) -> dict[str, Any]:
        return {
            "LowerTriangularFromBottomRightMask": lambda: Bias(-1, 0),
            "LocalAttentionFromBottomRightMask": lambda window_left, window_right: Bias(window_left, window_right),
            "BlockDiagonalMask": BlockBias,
        }


class KernelPackages:
    """Installs fakes: distributions in the only folder that is looked at, and modules that are imported already."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.monkeypatch = root, monkeypatch
        monkeypatch.setattr(metadata, "version", self._version)

    def _version(self, name: str) -> str:
        found = next(iter(metadata.distributions(name=name, path=[str(self.root)])), None)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found.version

    def distribution(self, name: str, version: str) -> None:
        folder = self.root / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        importlib.invalidate_caches()

    def module(self, name: str, **attributes: Any) -> None:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(attributes)
        self.monkeypatch.setitem(sys.modules, name, module)

    def flash_attn_2(self, version: str = "2.8.3.post2") -> FlashAttn2:
        fake = FlashAttn2()
        self.distribution("flash-attn", version)
        functions = {name: getattr(fake, name) for name in ("flash_attn_func", "flash_attn_varlen_func")}
        self.module("flash_attn", **functions)
        return fake

    def flash_attn_4(self, version: str = "4.0.0b36") -> FlashAttn4:
        fake = FlashAttn4()
        self.distribution("flash-attn-4", version)
        functions = {name: getattr(fake, name) for name in ("flash_attn_func", "flash_attn_varlen_func")}
        if "flash_attn" not in sys.modules:
            self.module("flash_attn")
        self.module("flash_attn.cute", **functions)
        return fake

    def flash_attn_3(self, version: str = "3.0.0") -> TorchFlash3:
        import torch.nn.attention.varlen as varlen

        fake = TorchFlash3()
        self.distribution("flash-attn-3", version)
        self.module("flash_attn_interface")
        for name in ("current_flash_attention_impl", "activate_flash_attention_impl"):
            self.monkeypatch.setattr(torch.nn.attention, name, getattr(fake, name))
        self.monkeypatch.setattr(varlen, "varlen_attn", fake.varlen_attn)
        return fake

    def xformers(self, version: str = "0.0.35") -> Xformers:
        fake = Xformers()
        self.distribution("xformers", version)
        for name in ("xformers", "xformers.ops.fmha"):
            self.module(name)
        self.module("xformers.ops", memory_efficient_attention=fake.memory_efficient_attention)
        self.module("xformers.ops.fmha.attn_bias", **fake.biases())
        return fake

    def triton(self) -> None:
        self.module("triton")
