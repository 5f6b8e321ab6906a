"""config.json of Hugging Face's Llama, Mistral, Qwen2 and GPT-2, and the section ``model``: each from the other.

A family is refused with every reason at once where its config asks for something that our transformer does not compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glowflow.config.architectures import ArchitectureConfig, TransformerConfig
from glowflow.config.errors import CheckpointError, Problem
from glowflow.core.conversion.layout import Part, llama_parts
from glowflow.core.conversion.reasons import require

__all__ = ["FAMILIES", "Family", "Values", "family_of"]

_GATES = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}
_PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}
_PLAIN["relu"] = "relu"
_LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "attention_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "out": "model.layers.{}.self_attn.o_proj",
    "feed_forward_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Args:
        model_type: as config.json names it.
        architecture: class in ``transformers``.
        prefix: of all names but the head's; a folder of the model without its head lacks it.
        read: config.json -> section ``model``, longest sequence; problems are added to the list.
        write: section ``model``, context -> config.json.
        parts: our parameters and their tensors.
        ignored: ends of the names of tensors that hold nothing learned.
    """

    model_type: str
    architecture: str
    prefix: str
    read: Callable[[Values], tuple[dict[str, Any], int]]
    write: Callable[[ArchitectureConfig, int], dict[str, Any]]
    parts: Callable[[TransformerConfig], list[Part]]
    ignored: tuple[str, ...]


class Values:
    """Reads config.json and collects what is wrong with it."""

    def __init__(self, source: str, values: dict[str, Any]) -> None:
        self.source, self.values, self.problems = source, values, list[Problem]()

    def refuse(self, key: str, rule: str, value: Any) -> None:
        self.problems.append(Problem(f"{self.source}: {key}", rule, value))

    def number(self, key: str, default: float | None = None) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            self.refuse(key, "must be a number greater than 0" if value is not None else "is missing", value)
            return 1
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int):
            self.refuse(key, "must be a whole number", value)
        return int(value)

    def must_be(self, key: str, wanted: Any, why: str, default: Any = None) -> None:
        value = self.values.get(key, default)
        if value is not None and value != wanted:
            self.refuse(key, f"must be {wanted!r}: {why}", value)

    def choice(self, key: str, table: dict[str, str], default: str) -> str:
        value = self.values.get(key, default)
        if value not in table:
            self.refuse(key, f"must be one of {', '.join(table)}", value)
        return table.get(value, next(iter(table.values())))


def family_of(source: str, values: dict[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        CheckpointError: there is none of this ``model_type``.
    """
    family = FAMILIES.get(values.get("model_type", ""))
    if family is None:
        rule = f"must be one of {', '.join(FAMILIES)}"
        raise CheckpointError(Problem(f"{source}: model_type", rule, values.get("model_type")))
    return family


def _read_llama(values: Values) -> tuple[dict[str, Any], int]:
    family = values.values["model_type"]
    dim, heads = values.whole("hidden_size"), values.whole("num_attention_heads")
    context = values.whole("max_position_embeddings", {"llama": 2048, "mistral": 131072, "qwen2": 32768}[family])
    model = {
        "arch": "transformer",
        "vocab_size": values.whole("vocab_size"),
        "dim": dim,
        "depth": values.whole("num_hidden_layers"),
        "heads": heads,
        "kv_heads": values.whole("num_key_value_heads", heads),
        "ffn": values.choice("hidden_act", _GATES, "silu"),
        "ffn_dim": values.whole("intermediate_size"),
        "tie_embeddings": bool(values.values.get("tie_word_embeddings", False)),
        "norm_eps": float(values.number("rms_norm_eps", 1e-6)),
        "bias": _llama_bias(values, family),
        **_rope(values, context),
    }
    if heads and dim % heads == 0:
        values.must_be("head_dim", dim // heads, "the width over the number of heads")
    values.must_be("use_sliding_window", False, "layers of two kinds are not read")
    window = values.values.get("sliding_window") if family == "mistral" else None
    if window is not None:
        model["attention"] = {"kind": "windowed", "window": values.whole("sliding_window")}
    return model, context


def _llama_bias(values: Values, family: str) -> bool | str:
    if family == "qwen2":
        return "qkv"
    attention, rest = bool(values.values.get("attention_bias")), bool(values.values.get("mlp_bias"))
    if rest and not attention:
        values.refuse("mlp_bias", "must be false where attention_bias is: such a mixture is not read", True)
    return True if rest else "attention" if attention else False


def _rope(values: Values, context: int) -> dict[str, Any]:
    """transformers 5 keeps all of RoPE in ``rope_parameters``, earlier ones in ``rope_theta`` and ``rope_scaling``."""
    key = "rope_parameters" if values.values.get("rope_parameters") else "rope_scaling"
    given = values.values.get(key) or {}
    if not isinstance(given, dict):
        values.refuse(key, "must be a mapping", given)
        given = {}
    theta = given.get("rope_theta", values.values.get("rope_theta", 10000.0))
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        values.refuse("rope_theta", "must be a number greater than 0", theta)
        theta = 10000.0
    kind, factor = given.get("rope_type", given.get("type", "default")), given.get("factor", 1.0)
    share = given.get("partial_rotary_factor", values.values.get("partial_rotary_factor"))
    if share not in (None, 1.0):
        values.refuse("partial_rotary_factor", "must be 1.0: all channels of a head are turned", share)
    if kind not in ("default", "linear") or not isinstance(factor, (int, float)) or factor < 1:
        values.refuse(key, "must be of the type default or linear (ours stretches frequencies in other ways)", given)
        return {"rope_theta": float(theta)}
    if kind == "default":
        return {"rope_theta": float(theta)}
    original = max(1, round(context / factor))
    return {
        "rope_theta": float(theta),
        "rope_scaling": {"method": "linear", "factor": float(factor), "original_context": original},
    }


def _write_llama(family: str, config: ArchitectureConfig, context: int) -> dict[str, Any]:
    section = require(
        config,
        f"Hugging Face's {family}",
        {
            "norm": ("rmsnorm",),
            "position": ("rope",),
            "ffn": ("swiglu", "geglu", "reglu"),
            "bias": {"llama": (False, True, "attention"), "mistral": (False,), "qwen2": ("qkv",)}[family],
            "attention.kind": ("windowed",) if family == "mistral" else ("dense",),
        },
    )
    scaling = section.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": section.rope_theta}
    if scaling is not None:
        if scaling.method != "linear":
            rule = f"must be null or of the method linear for Hugging Face's {family}"
            raise CheckpointError(Problem("model.rope_scaling", rule, scaling.method))
        rope.update(rope_type="linear", factor=scaling.factor)
    acts = {ffn: act for act, ffn in reversed(_GATES.items())}
    values: dict[str, Any] = {
        "hidden_size": section.dim,
        "intermediate_size": section.hidden_dim,
        "num_hidden_layers": section.depth,
        "num_attention_heads": section.heads,
        "num_key_value_heads": section.num_kv_heads,
        "head_dim": section.head_dim,
        "hidden_act": acts[section.ffn],
        "max_position_embeddings": context,
        "rms_norm_eps": section.norm_eps,
        "rope_parameters": rope,
        "rope_theta": section.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": "linear", "factor": scaling.factor},
        "attention_dropout": 0.0,
    }
    if family == "llama":
        values |= {"attention_bias": bool(section.bias), "mlp_bias": section.bias is True}
    if family == "qwen2":
        values |= {"use_sliding_window": False}
    if family == "mistral":
        values |= {"sliding_window": section.attention.window}
    return values


def _llama_family(model_type: str, architecture: str) -> Family:
    return Family(
        model_type,
        architecture,
        "model.",
        _read_llama,
        lambda config, context: _write_llama(model_type, config, context),
        lambda config: llama_parts(config, _LLAMA_NAMES, halves=True),
        ("rotary_emb.inv_freq",),
    )


def _read_gpt2(values: Values) -> tuple[dict[str, Any], int]:
    dim, context = values.whole("n_embd", 768), values.whole("n_positions", 1024)
    values.must_be("scale_attn_weights", True, "scores are divided by the root of the head's width")
    values.must_be("scale_attn_by_inverse_layer_idx", False, "all layers scale alike")
    values.must_be("add_cross_attention", False, "there is no encoder")
    model = {
        "arch": "transformer",
        "vocab_size": values.whole("vocab_size", 50257),
        "dim": dim,
        "depth": values.whole("n_layer", 12),
        "heads": values.whole("n_head", 12),
        "ffn": values.choice("activation_function", _PLAIN, "gelu_new"),
        "ffn_dim": values.whole("n_inner", 4 * dim),
        "tie_embeddings": bool(values.values.get("tie_word_embeddings", True)),
        "norm": "layernorm",
        "norm_eps": float(values.number("layer_norm_epsilon", 1e-5)),
        "bias": True,
        "position": "learned",
        "max_positions": context,
    }
    return model, context


def _write_gpt2(config: ArchitectureConfig, context: int) -> dict[str, Any]:
    section = require(
        config,
        "Hugging Face's gpt2",
        {
            "norm": ("layernorm",),
            "position": ("learned",),
            "bias": (True,),
            "ffn": tuple(dict.fromkeys(_PLAIN.values())),
            "kv_heads": (None, getattr(config, "heads", None)),
        },
    )
    acts = {ffn: act for act, ffn in reversed(_PLAIN.items())}
    return {
        "n_embd": section.dim,
        "n_layer": section.depth,
        "n_head": section.heads,
        "n_inner": section.hidden_dim,
        "n_positions": section.longest_context,
        "activation_function": acts[section.ffn],
        "layer_norm_epsilon": section.norm_eps,
        "attn_pdrop": 0.0,
        "embd_pdrop": section.dropout,
        "resid_pdrop": section.dropout,
        "scale_attn_weights": True,
    }


def _gpt2_parts(config: TransformerConfig) -> list[Part]:
    dim, hidden, vocabulary = config.dim, config.hidden_dim, config.vocab_size or 0
    parts = [
        Part("embedding.weight", ("transformer.wte.weight",), (vocabulary,), dim),
        Part("position_embedding.weight", ("transformer.wpe.weight",), (config.longest_context or 0,), dim),
    ]

    def both(ours: str, theirs: str, rows: int, width: int | None) -> None:
        parts.append(Part(f"{ours}.weight", (f"{theirs}.weight",), (rows,), width, transposed=True))
        parts.append(Part(f"{ours}.bias", (f"{theirs}.bias",), (rows,)))

    for layer in range(config.depth):
        at, of = f"blocks.{layer}", f"transformer.h.{layer}"
        both(f"{at}.attention_norm", f"{of}.ln_1", dim, None)
        both(f"{at}.attention.qkv", f"{of}.attn.c_attn", 3 * dim, dim)
        both(f"{at}.attention.out", f"{of}.attn.c_proj", dim, dim)
        both(f"{at}.feed_forward_norm", f"{of}.ln_2", dim, None)
        both(f"{at}.feed_forward.up", f"{of}.mlp.c_fc", hidden, dim)
        both(f"{at}.feed_forward.down", f"{of}.mlp.c_proj", dim, hidden)
    both("norm", "transformer.ln_f", dim, None)
    if not config.tie_embeddings:
        parts.append(Part("head.weight", ("lm_head.weight",), (vocabulary,), dim))
    return parts


FAMILIES: dict[str, Family] = {
    "llama": _llama_family("llama", "LlamaForCausalLM"),
    "mistral": _llama_family("mistral", "MistralForCausalLM"),
    "qwen2": _llama_family("qwen2", "Qwen2ForCausalLM"),
    "gpt2": Family(
        "gpt2",
        "GPT2LMHeadModel",
        "transformer.",
        _read_gpt2,
        _write_gpt2,
        _gpt2_parts,
        (".attn.bias", ".attn.masked_bias"),
    ),
}
"""``model_type`` -> what it is."""
