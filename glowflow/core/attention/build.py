"""From ``model.attention`` to a layer: the spec of each layer and the module that computes it."""

from __future__ import annotations

from torch import nn

from glowflow.config.architectures import DecoderConfig, TransformerXLConfig
from glowflow.config.attention import LayerKind
from glowflow.core.attention.layer import SelfAttention
from glowflow.core.attention.lengths import dense_up_to
from glowflow.core.attention.linear.gated import GatedAttention
from glowflow.core.attention.linear.layer import LinearAttention, LinearOptions
from glowflow.core.attention.spec import AttentionSpec, LinearSpec, SparsePattern

__all__ = ["build_attention", "layer_spec", "layer_specs"]


def layer_spec(config: DecoderConfig, kind: LayerKind) -> AttentionSpec:
    """What a layer of this kind computes; of a ``gated`` layer its window."""
    attention = config.attention
    alibi = getattr(config, "position", None) == "alibi" and kind != "linear"
    return AttentionSpec(
        kind="windowed" if kind == "gated" else kind,
        heads=config.heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=config.attention_scale,
        window=attention.window if kind in ("windowed", "gated") else None,
        sinks=attention.sinks if kind in ("windowed", "gated") else 0,
        softcap=None if kind == "linear" else attention.softcap,
        alibi=alibi,
        relative=isinstance(config, TransformerXLConfig),
        sparse=_sparse(config) if kind == "sparse" else None,
        linear=LinearSpec(attention.linear.variant, attention.linear.chunk) if kind == "linear" else None,
    )


def _sparse(config: DecoderConfig) -> SparsePattern:
    given = config.attention.sparse
    blocks = tuple(tuple(bool(cell) for cell in row) for row in given.blocks or ())
    return SparsePattern(given.pattern, given.local, given.stride, given.global_tokens, given.block_size, blocks)


def layer_specs(config: DecoderConfig) -> list[AttentionSpec]:
    """Every different spec that some layer computes, in order of the layers: what a kernel must be found for."""
    kinds: list[LayerKind] = []
    for layer in range(config.depth):
        kind = config.attention.layer_kind(layer)
        kinds += ["windowed", "linear"] if kind == "gated" else [kind]
    if _by_length(config):
        kinds.append("windowed")
    return list(dict.fromkeys(layer_spec(config, kind) for kind in kinds))


def build_attention(config: DecoderConfig, layer: int) -> nn.Module:
    """The attention module of one layer: ``module(x_btd, context) -> x_btd``, with ``new_cache``."""
    kind = config.attention.layer_kind(layer)
    rotary = getattr(config, "position", None) == "rope"
    if kind == "linear":
        return LinearAttention(config.dim, layer_spec(config, "linear"), layer, _linear_options(config))
    if kind == "gated":
        window, linear = layer_spec(config, "gated"), layer_spec(config, "linear")
        return GatedAttention(config.dim, window, linear, layer, _linear_options(config), rotary=rotary)
    by_length = _by_length(config)
    return SelfAttention(
        config.dim,
        layer_spec(config, kind),
        layer,
        config.norm_eps if config.qk_norm else None,
        rotary=rotary,
        bias=config.bias,
        long_spec=layer_spec(config, "windowed") if by_length else None,
        dense_up_to=_dense_up_to(config) if by_length else 0,
    )


def _by_length(config: DecoderConfig) -> bool:
    return config.attention.kind == "adaptive" and config.attention.adaptive.policy == "by_length"


def _dense_up_to(config: DecoderConfig) -> int:
    adaptive = config.attention.adaptive
    return dense_up_to(adaptive.benchmark) if adaptive.dense_up_to is None else adaptive.dense_up_to


def _linear_options(config: DecoderConfig) -> LinearOptions:
    given = config.attention.linear
    theta = getattr(config, "rope_theta", LinearOptions.rope_theta)
    return LinearOptions(given.conv, given.output_gate, config.norm_eps, config.qk_norm, theta)
