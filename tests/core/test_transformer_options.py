"""Every option of the decoder against a second writing of it in plain operations, in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from glowflow.config.errors import ConfigError
from glowflow.config.loader import load_config
from glowflow.core.architectures.base import InitSpec
from glowflow.core.architectures.transformer import Transformer
from glowflow.core.batch import Batch
from glowflow.core.layers import head as head_module

Make = Callable[..., Transformer]
MakeBatch = Callable[..., Batch]

MOE = {"experts": 4, "active": 2, "ffn_dim": 24}
SCALING = {"factor": 4.0, "original_context": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "post": {"norm_placement": "post"},
    "sandwich": {"norm_placement": "sandwich"},
    "parallel": {"parallel_block": True},
    "parallel-sandwich": {"parallel_block": True, "norm_placement": "sandwich"},
    "geglu": {"ffn": "geglu"},
    "reglu": {"ffn": "reglu"},
    "gelu": {"ffn": "gelu"},
    "relu": {"ffn": "relu", "ffn_dim": None},
    "gelu-tanh": {"ffn": "gelu_tanh"},
    "layernorm-sandwich": {"norm": "layernorm", "norm_placement": "sandwich"},
    "layernorm-post-bias": {"norm": "layernorm", "norm_placement": "post", "bias": True},
    "bias": {"bias": True, "kv_heads": 2, "qk_norm": True},
    "bias-attention": {"bias": "attention", "kv_heads": 1},
    "bias-qkv": {"bias": "qkv", "moe": MOE},
    "learned": {"position": "learned", "max_positions": 16},
    "gpt2": {"norm": "layernorm", "bias": True, "position": "learned", "max_positions": 16, "ffn": "gelu_tanh"},
    "moe": {"moe": MOE},
    "moe-shared-sandwich": {"moe": {**MOE, "shared": 1, "every": 2}, "norm_placement": "sandwich", "ffn": "gelu"},
    "moe-parallel": {"moe": {**MOE, "active": 1}, "parallel_block": True},
    "alibi": {"position": "alibi", "kv_heads": 2},
    "no-position": {"position": "none"},
    "rope-linear": {"rope_scaling": {"method": "linear", **SCALING}},
    "rope-ntk": {"rope_scaling": {"method": "ntk", **SCALING}},
    "rope-yarn": {"rope_scaling": {"method": "yarn", **SCALING}},
    "yarn-qk-norm": {"rope_scaling": {"method": "yarn", **SCALING}, "qk_norm": True, "kv_heads": 1},
    "logit-softcap": {"logit_softcap": 1.5, "tie_embeddings": False},
    "score-softcap": {"attention": {"softcap": 0.7}},
}
variants = pytest.mark.parametrize("variant", OPTIONS.values(), ids=list(OPTIONS))


class ByHand:
    """The architecture, written from the papers and the parameters' names; no layer of ours is called."""

    def __init__(self, module: Transformer, weights_bt: Tensor) -> None:
        self.c = module.config
        self.p = dict(module.named_parameters())
        self.weights_bt = weights_bt
        self.aux = torch.zeros((), dtype=torch.float64)

    def logits(self, tokens_bt: Tensor) -> Tensor:
        x = self.p["embedding.weight"][tokens_bt]
        if self.c.position == "learned":
            x = x + self.p["position_embedding.weight"][: tokens_bt.shape[1]]
        for layer in range(self.c.depth):
            x = self.block(x, layer)
        if self.c.norm_placement != "post":
            x = self.norm(x, "norm")
        scores = x @ self.p["embedding.weight" if self.c.tie_embeddings else "head.weight"].T
        cap = self.c.logit_softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.c.norm == "rmsnorm" or name.endswith(("q_norm", "k_norm")):
            return x / (x.square().mean(-1, keepdim=True) + self.c.norm_eps).sqrt() * self.p[name + ".weight"]
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.c.norm_eps).sqrt() * self.p[name + ".weight"]
        return x + self.p.get(name + ".bias", 0.0)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.p[name + ".weight"].T + self.p.get(name + ".bias", 0.0)

    def block(self, x: Tensor, layer: int) -> Tensor:
        at, placement = f"blocks.{layer}.", self.c.norm_placement
        attend, feed = (lambda y: self.attention(y, at)), (lambda y: self.feed_forward(y, at, layer))
        first, second = at + "attention_norm", at + "feed_forward_norm"
        first_out, second_out = at + "attention_out_norm", at + "feed_forward_out_norm"
        if self.c.parallel_block and placement == "sandwich":
            y = self.norm(x, first)
            return x + self.norm(attend(y), first_out) + self.norm(feed(y), second_out)
        if self.c.parallel_block:
            return x + attend(self.norm(x, first)) + feed(self.norm(x, first))
        if placement == "post":
            x = self.norm(x + attend(x), first)
            return self.norm(x + feed(x), second)
        if placement == "sandwich":
            x = x + self.norm(attend(self.norm(x, first)), first_out)
            return x + self.norm(feed(self.norm(x, second)), second_out)
        x = x + attend(self.norm(x, first))
        return x + feed(self.norm(x, second))

    def attention(self, x: Tensor, at: str) -> Tensor:
        c, length = self.c, x.shape[1]
        qkv = self.linear(x, at + "attention.qkv").view(*x.shape[:2], -1, c.head_dim).transpose(1, 2)
        q, k, v = qkv.split((c.heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        if c.qk_norm:
            q, k = self.norm(q, at + "attention.q_norm"), self.norm(k, at + "attention.k_norm")
        if c.position == "rope":
            q, k = self.turn(q), self.turn(k)
        k, v = (z.repeat_interleave(c.heads // c.num_kv_heads, 1) for z in (k, v))
        scores = q @ k.mT / (math.sqrt(c.head_dim) * self.temperature())
        if c.attention.softcap is not None:
            scores = c.attention.softcap * torch.tanh(scores / c.attention.softcap)
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        if c.position == "alibi":
            slopes = torch.tensor([2.0 ** (-8 * (h + 1) / c.heads) for h in range(c.heads)], dtype=torch.float64)
            scores = scores - slopes[:, None, None] * (i - j)
        weights = scores.masked_fill(j > i, -torch.inf).softmax(-1)
        return self.linear((weights @ v).transpose(1, 2).flatten(2), at + "attention.out")

    def temperature(self) -> float:
        """t of YaRN: sqrt(1 / t) = 0.1 ln s + 1."""
        scaling = self.c.rope_scaling
        if scaling is None or scaling.method != "yarn":
            return 1.0
        return 1 / (0.1 * math.log(scaling.factor) + 1) ** 2

    def turn(self, x_bhtw: Tensor) -> Tensor:
        width, out = x_bhtw.shape[-1], torch.empty_like(x_bhtw)
        for i in range(width // 2):
            angle = torch.arange(x_bhtw.shape[2], dtype=x_bhtw.dtype) * self.frequency(i, width)
            a, b = x_bhtw[..., 2 * i], x_bhtw[..., 2 * i + 1]
            out[..., 2 * i] = a * angle.cos() - b * angle.sin()
            out[..., 2 * i + 1] = a * angle.sin() + b * angle.cos()
        return out

    def frequency(self, i: int, width: int) -> float:
        base, scaling = self.c.rope_theta, self.c.rope_scaling
        theta = base ** (-2 * i / width)
        if scaling is None:
            return theta
        s = scaling.factor
        if scaling.method == "linear":
            return theta / s
        if scaling.method == "ntk":
            return (base * s ** (width / (width - 2))) ** (-2 * i / width)
        wavelength = 2 * math.pi / theta
        ratio = scaling.original_context / wavelength
        gamma = 0.0 if ratio < 1 else 1.0 if ratio > 32 else (ratio - 1) / 31
        return (1 - gamma) * theta / s + gamma * theta

    def activated(self, hidden: Tensor) -> Tensor:
        if self.c.ffn == "gelu_tanh":
            return 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        act = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu, "gelu": F.gelu, "relu": F.relu}[self.c.ffn]
        if self.c.ffn.endswith("glu"):
            gate, up = hidden.chunk(2, -1)
            return act(gate) * up
        return act(hidden)

    def plain(self, x: Tensor, first: Tensor, down: Tensor) -> Tensor:
        return self.activated(x @ first.T) @ down.T

    def feed_forward(self, x: Tensor, at: str, layer: int) -> Tensor:
        at, first = at + "feed_forward.", "gate_up.weight" if self.c.ffn.endswith("glu") else "up.weight"
        if at + "router.weight" not in self.p:
            hidden = self.activated(self.linear(x, at + first.removesuffix(".weight")))
            return self.linear(hidden, at + "down")
        moe = self.c.moe
        affinity = torch.sigmoid(x @ self.p[at + "router.weight"].T)
        chosen = torch.zeros_like(affinity).scatter(-1, affinity.topk(moe.active, -1).indices, 1.0)
        gates = affinity * chosen
        if moe.active > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        up, down = self.p[at + "up.weight"], self.p[at + "down.weight"]
        y = sum(gates[..., e, None] * self.plain(x, up[e], down[e]) for e in range(moe.experts))
        if moe.shared:
            y = y + self.plain(x, self.p[at + "shared." + first], self.p[at + "shared.down.weight"])
        share = affinity / affinity.sum(-1, keepdim=True)
        balance_b = moe.balance * moe.experts / moe.active * (chosen.mean(1) * share.mean(1)).sum(-1)
        self.aux = self.aux + (balance_b * self.weights_bt.sum(1)).sum()
        return y


def with_biases(module: Transformer) -> Transformer:
    """The same with biases that are not zeros, and gains that are not ones."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


@variants
def test_loss_auxiliary_loss_and_gradients_equal_the_model_by_hand(
    make_module: Make, make_batch: MakeBatch, variant: dict[str, Any]
) -> None:
    module, batch = with_biases(make_module(init_std=0.3, **variant)), make_batch()
    output, _ = module(batch)
    hand = ByHand(module, batch.loss_weights)
    logits = hand.logits(batch.tokens)
    torch.testing.assert_close(module.logits(output.hidden), logits, rtol=1e-12, atol=1e-12)
    nll = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    want = (nll * batch.loss_weights.flatten()).sum()
    torch.testing.assert_close(output.loss_sum, want, rtol=1e-12, atol=0)
    assert (output.aux_sum is None) == (module.config.moe is None)
    if output.aux_sum is not None:
        torch.testing.assert_close(output.aux_sum, hand.aux, rtol=1e-12, atol=0)
        want = want + hand.aux
    parameters = list(module.parameters())
    ours = torch.autograd.grad(output.objective, parameters)
    for a, b in zip(ours, torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.abs().max()) + 1e-12)


@variants
def test_stepwise_decoding_equals_the_full_forward(
    make_module: Make, make_batch: MakeBatch, variant: dict[str, Any]
) -> None:
    module, batch = with_biases(make_module(init_std=0.3, **variant)), make_batch(length=11)
    with torch.no_grad():
        full = module.logits(module(batch, compute_loss=False)[0].hidden)
        cache = module.new_cache(3, 11, dtype=torch.float64)
        steps = [module.decode(part, cache) for part in batch.tokens.split((4, 1, 1, 3, 1, 1), dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-12, atol=1e-12)


@variants
def test_a_later_token_changes_nothing_earlier(
    make_module: Make, make_batch: MakeBatch, variant: dict[str, Any]
) -> None:
    module, batch = make_module(init_std=0.3, **variant), make_batch()
    before = module(batch, compute_loss=False)[0].hidden
    batch.tokens[:, 6] = (batch.tokens[:, 6] + 1) % 37
    after = module(batch, compute_loss=False)[0].hidden
    # A later token changes how many rows an expert multiplies at once, and so how each product is rounded.
    tolerance = 1e-13 if module.config.moe else 0.0
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=tolerance, atol=tolerance)
    assert not torch.allclose(before[:, 6], after[:, 6])


@pytest.mark.parametrize("name", ["moe-shared-sandwich", "post", "gpt2"])
def test_documents_of_a_row_do_not_see_each_other(make_module: Make, make_batch: MakeBatch, name: str) -> None:
    module, batch = make_module(**OPTIONS[name]), make_batch(rows=1, length=9)
    batch.document_ids, batch.single_document = torch.tensor([[4, 4, 4, 4, 9, 9, 9, 9, 9]]), False
    # The first document goes on from the sequence before, as in a lane.
    batch.positions = torch.tensor([[100, 101, 102, 103, 0, 1, 2, 3, 4]])
    alone = make_batch(rows=1, length=5)
    alone.tokens = batch.tokens[:, 4:]
    packed = module(batch, compute_loss=False)[0].hidden[:, 4:]
    torch.testing.assert_close(packed, module(alone, compute_loss=False)[0].hidden, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "variant", [OPTIONS["moe-shared-sandwich"], OPTIONS["moe-parallel"]], ids=["sandwich", "parallel"]
)
def test_checkpointing_keeps_gradients_of_loss_and_balance(
    make_module: Make, make_batch: MakeBatch, variant: dict[str, Any]
) -> None:
    module, batch = make_module(torch.float32, dropout=0.1, **variant), make_batch(documents=True)
    torch.manual_seed(4)
    module(batch)[0].objective.backward()
    want = [p.grad for p in module.parameters()]
    module.zero_grad()
    for block in module.shard_units():
        block.forward = lambda *a, inner=block.forward: checkpoint(inner, *a, use_reentrant=False)
    torch.manual_seed(4)
    module(batch)[0].objective.backward()
    for parameter, gradient in zip(module.parameters(), want, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize(
    "name", ["post", "geglu", "moe-shared-sandwich", "moe-parallel", "alibi", "logit-softcap", "gpt2"]
)
def test_bf16_autocast_is_near_fp32(make_module: Make, make_batch: MakeBatch, name: str) -> None:
    module, batch = make_module(torch.float32, init_std=0.1, **OPTIONS[name]), make_batch()
    want = module(batch)[0].loss_sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = module(batch)
    output.objective.backward()
    torch.testing.assert_close(output.loss_sum, want, rtol=0.02, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_a_sequence_without_weight_adds_nothing_to_the_auxiliary_loss(make_module: Make, make_batch: MakeBatch) -> None:
    module, batch = make_module(moe=MOE), make_batch(rows=2)
    both = module(batch)[0].aux_sum
    assert both is not None
    batch.loss_weights[1] = 0.0
    first = module(batch)[0].aux_sum
    batch.loss_weights[0] = 0.0
    assert 0 < first < both
    assert module(batch)[0].aux_sum == 0


def test_the_loss_in_chunks_caps_logits_too(
    make_module: Make, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch = make_module(logit_softcap=2.0, init_std=0.3), make_batch()
    parameters = list(module.parameters())
    want = module(batch)[0].loss_sum
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 150)
    got = module(batch)[0].loss_sum
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_every_nth_layer_is_a_mixture_the_last_one_among_them(make_module: Make) -> None:
    module = make_module(depth=5, moe={**MOE, "every": 2})
    mixtures = {name.split(".")[1] for name, _ in module.named_parameters() if "router" in name}
    assert mixtures == {"0", "2", "4"}


def test_only_active_experts_count_for_flops(make_module: Make) -> None:
    dense, mixture = make_module(), make_module(moe={"experts": 8, "active": 2, "shared": 1, "ffn_dim": 40})
    per_layer = 32 * 80 + 40 * 32
    assert mixture.num_parameters() == dense.num_parameters() + 2 * (8 * per_layer + 8 * 32)
    assert mixture.flops_per_token(16) == dense.flops_per_token(16) + 6 * 2 * (2 * per_layer + 8 * 32)


def test_projections_into_the_residual_stream_start_smaller(make_module: Make) -> None:
    module = make_module(moe={**MOE, "shared": 1, "every": 2}, depth=3, norm_placement="sandwich")
    small = {n for n, _ in module.named_parameters() if module.init_spec(n).std == 0.02 / math.sqrt(6)}
    down = {f"blocks.{i}.feed_forward.down.weight" for i in range(3)}
    shared = {f"blocks.{i}.feed_forward.shared.down.weight" for i in (0, 2)}
    assert small == {f"blocks.{i}.attention.out.weight" for i in range(3)} | down | shared
    ones = {n for n, _ in module.named_parameters() if module.init_spec(n).kind == "ones"}
    assert len(ones) == 3 * 4 + 1
    assert module.init_spec("blocks.0.feed_forward.router.weight").std == 0.02


def test_the_attention_module_is_asked_first_how_its_parameters_start(make_module: Make) -> None:
    module = make_module()
    asked: list[str] = []
    answer = module.init_spec("norm.weight")

    def told(name: str) -> InitSpec | None:
        asked.append(name)
        return answer if name == "qkv.weight" else None

    module.blocks[1].attention.init_spec = told
    assert module.init_spec("blocks.1.attention.qkv.weight") is answer
    assert module.init_spec("blocks.1.attention.out.weight").kind == "normal"
    assert module.init_spec("blocks.0.attention.qkv.weight").kind == "normal"
    assert asked == ["qkv.weight", "out.weight"]


def test_layers_of_different_kinds_in_one_model(make_module: Make, make_batch: MakeBatch) -> None:
    attention = {
        "kind": "adaptive", "window": 3, "adaptive": {"policy": "pattern", "pattern": "WDS"},
        "sparse": {"local": 2, "stride": 3},
    }  # fmt: skip
    module = make_module(depth=4, attention=attention)
    kinds = [module.attention_specs(layer, 11)[0].kind for layer in range(4)]
    assert kinds == ["windowed", "dense", "sparse", "windowed"]
    test_stepwise_decoding_equals_the_full_forward(make_module, make_batch, {"depth": 4, "attention": attention})
    want = 6 * module.num_parameters() + 12 * 32 * (3 + 11 + 3)
    assert module.flops_per_token(11) > want  # and the sparse layer's share


def test_positions_that_nobody_turns_need_no_tables_and_no_even_heads(make_module: Make) -> None:
    odd = make_module(dim=20, heads=4, position="alibi")
    assert odd.config.head_dim == 5 and odd.rotary is None
    assert make_module().rotary is not None


def test_what_gpt2_adds_starts_neutral_and_counts(make_module: Make) -> None:
    module, plain = make_module(**OPTIONS["gpt2"]), make_module(ffn="gelu", position="none")
    kinds = {kind: {n for n, _ in module.named_parameters() if module.init_spec(n).kind == kind} for kind in ("zeros",)}
    biases = {n for n, p in module.named_parameters() if n.endswith(".bias")}
    assert kinds["zeros"] == biases and len(biases) == 2 * 6 + 1
    assert all(not module.get_parameter(name).any() for name in biases)
    assert module.init_spec("position_embedding.weight") == InitSpec("normal", 0.02)
    assert module.parameter_role("position_embedding.weight").kind == "embedding"
    assert {module.parameter_role(name).kind for name in biases} == {"vector"}
    sizes = 2 * (96 + 32 + 40 + 32 + 2 * 32) + 32
    assert module.num_parameters() == plain.num_parameters() + 16 * 32 + sizes
    # The table is looked up like an untied embedding: it is never multiplied.
    assert module.num_embedding_parameters() == 16 * 32
    assert module.flops_per_token(16) == plain.flops_per_token(16) + 6 * sizes


def test_learned_positions_end_where_their_table_ends(make_module: Make, make_batch: MakeBatch) -> None:
    module = make_module(position="learned", max_positions=16)
    with pytest.raises(ConfigError, match=r"data.context: must be at most model.max_positions \(16\) \(got 17\)"):
        module(make_batch(length=17))
    cache = module.new_cache(1, 32, dtype=torch.float64)
    module.decode(torch.zeros(1, 16, dtype=torch.int64), cache)
    with pytest.raises(ConfigError, match="max_positions"):
        module.decode(torch.zeros(1, 1, dtype=torch.int64), cache)


@pytest.mark.parametrize(
    ("model", "context", "message"),
    [
        ({"position": "learned"}, 1025, "data.context: must be at most 1024"),
        ({"position": "learned", "max_positions": 8}, 9, "data.context: must be at most 8"),
        ({"max_positions": 8}, 8, "model.max_positions: has no effect with position rope"),
        ({"bias": True, "moe": {"experts": 2}}, 8, "model.bias: cannot be true with model.moe"),
        ({"bias": "qkv", "attention": {"kind": "linear"}}, 8, "model.bias: has no effect on layers of linear"),
        ({"arch": "transformer-xl", "bias": True}, 8, "model.bias: must be false"),
        ({"bias": "out"}, 8, "model.bias"),
    ],
)
def test_what_does_not_go_together_is_refused(model: dict[str, Any], context: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config({"model": model, "data": {"context": context}})
