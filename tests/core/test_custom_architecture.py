"""The interface of a custom model: a sound one passes, a broken one is told all that is wrong; roles and groups."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowflow.config.errors import ConfigError
from glowflow.config.loader import load_config
from glowflow.config.registry import ARCHITECTURES, Entry
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures import validation
from glowflow.core.architectures.base import BaseArchitecture, Carry, InitSpec, ParameterRole, default_role
from glowflow.core.architectures.transformer import Transformer
from glowflow.core.architectures.validation import validate_architecture
from glowflow.core.batch import Batch
from glowflow.core.generation import generate
from glowflow.core.initialization import initialize
from glowflow.core.layers.head import OutputHead
from glowflow.core.optim.groups import parameter_groups
from tests.core.custom_models import (
    DIM,
    VOCABULARY,
    Block,
    EverythingAtOnce,
    Keys,
    OnlyTrained,
    Scaled,
    SeesTheFuture,
    Sound,
    Unused,
    arch,
    config,
)


def problems(target: type) -> dict[str, str]:
    """Method -> what is wrong with it."""
    with pytest.raises(ConfigError) as caught:
        validate_architecture(config(target))
    assert str(caught.value).startswith(f"model.arch {arch(target)} cannot be trained")
    return {problem.key.removeprefix(f"{target.__name__}."): str(problem) for problem in caught.value.problems}


# -- sound ones -------------------------------------------------------------------------------------------------------


def test_a_sound_model_passes_and_nothing_is_drawn_from_the_users_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert validate_architecture(config(Sound)) == []
    assert torch.equal(torch.get_rng_state(), before)


def test_the_vocabulary_may_still_be_open() -> None:
    assert validate_architecture(GlowFlowConfig(model={"arch": arch(Sound)})) == []


@pytest.mark.parametrize(
    "path",
    ["glowflow.core.architectures.transformer:Transformer", "glowflow.core.architectures.transformer_xl:TransformerXL"],
)
def test_the_built_in_architectures_keep_the_contract_that_custom_ones_are_held_to(path: str) -> None:
    small = {"dim": 16, "depth": 2, "heads": 2, "vocab_size": 31}
    assert validate_architecture(GlowFlowConfig(model={"arch": path, **small})) == []


def test_built_in_names_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "architecture_class", lambda name: pytest.fail(f"{name} was looked up"))
    assert validate_architecture(GlowFlowConfig()) == []


def test_what_is_left_out_is_a_warning_before_and_a_clear_error_where_it_is_needed() -> None:
    warnings = "\n".join(validate_architecture(config(OnlyTrained)))
    for limit in ("no flops_per_token", "cannot be evaluated", "generates with --no-cache only"):
        assert limit in warnings
    module = OnlyTrained(Keys(arch="x", vocab_size=VOCABULARY))
    for call in (
        lambda: list(generate(module, [1], 2, 8)),
        lambda: module.logits(torch.zeros(1, DIM)),
        lambda: module.flops_per_token(8),
    ):
        with pytest.raises(ConfigError, match=r"OnlyTrained does not implement.*custom-architecture\.md"):
            call()


def test_a_model_that_sees_the_future_is_a_warning() -> None:
    assert any("sees the future" in text for text in validate_architecture(config(SeesTheFuture)))


# -- broken ones ------------------------------------------------------------------------------------------------------


class NoForward(Sound):
    forward = BaseArchitecture.forward


class OldSignature(Sound):
    def forward(self, batch: Batch, carry: Carry = None) -> Any:
        return super().forward(batch, carry)


class DecodeWithoutCache(Sound):
    new_cache = BaseArchitecture.new_cache


class ReadsValuesWhenBuilt(Sound):
    def __init__(self, config: Keys) -> None:
        super().__init__(config)
        self.rate = torch.linspace(0, 1, 3)[1].item()


class ForgetsSuper(Sound):
    def __init__(self, config: Keys) -> None:
        self.embedding = nn.Embedding(3, config.dim)


class NoParameters(Sound):
    def __init__(self, config: Keys) -> None:
        BaseArchitecture.__init__(self, config)
        self.blocks = [Block(config.dim)]

    def shard_units(self) -> list[nn.Module]:
        return []

    def flops_per_token(self, context: int) -> float:
        return 1.0


class GivesATensor(Sound):
    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> Any:
        return super().forward(batch, carry)[0].hidden


class GivesPlainLoss(Sound):
    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> Any:
        output, carry = super().forward(batch, carry)
        return output.loss_sum, carry


class FlatHidden(Sound):
    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> Any:
        output, carry = super().forward(batch, carry, compute_loss=compute_loss)
        output.hidden = output.hidden.flatten(0, 1)
        return output, carry


class TokensAsHidden(Sound):
    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> Any:
        output, carry = super().forward(batch, carry, compute_loss=compute_loss)
        output.hidden = batch.tokens
        return output, carry


class WrongWidth(Sound):
    def __init__(self, config: Keys) -> None:
        super().__init__(config)
        self.head = OutputHead(config.dim + 1, self.vocab_size)


class NoLoss(Sound):
    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        return ()


class LossPerSequence(Sound):
    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        loss, weight = super().loss(hidden, batch)
        return loss.expand(2), weight


class LossAsNumber(Sound):
    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        loss, weight = super().loss(hidden, batch)
        return loss, weight.item()


class DetachedLoss(Sound):
    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        return super().loss(hidden.detach(), batch)[0].detach(), batch.loss_weights.sum()


class InfiniteLoss(Sound):
    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        loss, weight = super().loss(hidden, batch)
        return loss / 0, weight


class MeanLoss(Sound):
    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        loss, weight = super().loss(hidden, batch)
        return loss / weight, weight


class CountsPositions(Sound):
    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        return super().loss(hidden, batch)[0], torch.tensor(float(batch.tokens.numel()))


class NoBackward(Sound):
    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        root = hidden.exp()
        loss = (root.sum(-1) * batch.loss_weights).sum()
        root.add_(1)
        return loss, batch.loss_weights.sum()


class CarryWithoutLanes(Sound):
    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> Any:
        output, carry = super().forward(batch, None, compute_loss=compute_loss)
        return output, {"sum": carry["sum"].mean(0, keepdim=True)}  # type: ignore[index]


class CarryAsTensor(Sound):
    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> Any:
        output, carry = super().forward(batch, None, compute_loss=compute_loss)
        return output, carry["sum"]  # type: ignore[index]


class CarryWithGraph(Sound):
    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> Any:
        output, _ = super().forward(batch, None, compute_loss=compute_loss)
        return output, {"sum": self.embedding(batch.tokens[:, 0])}


class ForgetsItsCarry(Sound):
    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> Any:
        if carry is not None:
            carry["memory"].sum()
        return super().forward(batch, None, compute_loss=compute_loss)


class TransposedScores(Sound):
    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden).mT


class NoScores(Sound):
    def logits(self, hidden: Tensor) -> Any:
        return None


class DecodesTheLastOnly(Sound):
    def decode(self, tokens: Tensor, cache: Any, *, last_only: bool = False) -> Tensor:
        return super().decode(tokens, cache, last_only=True)


class ForgetsTheCache(Sound):
    def decode(self, tokens: Tensor, cache: Any, *, last_only: bool = False) -> Tensor:
        return super().decode(tokens, self.new_cache(len(tokens), 8), last_only=last_only)


class CacheFails(Sound):
    def new_cache(self, batch_size: int, max_length: int, device: Any = "cpu", dtype: Any = torch.float32) -> Any:
        raise IndexError("no room")


class StrangeUnits(Sound):
    def shard_units(self) -> list[nn.Module]:
        return [self.block, nn.Linear(1, 1)]


class UnitsAsGenerator(Sound):
    def shard_units(self) -> Any:
        return (block for block in [self.block])


class TwiceAUnit(Sound):
    def shard_units(self) -> list[nn.Module]:
        return [self.block, self.block]


class NestedUnits(Sound):
    def shard_units(self) -> list[nn.Module]:
        return [self.block, self.block.mix]


class UnitNeverCalled(Sound):
    def shard_units(self) -> list[nn.Module]:
        return [self.block, self.head]


class NoInit(Sound):
    def init_spec(self, name: str) -> Any:
        return None if "mix" in name else InitSpec("ones")


class RoleAsText(Sound):
    def parameter_role(self, name: str) -> Any:
        return "vector"


class RoleFails(Sound):
    def parameter_role(self, name: str) -> ParameterRole:
        return {}[name]  # type: ignore[no-any-return]


class TiesByHand(Sound):
    def __init__(self, config: Keys) -> None:
        super().__init__(config)
        self.head.weight = self.embedding.weight


class LosesABuffer(Sound):
    def __init__(self, config: Keys) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.arange(3.0))


class NoFlops(Sound):
    def flops_per_token(self, context: int) -> float:
        return 0.0


class CountsTooMuch(Sound):
    def num_embedding_parameters(self) -> int:
        return 10**9


class SmallIsNothing(Sound):
    @classmethod
    def small_config(cls, config: Any) -> Any:
        return None


BROKEN: list[tuple[type, str, str]] = [
    (NoForward, "forward", r"is missing: it takes \(batch, carry=None, \*, compute_loss=True\)"),
    (OldSignature, "forward", r"must take .*compute_loss"),
    (DecodeWithoutCache, "new_cache", "is missing: cached decoding needs it beside decode"),
    (ReadsValuesWhenBuilt, "__init__", r"meta tensors.*test_custom_architecture\.py:\d+\); models are first built on"),
    (ForgetsSuper, "__init__", r"AttributeError.*before Module\.__init__"),
    (NoParameters, "parameters", r"there are none.*nn\.ModuleList"),
    (GivesATensor, "forward", r"must return \(ModelOutput, carry\) \(got 'Tensor'\)"),
    (GivesPlainLoss, "forward", r"must return \(ModelOutput, carry\) \(got \['Tensor', 'dict'\]\)"),
    (FlatHidden, "forward", r"shape \(B, T, D\), here \(2, 8, D\) \(got \(16, 6\)\)"),
    (TokensAsHidden, "forward", "hidden states as a tensor of floats"),
    (WrongWidth, "forward", r"raises RuntimeError: .*custom_models\.py:\d+"),
    (NoLoss, "forward", "gives no loss"),
    (LossPerSequence, "forward", r"loss_sum as one float.*got \(2,\)"),
    (LossAsNumber, "forward", r"weight_sum as one float.*got 'float'"),
    (DetachedLoss, "forward", "a loss without a gradient"),
    (InfiniteLoss, "forward", r"not finite before the first step \(got inf\)"),
    (MeanLoss, "forward", r"which a mean is not: 2 times the weights must give 2 times the loss \(got '1 times'\)"),
    (CountsPositions, "forward", r"sum of batch\.loss_weights as weight_sum \(got 16\.0\)"),
    (Unused, "parameters", r"none gets to spare\.weight, spare\.bias"),
    (NoBackward, "forward", "the backward pass raises RuntimeError: .*inplace"),
    (CarryWithoutLanes, "forward", r"carry\['sum'\] with lanes in the first dimension, here 2 \(got \(1, 6\)\)"),
    (CarryAsTensor, "forward", "the carry as a dict from names to tensors"),
    (CarryWithGraph, "forward", r"must detach carry\['sum'\]"),
    (ForgetsItsCarry, "forward", r"raises KeyError: 'memory' \(test_custom_architecture\.py"),
    (TransposedScores, "logits", r"into \(N, V\), here \(16, 13\) \(got \(13, 16\)\)"),
    (NoScores, "logits", "got 'NoneType'"),
    (DecodesTheLastOnly, "decode", r"shape \(2, 5, 13\) for 5 tokens \(got \(2, 1, 13\)\)"),
    (ForgetsTheCache, "decode", r"must score as forward does.*positions \[5, 6, 7\] differ"),
    (CacheFails, "new_cache", "raises IndexError: no room"),
    (StrangeUnits, "shard_units", "must name submodules of the model: item 1: Linear"),
    (UnitsAsGenerator, "shard_units", r"must return a list of modules \(got 'generator'\)"),
    (TwiceAUnit, "shard_units", "must name each block once"),
    (NestedUnits, "shard_units", "must not name a block inside another one"),
    (UnitNeverCalled, "shard_units", "forward never calls: head"),
    (NoInit, "init_spec", r"must return InitSpec\(\.\.\.\) for 'block\.mix\.weight'"),
    (RoleAsText, "parameter_role", r"must return ParameterRole\(\.\.\.\) for 'embedding\.weight' \(got 'str'\)"),
    (RoleFails, "parameter_role", r"for 'embedding\.weight' raises KeyError"),
    (TiesByHand, "parameters", r"under several names.*embedding\.weight = head\.weight"),
    (LosesABuffer, "reset_buffers", "does not restore the buffer 'table'"),
    (NoFlops, "flops_per_token", "finite number above 0"),
    (CountsTooMuch, "num_embedding_parameters", "must lie between 0 and all"),
    (SmallIsNothing, "small_config", r"must return a Keys \(got 'NoneType'\)"),
]


@pytest.mark.parametrize(("target", "method", "rule"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_model_is_told_what_is_wrong(target: type, method: str, rule: str) -> None:
    found = problems(target)
    assert set(found) == {method}, found
    match = re.search(rule, found[method])
    assert match, found[method]


def test_all_problems_are_told_at_once() -> None:
    wanted = {"new_cache", "forward", "parameters", "logits", "shard_units", "flops_per_token"}
    assert set(problems(EverythingAtOnce)) == wanted


class NotAModel(nn.Module):
    config_class = Keys


class StrangeKeys(Sound):
    config_class = dict  # type: ignore[assignment]


def a_function(config: Keys) -> None: ...


def test_what_is_no_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match="must name a subclass of glowflow's BaseArchitecture"):
        validate_architecture(config(NotAModel))
    for name in ("StrangeKeys", "a_function", "NoSuchClass"):
        with pytest.raises(ConfigError, match=r"model\.arch.*(config_class|cannot be imported)"):
            load_config({"model": {"arch": f"{__name__}:{name}"}})


def test_a_broken_entry_point_is_told_with_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("StrangeKeys", "NoSuchClass"):
        path = f"{__name__}:{name}"
        monkeypatch.setitem(ARCHITECTURES._entries, name, Entry(name, f"{path}.config_class", path))
        with pytest.raises(ConfigError) as caught:
            load_config({"model": {"arch": name}, "training": {"lr": -1}})
        assert {problem.key for problem in caught.value.problems} == {"model.arch", "training.lr"}


# -- too large to try -------------------------------------------------------------------------------------------------


class LooksAtValues(Sound):
    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        assert hidden.sum().item() is not None
        return super().loss(hidden, batch)


class ShrinksItself(MeanLoss):
    @classmethod
    def small_config(cls, config: Any) -> Any:
        return config.model_copy(update={"vocab_size": 5})


def test_a_model_too_large_is_tried_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "LARGEST", 150)
    (warning,) = validate_architecture(config(Sound))
    assert "parameters, too many to try here" in warning and "small_config" in warning
    for target in (Unused, FlatHidden, CarryWithoutLanes, DecodesTheLastOnly, UnitNeverCalled, WrongWidth):
        method, rule = next((m, r) for broken, m, r in BROKEN if broken is target)
        assert re.search(rule, problems(target)[method])
    assert len(validate_architecture(config(MeanLoss))) == 1  # values cannot be compared there
    assert any("as far as the meta device goes" in text for text in validate_architecture(config(LooksAtValues)))
    assert "a mean is not" in problems(ShrinksItself)["forward"]


# -- roles and groups -------------------------------------------------------------------------------------------------


def test_default_roles_by_shape_and_place() -> None:
    module = nn.ModuleDict(
        {"table": nn.Embedding(5, 4), "conv": nn.Conv1d(4, 6, 3), "linear": nn.Linear(4, 7), "head": OutputHead(4, 5)}
    )
    module.register_parameter("head_bias", nn.Parameter(torch.zeros(2, 3)))
    found = {name: default_role(module, name) for name, _ in module.named_parameters()}
    assert found == {
        "table.weight": ParameterRole("embedding"),
        "conv.weight": ParameterRole("hidden", 12),
        "conv.bias": ParameterRole("vector"),
        "linear.weight": ParameterRole("hidden", 4),
        "linear.bias": ParameterRole("vector"),
        "head.weight": ParameterRole("output", 4),
        "head_bias": ParameterRole("vector"),
    }


@pytest.mark.parametrize("tied", [True, False])
def test_the_transformers_groups_are_those_of_matrices_and_vectors_by_name(
    make_module: Callable[..., Transformer], tied: bool
) -> None:
    module = make_module(tie_embeddings=tied)
    named = sorted(module.named_parameters())
    wanted = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = parameter_groups(module, 0.3)
    assert [group.keys() for group in groups] == [group.keys() for group in wanted]
    for group, want in zip(groups, wanted, strict=True):
        assert group["weight_decay"] == want["weight_decay"]
        assert [*map(id, group["params"])] == [*map(id, want["params"])]


def test_roles_decide_decay_and_learning_rate() -> None:
    module = Scaled(Keys(arch="x", vocab_size=VOCABULARY))
    initialize(module, 0)
    names = {id(p): name for name, p in module.named_parameters()}
    found = [
        ([names[id(p)] for p in group["params"]], group["weight_decay"], group.get("lr_scale"))
        for group in parameter_groups(module, 0.1)
    ]
    assert found == [
        (["head.weight"], 0.1, None),
        (["embedding.weight"], 0.0, 0.5),
        (["block.mix.bias", "block.mix.weight"], 0.1, 4.0),
    ]
