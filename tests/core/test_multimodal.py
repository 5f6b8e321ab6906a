"""The multi-modal model: properties of every fusion and task, counts, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from glowflow.config.errors import ConfigError
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.multimodal import Multimodal
from glowflow.core.architectures.transformer import Transformer
from glowflow.core.architectures.validation import validate_architecture
from glowflow.core.batch import Batch, Modality
from glowflow.core.initialization import initialize
from glowflow.core.model import GlowFlowModel, build_module
from glowflow.core.optim.groups import matrix_groups, parameter_groups
from tests.core.media_batches import Item, Row, media_batch, media_config, media_rows, picture, sound
from tests.core.media_models import CAUSAL, FUSIONS, TASKS, assert_same, make, objective, readings, section

# -- rows do not know of each other ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fusion", "task"), TASKS)
def test_neither_padding_nor_company_changes_a_row(fusion: str, task: str) -> None:
    module, rows = make(fusion, task), media_rows()
    batch = media_batch(module.config, rows)
    output, _ = module(batch)
    want = readings(output, batch)
    company: list[Row] = [[1, picture(9, 16, 14), picture(8), 2], [1, sound(9, frames=15), *range(2, 30)]]
    wider = media_batch(module.config, [*rows, *company], length=72, blanks=2)
    assert_same(readings(module(wider)[0], wider)[: len(rows)], want)
    order = [3, 0, 5, 1, 4, 2]
    turned = media_batch(module.config, [rows[index] for index in order])
    assert_same(readings(module(turned)[0], turned), [want[index] for index in order])
    for index in (1, 3):
        alone = media_batch(module.config, [rows[index]])
        assert_same(readings(module(alone)[0], alone), [want[index]])


@pytest.mark.parametrize("fusion", sorted(CAUSAL))
def test_what_comes_later_changes_nothing_earlier(fusion: str) -> None:
    module = make(fusion)
    rows: list[Row] = [[1, 2, picture(0), 3, 4, sound(0), 5]]
    other: list[Row] = [[1, 2, picture(0), 3, 4, sound(1), 6]]
    batches = [media_batch(module.config, one) for one in (rows, other)]
    before, after = (module(batch)[0].hidden[0] for batch in batches)
    place = int(batches[0].modalities["audio"].positions[0])
    torch.testing.assert_close(before[:place], after[:place], rtol=1e-12, atol=1e-12)
    assert (before[place:-1] - after[place:-1]).abs().amax(-1).min() > 1e-4 or fusion == "prefix"
    assert not torch.allclose(before[place + 1], after[place + 1])


@pytest.mark.parametrize("fusion", ["late", "bottleneck"])
def test_text_is_predicted_from_the_text_before_it_alone(fusion: str) -> None:
    module = make(fusion)
    rows: list[Row] = [[1, picture(0), 3, 4, 5, 6]]
    other: list[Row] = [[1, picture(0), 3, 4, 7, 6]]
    before, after = (module(media_batch(module.config, one))[0].hidden[0] for one in (rows, other))
    torch.testing.assert_close(before[:4], after[:4], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[4:6], after[4:6])


# -- text alone, and missing media -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", sorted(CAUSAL))
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"attention": {"kind": "windowed", "window": 3, "sinks": 1}},
        {"attention": {"kind": "sparse", "sparse": {"local": 3, "stride": 4}}},
        {"attention": {"kind": "linear"}},
        {"attention": {"kind": "adaptive", "window": 3, "adaptive": {"policy": "gated"}}},
        {"position": "alibi", "norm_placement": "sandwich", "kv_heads": 2},
    ],
    ids=str,
)
def test_rows_of_text_are_those_of_the_plain_transformer(fusion: str, variant: dict[str, Any]) -> None:
    module = build_module(media_config(**section(fusion), **variant), "cpu").double()
    initialize(module, 3)
    values = {key: value for key, value in media_config(**variant).model.model_dump().items() if key in _plain_keys()}
    plain = build_module(GlowFlowConfig(model={**values, "arch": "transformer"}), "cpu").double()
    initialize(plain, 3)  # the same draws, since they go by name
    batch = media_batch(module.config, media_rows())  # type: ignore[arg-type]
    want = plain(replace(batch, modalities={}))[0].hidden
    got = module(batch)[0].hidden
    text = [index for index, row in enumerate(media_rows()) if not any(isinstance(part, Item) for part in row)]
    assert text
    for index in text:
        last = int(batch.readout[index]) + 1
        torch.testing.assert_close(got[index, :last], want[index, :last], rtol=1e-11, atol=1e-11)
    if fusion == "cross_attention":  # closed gates: the text decoder, bit for bit, whatever the media
        assert torch.equal(got, want)
    if fusion == "prefix":
        only = media_batch(module.config, [media_rows()[1]])  # type: ignore[arg-type]
        assert torch.equal(module(only)[0].hidden, plain(replace(only, modalities={}))[0].hidden)


def _plain_keys() -> set[str]:
    from glowflow.config.architectures import TransformerConfig

    return set(TransformerConfig.model_fields)


@pytest.mark.parametrize(("fusion", "task"), TASKS)
def test_a_medium_that_is_not_present_leaves_no_trace(fusion: str, task: str) -> None:
    module = make(fusion, task)
    rows: list[Row] = [[1, picture(0, present=False), 2, sound(0), 3], [1, sound(1, present=False), picture(1), 4]]
    batch = media_batch(module.config, rows)
    want = readings(module(batch)[0], batch)
    others: list[Row] = [[1, picture(7, present=False), 2, sound(0), 3], [1, sound(7, present=False), picture(1), 4]]
    other = media_batch(module.config, others)
    assert_same(readings(module(other)[0], other), want)
    if not module.config.places_media:  # as if it were not there: only its placeholder is
        gone: list[Row] = [[1, 35, 2, sound(0), 3], [1, 36, picture(1), 4]]
        without = media_batch(module.config, gone)
        assert_same(readings(module(without)[0], without), want)


@pytest.mark.parametrize(("fusion", "task"), TASKS)
def test_a_batch_without_a_modality_is_one_with_a_blank(fusion: str, task: str) -> None:
    module = make(fusion, task)
    batch = media_batch(module.config, [[1, 2, 3], [1, 4]], blanks=2)
    want = readings(module(batch)[0], batch)
    assert_same(readings(module(replace(batch, modalities={}))[0], batch), want)
    assert_same(readings(module(replace(batch, modalities={}, text_index=None))[0], batch), want)


@pytest.mark.parametrize(("fusion", "task"), TASKS)
def test_every_parameter_has_a_finite_gradient_in_every_batch(fusion: str, task: str) -> None:
    module = make(fusion, task, image={"encoder": "conv", "channels": [4, 6], "tokens": 2})
    text: list[Row] = [[1, 2, 3], [1, 4]]
    absent: list[Row] = [[1, picture(0, present=False), 2], [1, sound(0, present=False), 3]]
    batches = {name: media_batch(module.config, rows) for name, rows in (("blanks", text), ("not present", absent))}
    batches["nothing"] = replace(batches["blanks"], modalities={})
    batches["media"] = media_batch(module.config, media_rows())
    for kind, batch in batches.items():
        module.zero_grad()
        objective(module(batch)[0]).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, (kind, name)
            assert parameter.grad.isfinite().all(), (kind, name)
    silent = [name for name, parameter in module.named_parameters() if not parameter.grad.any()]
    # Behind the last attention tokens of media lead to nothing that a class is read from.
    assert all(fusion == "mixture" and task == "classification" and "blocks.1.twins" in name for name in silent)


# -- every rank does the same ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fusion", "task"), TASKS)
def test_every_unit_is_called_once_and_in_order_whatever_the_media(fusion: str, task: str) -> None:
    module = make(fusion, task, image={"encoder": "vit", "patch": 4, "depth": 2, "tokens": 2, "resampler_depth": 2})
    units, called = module.shard_units(), []
    encoders = [module.get_submodule(f"{name}_encoder") for name in module.config.modalities]
    for one in [*units, *encoders]:
        one.register_forward_pre_hook(lambda module, _: called.append(module))
    for rows in (media_rows(), [[1, 2, 3]], [[1, picture(0), 2]], [[1, sound(0), 2]]):
        called.clear()
        module(media_batch(module.config, rows))
        assert [one for one in called if one in units] == units
        assert [one for one in called if one in encoders] == encoders
    held = {parameter for unit in units for parameter in unit.parameters()}
    wide = [name for name, parameter in module.named_parameters() if ".blocks." in name or ".layers." in name]
    assert all(module.get_parameter(name) in held for name in wide)


@pytest.mark.parametrize(("fusion", "task"), TASKS)
def test_a_pass_reads_nothing_back_from_the_device(fusion: str, task: str) -> None:
    config = media_config(**section(fusion, task))
    with FakeTensorMode() as mode:  # whose tensors have no values to read
        module = build_module(config, "cpu")
    given = media_batch(module.config, media_rows())  # type: ignore[arg-type]
    media = {
        name: Modality(*(mode.from_tensor(value) for value in vars(one).values()))
        for name, one in given.modalities.items()
    }
    values = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in vars(given).items()}
    with mode:
        output, _ = module(Batch(**{**values, "modalities": media}))
        objective(output).backward()
    assert output.hidden.shape == (6, given.tokens.shape[1], 32)


# -- counts, roles, refusals -------------------------------------------------------------------------------------------


def test_parameters_and_flops_are_counted() -> None:
    dim, context = 32, 16
    plain = build_module(media_config(image=None, audio=None, fusion="prefix"))
    block = 4 * dim * dim + 3 * dim * 40 + 2 * dim
    attention = 2 * 12 * dim * context
    assert plain.num_parameters() == 2 * block + dim + 37 * dim
    assert plain.flops_per_token(context) == 6 * plain.num_parameters() + attention
    both = {fusion: build_module(media_config(fusion=fusion)) for fusion in FUSIONS}
    for fusion in ("prefix", "mixture", "bottleneck"):  # a token goes through the weights of one modality
        assert both[fusion].flops_per_token(context) == plain.flops_per_token(context)
    gated = 2 * (2 * dim * dim + 3 * dim * 40 + 3 * dim + 2)
    assert both["cross_attention"].flops_per_token(context) == plain.flops_per_token(context) + 6 * gated
    assert both["late"].flops_per_token(context) == plain.flops_per_token(context) + 6 * 2 * dim * dim
    assert both["prefix"].num_embedding_parameters() == 0
    classes = build_module(media_config(fusion="prefix", task="classification"))
    assert classes.num_embedding_parameters() == 37 * dim
    assert classes.flops_per_token(context) == plain.flops_per_token(context) - 6 * (37 - 5) * dim
    towers = build_module(media_config(**section("late", "contrastive")))
    assert towers.num_embedding_parameters() == 37 * dim
    assert towers.flops_per_token(context) == plain.flops_per_token(context) - 6 * 37 * dim


@pytest.mark.parametrize(("fusion", "task"), TASKS)
def test_every_parameter_has_a_start_and_a_role(fusion: str, task: str) -> None:
    module = build_module(media_config(**section(fusion, task), image={"encoder": "vit", "tokens": 3}), "cpu")
    initialize(module, 0)
    kinds: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        assert parameter.isfinite().all(), name
        kinds[name] = module.parameter_role(name).kind
        if parameter.ndim > 1 and not name.endswith(("latents", "fusion.tokens")):
            assert kinds[name] != "vector", name
            assert parameter.std() > 1e-4, name
        elif name.endswith(("bias", "_gate", "logit_scale")):
            assert not parameter.any(), name
    assert kinds["embedding.weight"] == "embedding"
    assert kinds["image_encoder.resampler.latents"] == kinds["image_encoder.missing"] == "vector"
    assert kinds.get("fusion.tokens", "vector") == "vector"
    groups = parameter_groups(module, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(kinds)
    matrices, others = matrix_groups(module, 0.1, width_exponent=1.0)
    assert sum(len(group["params"]) for group in matrices + others) == len(kinds)


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ({"mup": True}, "model.mup: must be false"),
        ({"fusion": "mixture", "moe": {"experts": 2}}, "model.moe: must be null for fusion mixture"),
        ({"fusion": "bottleneck", "attention": {"kind": "linear"}}, "model.attention.kind: must be dense"),
        ({"fusion": "bottleneck", "position": "alibi"}, "model.position: must be rope or none"),
        ({"fusion": "bottleneck", "bottleneck": {"from_layer": 2}}, "model.bottleneck.from_layer: must be below"),
        ({"position": "learned"}, "model.position: must be rope, alibi or none"),
        ({"fusion": "prefix", "task": "contrastive", "audio": None}, "model.fusion: must be late"),
        ({"fusion": "late", "task": "contrastive"}, "contrasts text with one modality"),
        ({"num_classes": 3}, "model.num_classes: has no effect"),
    ],
)
def test_what_does_not_go_together_is_refused(model: dict[str, Any], rule: str) -> None:
    with pytest.raises((ConfigError, ValueError)) as caught:
        media_config(**model)
    assert rule.replace("model.", "") in str(caught.value).replace("model.", "")


def test_classes_must_be_known() -> None:
    with pytest.raises(ConfigError, match=r"model\.num_classes: must be known"):
        build_module(media_config(task="classification", num_classes=None))


@pytest.mark.parametrize("task", ["language_modelling", "classification"])
def test_documents_of_a_row_see_the_bottleneck_but_not_each_other(task: str) -> None:
    module = make("bottleneck", task)
    batch = media_batch(module.config, media_rows())
    want = module(batch)[0].hidden
    marked = replace(batch, single_document=False)
    assert_same(readings(module(marked)[0], batch), readings(module(batch)[0], batch))
    marked.document_ids = (torch.arange(batch.tokens.shape[1]) >= 3).long().expand_as(batch.tokens)
    got = module(marked)[0].hidden
    assert not torch.allclose(got[:, 3:5], want[:, 3:5])
    if task == "language_modelling":
        torch.testing.assert_close(got[:, :3], want[:, :3], rtol=1e-10, atol=1e-10)
        other = replace(marked, tokens=batch.tokens.clone())
        other.tokens[:, 1] = (other.tokens[:, 1] + 1) % 30
        torch.testing.assert_close(module(other)[0].hidden[:, 3:], got[:, 3:], rtol=1e-10, atol=1e-10)


class Louder(Multimodal):
    """An architecture of somebody else's, derived from ours."""

    def vectors(self, tokens_bt: Tensor) -> Tensor:
        return 2 * super().vectors(tokens_bt)


@pytest.mark.parametrize(("fusion", "task"), TASKS[::2])
def test_a_derived_architecture_is_tried_like_any_other(fusion: str, task: str) -> None:
    values = media_config(**section(fusion, task)).model.model_dump()
    config = GlowFlowConfig(model={**values, "arch": f"{__name__}:Louder"}, data={"audio": {"mels": 6}})
    assert validate_architecture(config) == []


def test_a_model_is_saved_and_loaded(tmp_path: Any) -> None:
    model = GlowFlowModel(media_config(fusion="mixture"))
    model.save(tmp_path / "model.safetensors")
    again = GlowFlowModel.load(tmp_path / "model.safetensors")
    batch = media_batch(model.module.config, media_rows())  # type: ignore[arg-type]
    assert torch.equal(again.module(batch)[0].hidden, model.module(batch)[0].hidden)
    assert isinstance(again.module, Transformer) and isinstance(again.module.fusion, nn.Module)
