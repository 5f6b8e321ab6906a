"""The whole decoder: definition, masks, cache, precision, checkpointing, compilation, counts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from glowflow.config.errors import ConfigError
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.architectures.transformer import Transformer
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.batch import Batch
from glowflow.core.layers import head as head_module

Make = Callable[..., Transformer]
MakeBatch = Callable[..., Batch]


def by_hand(module: Transformer, tokens_bt: Tensor, mask_b1tt: Tensor) -> Tensor:
    """The architecture written a second time, in plain operations, from the parameters alone."""
    p, c = dict(module.named_parameters()), module.config

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + c.norm_eps) * weight

    def turn(x_bhtw: Tensor) -> Tensor:
        width, out = x_bhtw.shape[-1], torch.empty_like(x_bhtw)
        for i in range(width // 2):
            angle = torch.arange(x_bhtw.shape[2], dtype=x_bhtw.dtype) * c.rope_theta ** (-2 * i / width)
            a, b = x_bhtw[..., 2 * i], x_bhtw[..., 2 * i + 1]
            out[..., 2 * i] = a * angle.cos() - b * angle.sin()
            out[..., 2 * i + 1] = a * angle.sin() + b * angle.cos()
        return out

    x = p["embedding.weight"][tokens_bt]
    for layer in range(c.depth):
        at = f"blocks.{layer}."
        y = norm(x, p[at + "attention_norm.weight"]) @ p[at + "attention.qkv.weight"].T
        y = y.view(*y.shape[:2], -1, c.head_dim).transpose(1, 2)
        q, k, v = y.split((c.heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        if c.qk_norm:
            q, k = norm(q, p[at + "attention.q_norm.weight"]), norm(k, p[at + "attention.k_norm.weight"])
        k, v = (z.repeat_interleave(c.heads // c.num_kv_heads, 1) for z in (turn(k), v))
        scores = (turn(q) @ k.mT / c.head_dim**0.5).masked_fill(~mask_b1tt, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ p[at + "attention.out.weight"].T
        y = norm(x, p[at + "feed_forward_norm.weight"]) @ p[at + "feed_forward.gate_up.weight"].T
        gate, up = y.chunk(2, -1)
        x = x + (F.silu(gate) * up) @ p[at + "feed_forward.down.weight"].T
    output = p["embedding.weight"] if c.tie_embeddings else p["head.weight"]
    return norm(x, p["norm.weight"]) @ output.T


VARIANTS = [{}, {"kv_heads": 2, "tie_embeddings": False}, {"qk_norm": True, "kv_heads": 1}]


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "gqa-untied", "qk-norm"])
@pytest.mark.parametrize("documents", [False, True])
def test_forward_and_gradients_equal_the_model_by_hand(
    make_module: Make, make_batch: MakeBatch, variant: dict[str, object], documents: bool
) -> None:
    module, batch = make_module(init_std=0.3, **variant), make_batch(documents=documents)
    output, carry = module(batch)
    logits = by_hand(
        module,
        batch.tokens,
        Visibility(*[batch.tokens.shape[1]] * 2, batch.tokens.device, documents=batch.document_ids).mask(
            AttentionSpec()
        ),
    )
    assert carry is None
    torch.testing.assert_close(module.logits(output.hidden), logits, rtol=1e-9, atol=1e-10)
    nll = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    want = (nll * batch.loss_weights.flatten()).sum()
    torch.testing.assert_close(output.loss_sum, want, rtol=1e-10, atol=0)
    assert output.weight_sum == batch.loss_weights.sum()
    parameters = list(module.parameters())
    for a, b in zip(
        torch.autograd.grad(output.loss_sum, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_a_later_token_changes_nothing_earlier(make_module: Make, make_batch: MakeBatch) -> None:
    module, batch = make_module(torch.float32), make_batch()
    before = module(batch, compute_loss=False)[0]
    assert before.loss_sum is None
    batch.tokens[:, 6] = (batch.tokens[:, 6] + 1) % 37
    after = module(batch, compute_loss=False)[0]
    assert torch.equal(before.hidden[:, :6], after.hidden[:, :6])
    assert (before.hidden[:, 6:] - after.hidden[:, 6:]).abs().amin(dim=(0, 2)).min() >= 0
    assert not torch.allclose(before.hidden[:, 6], after.hidden[:, 6])


def test_documents_of_a_row_do_not_see_each_other(make_module: Make, make_batch: MakeBatch) -> None:
    module, batch = make_module(), make_batch(rows=1, length=9)
    batch.document_ids = torch.tensor([[4, 4, 4, 4, 9, 9, 9, 9, 9]])
    batch.single_document = False
    packed = module(batch, compute_loss=False)[0].hidden
    alone = make_batch(rows=1, length=9)
    alone.tokens = batch.tokens[:, 4:]
    torch.testing.assert_close(packed[:, 4:], module(alone, compute_loss=False)[0].hidden)


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "gqa-untied", "qk-norm"])
def test_stepwise_decoding_equals_the_full_forward(
    make_module: Make, make_batch: MakeBatch, variant: dict[str, object]
) -> None:
    module, batch = make_module(**variant), make_batch(length=11)
    full = module.logits(module(batch, compute_loss=False)[0].hidden)
    cache = module.new_cache(3, 11, dtype=torch.float64)
    with torch.no_grad():
        steps = [module.decode(part, cache) for part in batch.tokens.split((4, 1, 1, 3, 1, 1), dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-10, atol=1e-11)
    with pytest.raises(ConfigError, match="holds 11 positions"):
        module.decode(batch.tokens[:, :1], cache)


def test_decode_last_only_gives_the_last_position(make_module: Make, make_batch: MakeBatch) -> None:
    module, tokens = make_module(), make_batch().tokens
    every = module.decode(tokens, module.new_cache(3, 11, dtype=torch.float64))
    last = module.decode(tokens, module.new_cache(3, 11, dtype=torch.float64), last_only=True)
    torch.testing.assert_close(last, every[:, -1:])


def test_dropout_follows_the_global_generator(make_module: Make, make_batch: MakeBatch) -> None:
    module, batch = make_module(dropout=0.2), make_batch()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return module(batch)[0].loss_sum.item()

    assert loss(1) == loss(1) != loss(2)
    module.eval()
    assert loss(1) == loss(2)


def test_activation_checkpointing_keeps_gradients(make_module: Make, make_batch: MakeBatch) -> None:
    module, batch = make_module(dropout=0.1), make_batch(documents=True)
    torch.manual_seed(4)
    module(batch)[0].loss_sum.backward()
    want = [p.grad for p in module.parameters()]
    module.zero_grad()
    for block in module.shard_units():
        block.forward = lambda *a, inner=block.forward: checkpoint(inner, *a, use_reentrant=False)
    torch.manual_seed(4)
    module(batch)[0].loss_sum.backward()
    for parameter, gradient in zip(module.parameters(), want, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_bf16_autocast_is_near_fp32(make_module: Make, make_batch: MakeBatch) -> None:
    module, batch = make_module(torch.float32, init_std=0.1), make_batch()
    want = module(batch)[0].loss_sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(batch)[0].loss_sum
    got.backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.02, atol=0)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_whole_model_in_bf16_runs(make_module: Make, make_batch: MakeBatch) -> None:
    module, batch = make_module(torch.bfloat16), make_batch(documents=True)
    output, _ = module(batch)
    output.loss_sum.backward()
    assert output.hidden.dtype == torch.bfloat16
    assert output.loss_sum.dtype == torch.float32


def test_compiled_graph_is_whole_and_equal(make_module: Make, make_batch: MakeBatch) -> None:
    module, batch = make_module(), make_batch(documents=True)
    want = module(batch)[0].loss_sum
    want_gradients = torch.autograd.grad(want, list(module.parameters()))
    compiled = copy.deepcopy(module)
    for block in compiled.shard_units():
        block.compile(backend="aot_eager", fullgraph=True)
    got = compiled(batch)[0].loss_sum
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, list(compiled.parameters())), want_gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_chunked_loss_inside_the_model(
    make_module: Make, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch = make_module(), make_batch()
    parameters = list(module.parameters())
    want = module(batch)[0].loss_sum
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 150)
    got = module(batch)[0].loss_sum
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_parameters_and_flops_are_counted(make_module: Make) -> None:
    tied, untied = make_module(), make_module(tie_embeddings=False)
    block = 32 * 96 + 32 * 32 + 32 * 80 + 40 * 32 + 2 * 32
    assert tied.num_parameters() == 2 * block + 32 + 37 * 32
    assert untied.num_parameters() == tied.num_parameters() + 37 * 32
    assert untied.num_embedding_parameters() == 37 * 32
    assert tied.num_embedding_parameters() == 0
    want = 6 * tied.num_parameters() + 12 * 2 * 32 * 16
    assert tied.flops_per_token(16) == untied.flops_per_token(16) == want


def test_vocabulary_must_be_known(make_config: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        Transformer(make_config(vocab_size=None).model)  # type: ignore[attr-defined]


def test_base_says_what_is_missing(make_module: Make, make_batch: MakeBatch) -> None:
    base = BaseArchitecture(make_module().config)
    assert base.shard_units() == []
    for call in (lambda: base(make_batch()), lambda: base.flops_per_token(4), lambda: base.new_cache(1, 1)):
        with pytest.raises(NotImplementedError, match="BaseArchitecture does not implement"):
            call()
