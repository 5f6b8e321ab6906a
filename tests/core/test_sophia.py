"""Sophia: steps by hand, the authors' code, its estimates against exact Hessians, second derivatives of our models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.config.errors import ConfigError
from glowflow.config.loader import load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.architectures.transformer import Transformer
from glowflow.core.batch import Batch
from glowflow.core.differentiation import twice_differentiable
from glowflow.core.initialization import initialize
from glowflow.core.layers import head as head_module
from glowflow.core.layers.head import OutputHead
from glowflow.core.model import build_module
from glowflow.core.optim import build_optimizer
from glowflow.core.optim.extra import TakesExtraPass
from glowflow.core.optim.sophia import SophiaG, SophiaH, finite_difference, gauss_newton_bartlett, hutchinson
from tests.core import custom_models


class Losses:
    """A ``GradientSource`` over plain functions of the parameters: a loss, and one against sampled labels."""

    def __init__(
        self, params: list[nn.Parameter], loss: Callable[[], Tensor], sampled: Callable[[], Tensor] | None = None
    ) -> None:
        self.params, self.loss, self.sampled = params, loss, sampled or loss
        self.num_targets: Tensor = torch.tensor(1.0, dtype=torch.float64)
        self.seed = 0
        self.asked: list[str] = []

    def fill_sampled_gradient(self) -> None:
        self._fill(torch.autograd.grad(self.sampled(), self.params))

    def fill_gradient(self) -> None:
        self.asked.append("gradient")
        self._fill(torch.autograd.grad(self.loss(), self.params))

    def fill_hessian_product(self, probes: Mapping[Tensor, Tensor]) -> None:
        self.asked.append("product")
        gradients = torch.autograd.grad(self.loss(), self.params, create_graph=True)
        slope = torch.stack([(g * probes[p]).sum() for g, p in zip(gradients, self.params, strict=True)]).sum()
        for parameter in self.params:
            parameter.grad = None
        slope.backward()

    def probe(self, parameter: Tensor) -> Tensor:
        index = next(i for i, p in enumerate(self.params) if p is parameter)
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        return torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)

    def norm(self, parts: list[Tensor]) -> Tensor:
        return torch.linalg.vector_norm(torch.stack([part.norm() for part in parts]))

    def _fill(self, gradients: tuple[Tensor, ...]) -> None:
        for parameter, gradient in zip(self.params, gradients, strict=True):
            parameter.grad = gradient.clone()


def given(params: list[nn.Parameter], slopes: list[Tensor], count: float) -> Losses:
    """A loss over ``count`` targets whose gradient is ``slopes``."""

    def linear() -> Tensor:
        return torch.stack([(p * slope).sum() for p, slope in zip(params, slopes, strict=True)]).sum()

    source = Losses(params, linear)
    source.num_targets = torch.tensor(float(count), dtype=torch.float64)
    return source


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_two_steps_of_sophia_g_by_hand() -> None:
    """lr 0.1, wd 0.5, beta 0.5 and 0.5, rho 0.1, B = 10.

    ghat = (2, 0): h = 0.5 x 10 x (4, 0) = (20, 0), d = (2, 0). g = (1, -3): m = (0.5, -1.5), m / d = 0.25 and clipped
    to -1, theta = 0.95 (1, 1) - 0.1 (0.25, -1) = (0.925, 1.05). Then ghat = (0, 1): h = (10, 5), d = (1, 0.5).
    g = (3, 1): m = (1.75, -0.25), m / d = (1 clipped, -0.5), theta = 0.95 theta - 0.1 (1, -0.5) = (0.77875, 1.0475).
    """
    theta = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = SophiaG([theta], lr=0.1, betas=(0.5, 0.5), rho=0.1, weight_decay=0.5)
    for ghat, g, want in (
        (vector(2, 0), vector(1, -3), vector(0.925, 1.05)),
        (vector(0, 1), vector(3, 1), vector(0.77875, 1.0475)),
    ):
        optimizer.extra_pass(0, given([theta], [ghat], 10))
        theta.grad = g
        optimizer.step()
        torch.testing.assert_close(theta.detach(), want, rtol=0, atol=1e-14)
    torch.testing.assert_close(optimizer.state[theta]["hessian"], vector(10, 5), rtol=0, atol=1e-14)


def test_two_steps_of_sophia_h_by_hand() -> None:
    """lr 0.1, no decay, beta 0.5 and 0.5, gamma 0.5, eps 0.125; u (H u) is given.

    (8, -8): h = (4, -4), d = (2, 0.125). g = (2, 0.125): m = (1, 0.0625), m / d = (0.5, 0.5),
    theta = (0.95, 0.95). (0, 8): h = (2, 2), d = (1, 1). g = (-1, 3): m = (0, 1.53125), m / d = (0, 1 clipped),
    theta = (0.95, 0.85).
    """
    theta = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = SophiaH([theta], lr=0.1, betas=(0.5, 0.5), gamma=0.5, eps=0.125)
    h = optimizer._state(theta, "hessian")
    for product, g, want in (
        (vector(8, -8), vector(2, 0.125), vector(0.95, 0.95)),
        (vector(0, 8), vector(-1, 3), vector(0.95, 0.85)),
    ):
        hutchinson([h], [vector(1, 1)], [product], beta2=0.5)
        theta.grad = g
        optimizer.step()
        torch.testing.assert_close(theta.detach(), want, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_fifty_steps_are_those_of_the_authors_code(dtype: torch.dtype, tolerance: float) -> None:
    """Which keeps h without the number of targets and multiplies by it at every step."""
    official = pytest.importorskip("sophia_opt").SophiaG
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, dtype=dtype, generator=generator) for shape in [(9, 7), (5,), (3, 2, 4)]]
    mine, yours = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "rho": 0.05, "weight_decay": 0.3}
    one, other = SophiaG(mine, **options), official(yours, **options)
    clipped = []
    for step in range(50):
        if step % 10 == 0:
            slopes = [0.3 * torch.randn(x.shape, dtype=dtype, generator=generator) for x in start]
            one.extra_pass(step, given(mine, slopes, 480))
            for parameter, slope in zip(yours, slopes, strict=True):
                parameter.grad = slope
            other.update_hessian()
        for a, b in zip(mine, yours, strict=True):
            a.grad = torch.randn(a.shape, dtype=dtype, generator=generator)
            b.grad = a.grad.clone()
        before = mine[0].detach() * (1 - 0.01 * 0.3)
        one.step()
        other.step(bs=480)
        clipped.append(((mine[0].detach() - before).abs() > 0.0099).float().mean().item())
    for a, b, x in zip(mine, yours, start, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(a, x, rtol=0.01)
    assert 0.05 < sum(clipped) / 50 < 0.95, "both branches of the clip are compared"


# -- the estimates -----------------------------------------------------------------------------------------------------


def quadratic(matrix: Tensor) -> tuple[nn.Parameter, Losses]:
    """theta^T A theta / 2, whose Hessian is A."""
    theta = nn.Parameter(torch.linspace(-1, 2, len(matrix), dtype=matrix.dtype))
    return theta, Losses([theta], lambda: theta @ matrix @ theta / 2)


@pytest.mark.parametrize("hvp", ["exact", "finite_diff"])
def test_hutchinson_finds_the_diagonal_of_a_quadratic(hvp: str) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    dense = dense + dense.T + torch.diag(torch.linspace(-4, 8, 6, dtype=torch.float64))
    theta, source = quadratic(dense)
    optimizer = SophiaH([theta], betas=(0.9, 0.0), hvp=hvp)
    optimizer.extra_start(lambda way: [])
    estimates = []
    for source.seed in range(2000):
        optimizer.extra_pass(0, source)
        estimates.append(optimizer.state[theta]["hessian"].clone())
    u = source.probe(theta)
    torch.testing.assert_close(estimates[-1], u * (dense @ u), rtol=1e-6, atol=1e-9)
    mean, spread = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / 2000**0.5
    assert ((mean - dense.diagonal()).abs() < 4 * spread).all()
    assert (spread < 0.4).all()


def test_of_a_diagonal_quadratic_a_probe_gives_each_entry_times_its_square() -> None:
    diagonal = vector(3, -1, 0.5, 0)
    theta, source = quadratic(torch.diag(diagonal))
    optimizer = SophiaH([theta], betas=(0.9, 0.75))
    optimizer.extra_start(lambda way: [])
    optimizer.extra_pass(0, source)
    torch.testing.assert_close(optimizer.state[theta]["hessian"], 0.25 * diagonal * source.probe(theta) ** 2)


def test_gauss_newton_bartlett_finds_the_diagonal_of_the_gauss_newton_matrix() -> None:
    """Softmax regression: of W_vd it is the mean over positions of p_v (1 - p_v) x_d^2, whatever the labels are."""
    generator = torch.Generator().manual_seed(0)
    head = OutputHead(3, 5).double()
    x_btd = torch.randn(1, 6, 3, dtype=torch.float64, generator=generator)
    nn.init.normal_(head.matrix, generator=generator)
    p_btv = head(x_btd).softmax(-1).detach()
    exact = torch.einsum("btv,btd->vd", p_btv * (1 - p_btv), x_btd**2) / 6
    h, draws = torch.zeros_like(exact), 1500
    for index in range(draws):
        labels = head.sample(x_btd, torch.rand(1, 6, generator=generator))
        loss_sum, _ = head.loss(x_btd, labels, torch.ones(1, 6))
        (ghat,) = torch.autograd.grad(loss_sum / 6, [head.matrix])
        gauss_newton_bartlett([h], [ghat], 6.0, beta2=index / (index + 1))
    torch.testing.assert_close(h, exact, rtol=0.2, atol=1e-3)


def test_an_estimate_that_is_not_finite_is_left_out() -> None:
    theta = nn.Parameter(torch.ones(3, dtype=torch.float64))
    good = Losses([theta], lambda: (theta**3).sum())
    for optimizer in (SophiaG([theta]), SophiaH([theta]), SophiaH([theta], hvp="finite_diff")):
        optimizer.extra_pass(0, good)
        before = optimizer.state[theta]["hessian"].clone()
        optimizer.extra_pass(10, Losses([theta], lambda: (theta**3).sum() * float("nan")))
        assert torch.equal(optimizer.state[theta]["hessian"], before) and (before != 0).all()
        optimizer.extra_pass(20, good)
        assert not torch.equal(optimizer.state[theta]["hessian"], before)


def test_the_win_rate_is_the_share_that_is_not_clipped() -> None:
    """d = rho h = (0, 2, 2, 2) and m = g / 2 = (0.5, 0.5, 1.995, 2.005)."""
    theta = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = SophiaG([theta], betas=(0.5, 0.0), rho=0.1)
    optimizer.extra_pass(0, given([theta], [vector(0, 2, 2, 2)], 5))
    theta.grad = vector(1, 1, 3.99, 4.01)
    optimizer.step()
    assert optimizer.extra_shares()["win_rate"].tolist() == [2, 4]


# -- sampled labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"multiplier": 0.25}])
def test_labels_are_where_the_draws_lie_on_the_cumulated_probabilities(options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    head = OutputHead(4, 7, **options)  # type: ignore[arg-type]
    nn.init.normal_(head.matrix, std=2.0, generator=generator)
    x_btd, draws_bt = torch.randn(2, 50, 4, generator=generator), torch.rand(2, 50, generator=generator)
    draws_bt[0, 0], draws_bt[0, 1] = 0.0, 1 - 2**-24
    labels_bt = head.sample(x_btd, draws_bt)
    upper_btv = head(x_btd).softmax(-1).cumsum(-1)
    assert torch.equal(labels_bt, (upper_btv <= draws_bt.unsqueeze(-1)).sum(-1).clamp(max=6))
    assert labels_bt[0, 0] == 0 and labels_bt.unique().numel() == 7


def test_labels_are_drawn_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    head = OutputHead(4, 7)
    nn.init.normal_(head.matrix, generator=generator)
    x_btd, draws_bt = torch.randn(3, 5, 4, generator=generator), torch.rand(3, 5, generator=generator)
    whole, heights, softmax = head.sample(x_btd, draws_bt), [], Tensor.softmax

    def watched(scores: Tensor, dim: int) -> Tensor:
        heights.append(len(scores))
        return softmax(scores, dim)

    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 4 * 7)
    monkeypatch.setattr(Tensor, "softmax", watched)
    assert torch.equal(head.sample(x_btd, draws_bt), whole)
    assert heights == [4, 4, 4, 3]


def test_the_loss_with_draws_is_that_of_the_labels_drawn(
    make_module: Callable[..., Transformer], make_batch: Callable[..., Batch]
) -> None:
    module, batch = make_module(), make_batch()
    draws = torch.rand(3, 11, generator=torch.Generator().manual_seed(1))
    plain, _ = module(batch)
    batch.label_draws = draws
    output, _ = module(batch)
    scores = module.logits(output.hidden)
    labels = (scores.softmax(-1).cumsum(-1) <= draws.unsqueeze(-1)).sum(-1)
    nll = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none") * batch.loss_weights.flatten()
    torch.testing.assert_close(output.loss_sum, nll.sum())
    assert not torch.allclose(output.loss_sum, plain.loss_sum)


# -- second derivatives ------------------------------------------------------------------------------------------------

DELTA = {"kind": "adaptive", "linear": {"variant": "gated_delta", "chunk": 4}, "adaptive": {"pattern": "LG"}}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped, normalised queries": {"qk_norm": True, "logit_softcap": 5.0, "ffn": "gelu", "kv_heads": 2},
    "a named kernel": {"attention": {"backend": "sdpa"}},
    "as GPT-2": {"norm": "layernorm", "bias": True, "position": "learned", "ffn": "gelu_tanh"},
    "maximal-update parametrisation": {"mup": True, "base_dim": 8},
    "windows": {"attention": {"kind": "windowed", "window": 4}},
    "linear and gated": {"attention": {**DELTA, "window": 4}},
    "transformer-xl": {"arch": "transformer-xl", "memory": 6},
}


def model_of(**keys: Any) -> BaseArchitecture:
    section = {"arch": "transformer", "dim": 16, "depth": 2, "heads": 4, "vocab_size": 37, "init_std": 0.2, **keys}
    module = build_module(GlowFlowConfig(model=section), "cpu").double()
    initialize(module, 0)
    return module


def source_of(module: BaseArchitecture, batch: Batch) -> Losses:
    def loss() -> Tensor:
        loss_sum = module(batch)[0].loss_sum
        assert loss_sum is not None
        return loss_sum / batch.loss_weights.sum()

    return Losses(list(module.parameters()), loss)


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS.keys())
def test_hessian_vector_products_of_our_models(keys: dict[str, Any], make_batch: Callable[..., Batch]) -> None:
    """Twice differentiated against differences of the ordinary gradients, in fp64."""
    module = model_of(**keys)
    assert module.second_order_reasons() == []
    source = source_of(module, make_batch(documents=True))
    probes: dict[Tensor, Tensor] = {p: source.probe(p) for p in source.params}
    with twice_differentiable():
        source.fill_hessian_product(probes)
    exact = torch.cat([p.grad.flatten() for p in source.params if p.grad is not None])
    found = finite_difference([*source.params], source, 3e-6)
    differences = torch.cat([product.flatten() for _, product in found.values()])
    assert (differences - exact).norm() < 1e-6 * exact.norm()
    assert exact.norm() > 0.1


def test_outside_the_context_our_gradients_have_none(make_batch: Callable[..., Batch]) -> None:
    source = source_of(model_of(), make_batch())
    probes: dict[Tensor, Tensor] = {p: source.probe(p) for p in source.params}
    with pytest.raises(RuntimeError, match="once_differentiable"):
        source.fill_hessian_product(probes)


def test_the_second_derivative_leaves_the_loss_as_it_is(make_batch: Callable[..., Batch]) -> None:
    for keys in MODELS.values():
        module, batch = model_of(**keys), make_batch(documents=True)
        with twice_differentiable():
            second = module(batch)[0].loss_sum
        torch.testing.assert_close(second, module(batch)[0].loss_sum, rtol=1e-12, atol=0)


@pytest.mark.parametrize("arch", ["transformer", "transformer-xl"])
def test_differences_in_fp32_are_a_thousandth_off_at_most(arch: str, make_batch: Callable[..., Batch]) -> None:
    for init_std in (0.02, 0.2):
        module, batch = model_of(arch=arch, init_std=init_std), make_batch(documents=True)
        exact, source = source_of(module, batch), source_of(model_of(arch=arch, init_std=init_std).float(), batch)
        start = [p.detach().clone() for p in source.params]
        found = finite_difference([*source.params], source, 1e-3)
        assert all(torch.equal(a, b) for a, b in zip(start, source.params, strict=True)), "put back bit for bit"
        pairs = zip(exact.params, source.params, strict=True)
        probes: dict[Tensor, Tensor] = {p: source.probe(q).double() for p, q in pairs}
        with twice_differentiable():
            exact.fill_hessian_product(probes)
        want = torch.cat([(probes[p] * p.grad).flatten() for p in exact.params if p.grad is not None])
        have = torch.cat([(u * product).flatten() for u, product in found.values()])
        assert (have - want).norm() < 1e-3 * want.norm()


# -- the config --------------------------------------------------------------------------------------------------------


def optimizer_of(module: nn.Module, name: str, **section: object) -> torch.optim.Optimizer:
    return build_optimizer(module, GlowFlowConfig(training={"lr": 0.03, "optimizer": {"name": name, **section}}))


def test_the_config_names_both_and_vectors_do_not_decay() -> None:
    module = nn.Linear(3, 2)
    g = optimizer_of(module, "sophia-g", rho=0.04, hessian_interval=7, hessian_batch_size=3)
    h = optimizer_of(module, "sophia-h", gamma=0.02, eps=1e-9, hvp="finite_diff", fd_step=1e-2)
    assert isinstance(g, SophiaG) and isinstance(h, SophiaH)
    assert isinstance(g, TakesExtraPass) and isinstance(h, TakesExtraPass)
    assert (g.extra_every, g.extra_rows, g.param_groups[0]["rho"]) == (7, 3, 0.04)
    assert (h.extra_every, h.extra_rows, h.hvp, h.fd_step) == (10, None, "finite_diff", 1e-2)
    assert (h.param_groups[0]["gamma"], h.param_groups[0]["eps"]) == (0.02, 1e-9)
    for optimizer in (g, h):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "sophia-g", "hessian_interval": 0}, "hessian_interval"),
        ({"name": "sophia-g", "hvp": "exact"}, "hvp"),
        ({"name": "sophia-g", "rho": 0}, "rho"),
        ({"name": "sophia-h", "hvp": "guess"}, "hvp"),
        ({"name": "sophia-h", "betas": [0.9, 1.0]}, r"betas.*less than 1"),
    ],
)
def test_keys_and_values_that_cannot_be_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config({"training": {"optimizer": section}})


class Samples(custom_models.Sound):
    """Says that it heeds ``label_draws``."""

    samples_labels = True

    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        drawn = batch.label_draws
        targets = batch.targets if drawn is None else self.head.sample(hidden, drawn)  # type: ignore[operator]
        return self.head.loss(hidden, targets, batch.loss_weights)  # type: ignore[operator]


def test_a_model_that_samples_no_labels_is_refused_for_g_alone() -> None:
    config = custom_models.config(custom_models.Sound)
    with pytest.raises(ConfigError, match=r"Sound does not say.*samples_labels"):
        optimizer_of(build_module(config), "sophia-g")
    assert isinstance(optimizer_of(build_module(config), "sophia-h"), SophiaH)
    assert isinstance(optimizer_of(build_module(custom_models.config(Samples)), "sophia-g"), SophiaG)


def test_how_products_are_made_is_chosen_once_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    def made(hvp: str, **against: list[str]) -> tuple[list[str], str]:
        theta, source = quadratic(torch.eye(3))
        optimizer = SophiaH([theta], hvp=hvp)
        caplog.clear()
        with caplog.at_level("INFO"):
            optimizer.extra_start(lambda way: against.get(way, []))
        optimizer.extra_pass(0, source)
        return source.asked, caplog.text

    assert made("auto")[0] == made("exact", finite_diff=["x"])[0] == ["product"]
    assert "by exact (first choice)" in made("auto")[1]
    assert made("finite_diff", exact=["x"])[0] == ["gradient", "gradient"]
    asked, text = made("auto", exact=["they are sharded"])
    assert asked == ["gradient", "gradient"]
    assert "by finite_diff (no exact ones: they are sharded)" in text
    with pytest.raises(ConfigError, match=r"exact cannot be had: they are sharded"):
        made("exact", exact=["they are sharded"])
    with pytest.raises(ConfigError, match=r"(?s)exact cannot.*one.*finite_diff cannot.*two"):
        made("auto", exact=["one"], finite_diff=["two"])
