"""Muon: Newton-Schulz by hand and by SVD, steps by hand and against torch's, what is a matrix, stacks, shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import _muon as torch_muon

from glowflow.config.errors import ConfigError
from glowflow.config.loader import load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import BaseArchitecture, ParameterRole
from glowflow.core.layers.feed_forward import ACTIVATIONS, GatedFeedForward
from glowflow.core.model import GlowFlowModel, build_module
from glowflow.core.optim import build_optimizer
from glowflow.core.optim import muon as muon_module
from glowflow.core.optim.groups import matrix_groups, parameters_with_roles
from glowflow.core.optim.muon import Muon
from glowflow.core.optim.newton_schulz import COEFFICIENTS, zeropower
from glowflow.core.sharding import local_part, part_of, whole
from tests.core.orthogonal import by_svd
from tests.training.distributed import run_workers


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# -- Newton-Schulz ----------------------------------------------------------------------------------------------------


def written_out(g: np.ndarray, steps: int = 5) -> np.ndarray:
    """Of a matrix that is not taller than wide."""
    x = g / np.sqrt((g * g).sum())
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_a_step_of_newton_schulz_by_hand() -> None:
    """diag(3, 4) has norm 5; 0.6 becomes 3.4445 x 0.6 - 4.775 x 0.216 + 2.0315 x 0.07776, 0.8 likewise."""
    once = zeropower(torch.tensor([[3.0, 0.0], [0.0, -4.0]], dtype=torch.float64), steps=1)
    want = torch.tensor([[1.19326944, 0.0], [0.0, -0.97648192]], dtype=torch.float64)
    torch.testing.assert_close(once, want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (8, 8), (5, 40), (40, 5), (1, 6), (2, 3, 7, 4)])
def test_newton_schulz_does_to_singular_values_what_it_should(shape: tuple[int, ...]) -> None:
    x = drawn(*shape)
    want = torch.stack([by_svd(matrix) for matrix in x.reshape(-1, *shape[-2:])]).view(shape)
    torch.testing.assert_close(zeropower(x), want, rtol=0, atol=1e-13)
    torch.testing.assert_close(zeropower(x.float()).double(), want, rtol=0, atol=1e-5)
    assert zeropower(x).is_contiguous()


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (48, 64)])
def test_in_bf16_a_batch_is_to_the_bit_what_torch_makes_of_each_matrix(shape: tuple[int, int]) -> None:
    x = drawn(3, *shape, dtype=torch.float32)
    theirs = [torch_muon._zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, 1e-7) for matrix in x]
    assert torch.equal(zeropower(x.bfloat16()), torch.stack(theirs))


def test_singular_values_end_near_one_and_nothing_stays_nothing() -> None:
    values = torch.linalg.svdvals(zeropower(drawn(16, 64)))
    assert 0.6 < values.min() and values.max() < 1.25
    assert torch.equal(zeropower(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    assert zeropower(torch.zeros(0, 3, 4)).shape == (0, 3, 4)


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
def test_two_steps_by_hand(nesterov: bool) -> None:
    """lr 0.1, wd 0.5, momentum 0.9, a matrix (2, 3): the factor is 0.2 sqrt(3)."""
    theta, m = np.array([[1.0, 0.0, 2.0], [-1.0, 0.5, 0.0]]), np.zeros((2, 3))
    parameter = nn.Parameter(torch.from_numpy(theta))
    optimizer = Muon([parameter], lr=0.1, weight_decay=0.5, momentum=0.9, nesterov=nesterov)
    for g in (np.array([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]), np.array([[0.2, 0.0, -1.0], [2.0, 0.1, 0.0]])):
        m = 0.9 * m + 0.1 * g
        ahead = 0.9 * m + 0.1 * g if nesterov else m
        theta = 0.95 * theta - 0.1 * 0.2 * np.sqrt(3) * written_out(ahead)
        parameter.grad = torch.from_numpy(g)
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), torch.from_numpy(theta), rtol=0, atol=1e-14)
    assert optimizer.state[parameter].keys() == {"momentum_buffer"}
    torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], torch.from_numpy(m), rtol=0, atol=1e-15)


SHAPES = [(9, 7), (7, 9), (6, 6), (5,), (20, 4)]
ADAMW = [False, False, False, True, True]


def fifty_steps(dtype: torch.dtype, nesterov: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    start = [drawn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
    mine, yours = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    matrices, others = ([[p for p, a in zip(x, ADAMW, strict=True) if a is rest] for x in (mine, yours)] for rest in
                        (False, True))  # fmt: skip
    one = Muon(
        [{"params": matrices[0], "weight_decay": 0.3}, {"params": others[0], "rule": "adamw", "weight_decay": 0.1}],
        lr=0.01, momentum=0.9, nesterov=nesterov, betas=(0.8, 0.9), eps=1e-7,
    )  # fmt: skip
    muon: dict[str, Any] = {
        "momentum": 0.9,
        "nesterov": nesterov,
        "weight_decay": 0.3,
        "adjust_lr_fn": "match_rms_adamw",
    }
    several = [
        torch.optim.Muon(matrices[1], lr=0.01, **muon),
        torch.optim.AdamW(others[1], lr=0.01, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1),
    ]
    for step in range(50):
        for i, (a, b) in enumerate(zip(mine, yours, strict=True)):
            a.grad = drawn(*a.shape, seed=1000 + 10 * step + i, dtype=dtype)
            b.grad = a.grad.clone()
        for optimizer in (one, *several):
            optimizer.step()
    assert not any(torch.allclose(p, x, rtol=0.01) for p, x in zip(mine, start, strict=True))
    return mine, yours


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_fifty_steps_are_torchs_where_it_orthogonalises_as_precisely(
    dtype: torch.dtype, tolerance: float, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch casts to bf16 whatever it is given: here its matrices go through an SVD instead."""
    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", lambda x, *_: by_svd(x))
    for a, b in zip(*fifty_steps(dtype, nesterov), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_fifty_steps_are_torchs_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon_module, "working_dtype", lambda _: torch.bfloat16)
    for a, b in zip(*fifty_steps(torch.float32, True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_how_many_are_orthogonalised_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for together in (1, 100, 10**6):
        monkeypatch.setattr(muon_module, "_TOGETHER", together)
        params = [nn.Parameter(drawn(*shape, seed=i)) for i, shape in enumerate([(6, 4), (4, 6), (6, 4), (20, 30)])]
        optimizer = Muon(params, lr=0.1)
        for parameter in params:
            parameter.grad = drawn(*parameter.shape, seed=7)
        optimizer.step()
        results.append([p.detach() for p in params])
    for a, b, c in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-14)


def test_a_vector_is_no_matter_for_muon() -> None:
    with pytest.raises(ValueError, match="for matrices"):
        Muon(nn.Linear(3, 2).parameters())


# -- matrices that are stacked ----------------------------------------------------------------------------------------


def step_of(shape: tuple[int, ...], layout: Any, g: Tensor) -> Tensor:
    """The first change of a parameter of zeros."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    parameter.grad = g.clone()
    group = {"params": [parameter]} if layout is None else {"params": [parameter], "matrices": [layout]}
    Muon([group], lr=1.0).step()
    return parameter.detach()


def test_the_update_of_a_stack_is_that_of_its_parts() -> None:
    g = drawn(14, 6)
    parts = [step_of((rows, 6), None, part) for rows, part in zip((8, 3, 3), g.split((8, 3, 3)), strict=True)]
    stacked = step_of((14, 6), ((8, 3, 3), 6), g)
    torch.testing.assert_close(stacked, torch.cat(parts), rtol=0, atol=1e-14)
    assert not torch.allclose(stacked, step_of((14, 6), None, g), atol=0.01)


def test_a_step_is_as_large_as_adamws_whatever_the_shape() -> None:
    for shape in ((40, 40), (20, 160), (160, 20)):
        assert step_of(shape, None, drawn(*shape)).square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_the_update_of_experts_is_that_of_each() -> None:
    g = drawn(3, 10, 6)
    experts = step_of((3, 10, 6), ((5, 5), 6), g)
    for expert, gradient in zip(experts, g, strict=True):
        halves = [step_of((5, 6), None, half) for half in gradient.chunk(2)]
        torch.testing.assert_close(expert, torch.cat(halves), rtol=0, atol=1e-14)


def test_a_convolution_is_one_matrix_of_filters() -> None:
    class Net(BaseArchitecture):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.conv = nn.Conv1d(4, 6, 3)

    ((matrices,), (vectors,)) = matrix_groups(Net(), 0.1, width_exponent=0.5)
    assert matrices["matrices"] == [((6,), 12)] and len(vectors["params"]) == 1
    g = drawn(6, 4, 3)
    torch.testing.assert_close(
        step_of((6, 4, 3), ((6,), 12), g), step_of((6, 12), None, g.flatten(1)).view(6, 4, 3), rtol=0, atol=1e-14
    )


# -- which parameters are Muon's --------------------------------------------------------------------------------------

BASE = {"vocab_size": 37, "dim": 16, "heads": 4, "kv_heads": 2, "ffn_dim": 12, "depth": 1}
QKV, GATE_UP = ((16, 8, 8), 16), ((12, 12), 16)
FFN = {"feed_forward.gate_up.weight": GATE_UP, "feed_forward.down.weight": ((16,), 12)}
RECURRENCE = {"attention.recurrence.gate.weight": ((16,), 16), "attention.recurrence.decay.weight": ((4,), 16)}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {"attention.qkv.weight": QKV, "attention.out.weight": ((16,), 16), **FFN}),
    "untied, plain": (
        {"tie_embeddings": False, "ffn": "gelu", "qk_norm": True, "norm_placement": "sandwich"},
        {
            "attention.qkv.weight": QKV, "attention.out.weight": ((16,), 16),
            "feed_forward.up.weight": ((12,), 16), "feed_forward.down.weight": ((16,), 12),
        },
    ),
    "linear": (
        {"attention": {"kind": "linear"}},
        {"attention.qkv.weight": QKV, "attention.out.weight": ((16,), 16), **RECURRENCE, **FFN},
    ),
    "gated_delta": (
        {"attention": {"kind": "linear", "linear": {"variant": "gated_delta"}}},
        {
            "attention.qkv.weight": QKV, "attention.out.weight": ((16,), 16), **RECURRENCE,
            "attention.recurrence.beta.weight": ((4,), 16), **FFN,
        },
    ),
    "gated": (
        {"attention": {"kind": "adaptive", "window": 8, "adaptive": {"policy": "gated"}}},
        {
            "attention.qkv.weight": QKV, "attention.out.weight": ((16,), 16), "attention.mix.weight": ((4,), 16),
            **RECURRENCE, **FFN,
        },
    ),
    "transformer-xl": (
        {"arch": "transformer-xl", "memory": 8},
        {
            "attention.q.weight": ((16,), 16), "attention.kv.weight": ((8, 8), 16), "attention.r.weight": ((8,), 16),
            "attention.out.weight": ((16,), 16), **FFN,
        },
    ),
    "mixture": (
        {"moe": {"experts": 3, "shared": 1}},
        {
            "attention.qkv.weight": QKV, "attention.out.weight": ((16,), 16),
            "feed_forward.router.weight": ((3,), 16), "feed_forward.up.weight": GATE_UP,
            "feed_forward.down.weight": ((16,), 12), "feed_forward.shared.gate_up.weight": GATE_UP,
            "feed_forward.shared.down.weight": ((16,), 12),
        },
    ),
    "plain mixture": (
        {"ffn": "relu", "moe": {"experts": 3}},
        {
            "attention.qkv.weight": QKV, "attention.out.weight": ((16,), 16),
            "feed_forward.router.weight": ((3,), 16), "feed_forward.up.weight": ((12,), 16),
            "feed_forward.down.weight": ((16,), 12),
        },
    ),
}  # fmt: skip


def config_of(model: dict[str, Any] | None = None, **optimizer: Any) -> GlowFlowConfig:
    training = {"lr": 0.03, "optimizer": {"name": "muon", **optimizer}}
    return load_config({"model": {"arch": "transformer", **BASE, **(model or {})}, "training": training})


@pytest.mark.parametrize("case", MODELS)
def test_hidden_matrices_are_muons_and_the_rest_is_adamws(case: str) -> None:
    model, wanted = MODELS[case]
    config = config_of(model)
    module = build_module(config, "cpu")
    optimizer = build_optimizer(module, config)
    names = {parameter: name for name, parameter in module.named_parameters()}
    found = {
        names[p]: layout
        for group in optimizer.param_groups
        if group["rule"] == "muon"
        for p, layout in zip(group["params"], group["matrices"], strict=True)
    }
    assert found == {f"blocks.0.{name}": layout for name, layout in wanted.items()}
    rest = {names[p] for group in optimizer.param_groups if group["rule"] == "adamw" for p in group["params"]}
    assert rest == set(names.values()) - set(found)
    assert "embedding.weight" in rest and ("head.weight" in rest) is ("head.weight" in names.values())


def test_a_stack_is_declared_where_the_layer_cuts_it() -> None:
    module = GatedFeedForward(6, 5, ACTIVATIONS["swiglu"]).double()
    gate, up = module.gate_up.weight.split(module.gate_up.stacked_rows)
    x = drawn(3, 6)
    torch.testing.assert_close(module(x), module.down(torch.nn.functional.silu(x @ gate.T) * (x @ up.T)))


# -- groups and keys --------------------------------------------------------------------------------------------------


def test_the_config_names_muon() -> None:
    module = build_module(config_of(), "cpu")
    options: dict[str, Any] = {"momentum": 0.8, "nesterov": False, "ns_steps": 3, "betas": (0.7, 0.8), "eps": 1e-6}
    optimizer = build_optimizer(module, config_of(weight_decay=0.3, adamw_lr_scale=0.25, **options))
    assert isinstance(optimizer, Muon)
    found = [(group["rule"], group["weight_decay"], group.get("lr_scale")) for group in optimizer.param_groups]
    assert found == [("muon", 0.3, None), ("adamw", 0.3, 0.25), ("adamw", 0.0, 0.25)]
    for group in optimizer.param_groups:
        assert group["lr"] == 0.03 and {name: group[name] for name in options} == options


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"momentum": 1.0}, r"momentum.*less than 1"),
        ({"ns_steps": 0}, r"ns_steps.*at least 1"),
        ({"betas": [0.9, 1.0]}, r"betas.*less than 1"),
        ({"adamw_lr_scale": 0}, r"adamw_lr_scale.*0"),
        ({"rho": 1}, "rho"),
    ],
)
def test_keys_and_values_that_cannot_be_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config({"training": {"optimizer": {"name": "muon", **section}}})


class Wide(BaseArchitecture):
    """Two matrices, of which one is ``ratio`` times as wide as at the base width."""

    def __init__(self, rows: tuple[int, ...] = (), ratio: float = 4.0) -> None:
        nn.Module.__init__(self)
        self.role = ParameterRole("hidden", 6, lr_scale=3.0, rows=rows, width_ratio=ratio)
        self.wide, self.other = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)

    def parameter_role(self, name: str) -> ParameterRole:
        return self.role if name == "wide.weight" else super().parameter_role(name)


def test_the_rate_falls_with_the_root_of_the_width_and_rate_times_decay_stays() -> None:
    module = Wide()
    matrices, others = matrix_groups(module, 0.1, width_exponent=0.5)
    found = [(group["params"], group.get("lr_scale"), group["weight_decay"]) for group in matrices]
    assert found == [([module.other.weight], None, 0.1), ([module.wide.weight], 1.5, 0.2)]
    assert [(group["params"], group["weight_decay"]) for group in others] == [([module.wide.bias], 0.0)]


def test_stacks_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parameter_role\('wide.weight'\): rows must add up to the 8 rows.*5"):
        matrix_groups(Wide(rows=(5, 2)), 0.1, width_exponent=0.5)


def test_state_is_four_bytes_for_matrices_and_eight_for_the_rest() -> None:
    config = config_of()
    module = build_module(config, "cpu")
    optimizer = build_optimizer(module, config)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for _, parameter, role in parameters_with_roles(module):
        state = sum(value.nbytes for name, value in optimizer.state[parameter].items() if name != "step")
        assert state == (4 if role.kind == "hidden" else 8) * parameter.numel()


# -- shards -----------------------------------------------------------------------------------------------------------

SHARDED = {"moe": {"experts": 3}, "dim": 12, "heads": 2, "kv_heads": 1, "ffn_dim": 5, "depth": 2, "vocab_size": 11}


def three_steps(sharded: bool) -> dict[str, Tensor]:
    """Weights after three steps on drawn gradients; a parameter of one row leaves the second rank with nothing."""
    config = config_of(SHARDED)
    module = GlowFlowModel(config).module.double()
    module.register_parameter("row", nn.Parameter(drawn(1, 4)))
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for block in module.shard_units():
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    optimizer = build_optimizer(module, config)
    for step in range(3):
        for index, (_, parameter) in enumerate(sorted(module.named_parameters())):
            g = torch.zeros_like(parameter)
            local_part(g).copy_(part_of(drawn(*parameter.shape, seed=100 * step + index), parameter))
            parameter.grad = g
        optimizer.step()
    return {name: whole(local_part(p.detach()), p) for name, p in module.named_parameters()}


def on_a_rank(_: Path) -> dict[str, Tensor]:
    return three_steps(sharded=True)


def test_two_ranks_do_what_one_does(tmp_path: Path) -> None:
    alone = three_steps(sharded=False)
    for weights in run_workers(2, on_a_rank, tmp_path):
        assert weights.keys() == alone.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-12, msg=name)
