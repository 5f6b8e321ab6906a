"""Every fusion against its definition, row by row in float64, with media of all sorts and none in one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from glowflow.core.architectures.multimodal import Multimodal
from glowflow.core.initialization import initialize
from glowflow.core.model import build_module
from tests.core.fusion_by_hand import ByHand
from tests.core.media_batches import media_batch, media_config, media_rows

CASES: dict[str, dict[str, Any]] = {
    "prefix": {"fusion": "prefix"},
    "prefix, resampled": {
        "fusion": "prefix",
        "image": {"encoder": "conv", "channels": [6, 8], "depth": 0, "tokens": 3},
    },
    "prefix, one modality": {"fusion": "prefix", "audio": None},
    "cross-attention": {"fusion": "cross_attention"},
    "cross-attention, latest, every second": {
        "fusion": "cross_attention",
        "depth": 3,
        "cross_attention": {"attends": "latest", "every": 2},
    },
    "bottleneck": {"fusion": "bottleneck"},
    "bottleneck from the second layer": {"fusion": "bottleneck", "bottleneck": {"tokens": 3, "from_layer": 1}},
    "late": {"fusion": "late", "late": {"hidden": 24}},
    "mixture": {"fusion": "mixture"},
}


def make(seed: int = 0, **model: Any) -> Multimodal:
    """A model in float64 whose gates are open and whose weights are large enough to matter."""
    module = build_module(media_config(init_std=0.2, **model), "cpu").double()
    assert isinstance(module, Multimodal)
    initialize(module, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("_gate", "missing")):
                parameter.normal_(0, 1, generator=generator)
    return module


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_gradients_are_those_of_the_definition(case: str) -> None:
    module = make(**CASES[case])
    rows, by_hand = media_rows(), ByHand(module)
    batch = media_batch(module.config, rows, blanks=1)
    output, carry = module(batch)
    assert carry is None
    want = torch.zeros((), dtype=torch.float64)
    for index, row in enumerate(rows):
        hidden_td = by_hand.hidden(row)
        length = int(batch.readout[index]) + 1
        assert len(hidden_td) == length
        torch.testing.assert_close(output.hidden[index, :length], hidden_td, rtol=1e-9, atol=1e-9)
        scores = hidden_td @ module.embedding.weight.T
        nll = F.cross_entropy(scores, batch.targets[index, :length], reduction="none")
        want = want + (nll * batch.loss_weights[index, :length]).sum()
    torch.testing.assert_close(output.loss_sum, want, rtol=1e-9, atol=0)
    assert output.weight_sum == batch.loss_weights.sum()
    parameters = dict(module.named_parameters())
    got = torch.autograd.grad(output.loss_sum, list(parameters.values()), allow_unused=True)
    wanted = torch.autograd.grad(want, list(parameters.values()), allow_unused=True)
    for name, mine, theirs in zip(parameters, got, wanted, strict=True):
        assert mine is not None, f"{name} has no gradient"
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", ["prefix", "cross-attention", "bottleneck from the second layer", "late", "mixture"])
def test_a_class_is_read_at_the_end_of_the_sample(case: str) -> None:
    module = make(**CASES[case], task="classification")
    rows, by_hand = media_rows(), ByHand(module)
    batch = media_batch(module.config, rows)
    batch.loss_weights[1] = 0.0  # a sample without a label
    output, _ = module(batch)
    want, right = torch.zeros((), dtype=torch.float64), 0
    for index, row in enumerate(rows):
        read_d = by_hand.bottleneck_streams(row)[1] if module.config.fusion == "bottleneck" else by_hand.hidden(row)[-1]
        torch.testing.assert_close(output.pooled[index], read_d, rtol=1e-9, atol=1e-9)
        scores, target = module.head.weight @ read_d, batch.targets[index, batch.readout[index]]
        if index != 1:
            want = want - scores.log_softmax(-1)[target]
            right += int(scores.argmax() == target)
    torch.testing.assert_close(output.loss_sum, want, rtol=1e-9, atol=0)
    assert (output.weight_sum, output.correct_sum) == (5, right)
    torch.testing.assert_close(module.logits(output.pooled[-1]), scores, rtol=1e-9, atol=1e-9)


def test_pairs_are_unit_vectors_of_towers_that_stay_apart() -> None:
    module = make(fusion="late", task="contrastive", image=None, embedding_dim=7)
    rows, by_hand = media_rows(), ByHand(module)
    batch = media_batch(module.config, rows)
    output, _ = module(batch)
    assert output.loss_sum is None
    for index, row in enumerate(rows):
        x_td = by_hand.p["embedding.weight"][by_hand.ids(row)]
        for layer in range(2):
            x_td = by_hand.block(x_td, layer)
        text = module.text_projection.weight @ by_hand.norm(x_td, "norm")[-1]
        medium = by_hand.norm(by_hand.lines(row)["audio"].mean(0), "fusion.norms.audio")
        medium = module.media_projection.weight @ medium
        torch.testing.assert_close(output.pairs[0][index], text / text.norm(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(output.pairs[1][index], medium / medium.norm(), rtol=1e-9, atol=1e-9)
    assert torch.equal(output.pair_weights, torch.ones(6))
    torch.testing.assert_close(output.logit_scale, torch.tensor(1 / 0.07, dtype=torch.float64))
    with torch.no_grad():
        module.logit_scale.fill_(9.0)
    output, _ = module(batch)
    torch.testing.assert_close(output.logit_scale, torch.tensor(100.0, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(output.logit_scale, module.logit_scale)
    assert gradient > 0  # it can come down again


@pytest.mark.parametrize("variant", [{}, {"norm_placement": "post"}, {"norm_placement": "sandwich"},
                                     {"parallel_block": True, "bias": True, "norm": "layernorm"},
                                     {"qk_norm": True, "kv_heads": 2, "ffn": "gelu"}], ids=str)  # fmt: skip
def test_a_mixture_of_equal_weights_is_the_plain_decoder(variant: dict[str, Any]) -> None:
    mixed, plain = make(fusion="mixture", **variant), make(fusion="prefix", **variant)
    state = plain.state_dict()
    for name in mixed.state_dict():
        state[name] = state[name.replace("twins.image.", "").replace("twins.audio.", "")]
    mixed.load_state_dict(state)
    batch = media_batch(mixed.config, media_rows())
    got, want = mixed(batch)[0], plain(batch)[0]
    torch.testing.assert_close(got.hidden, want.hidden, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.loss_sum, want.loss_sum, rtol=1e-12, atol=0)
