"""Encoders: definitions, sizes, padding, the resampler, frozen and given weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.config.errors import CheckpointError, ConfigError
from glowflow.config.multimodal import AudioEncoderConfig, ImageEncoderConfig
from glowflow.core.architectures.base import InitSpec
from glowflow.core.differentiation import twice_differentiable
from glowflow.core.encoders.blocks import EncoderBlock, Resampler
from glowflow.core.encoders.encoder import MediaEncoder, build_encoder
from glowflow.core.encoders.positions import grid_positions, line_positions
from glowflow.core.encoders.weights import encoder_state
from glowflow.core.initialization import draw, initialize
from glowflow.core.model import GlowFlowModel, build_module
from glowflow.core.optim import build_optimizer
from tests.core.media_batches import CHANNELS, media_batch, media_config, media_rows

IMAGE: dict[str, dict[str, Any]] = {
    "vit": {"encoder": "vit", "patch": 4, "depth": 2, "heads": 2},
    "conv": {"encoder": "conv", "channels": [6, 10], "depth": 1, "heads": 2},
    "conv without blocks": {"encoder": "conv", "channels": [6, 10], "depth": 0, "heads": 2},
    "linear": {"encoder": "linear", "patch": 4, "heads": 2},
    "resampled": {"encoder": "vit", "patch": 4, "depth": 1, "heads": 2, "tokens": 3, "resampler_depth": 2, "dim": 20},
}
AUDIO: dict[str, dict[str, Any]] = {
    "conv": {"encoder": "conv", "channels": [8, 12, 10], "depth": 1, "heads": 2},
    "conv of one layer": {"encoder": "conv", "channels": [8], "depth": 0, "heads": 2},
    "linear": {"encoder": "linear", "patch": 4, "heads": 2},
    "resampled": {"encoder": "conv", "channels": [8, 12], "depth": 1, "heads": 2, "tokens": 2},
}
CASES = [("image", name) for name in IMAGE] + [("audio", name) for name in AUDIO]


def make(modality: str, **section: Any) -> MediaEncoder:
    """An encoder alone, in float64."""
    config = media_config(**{modality: section}).model
    known = config.reading(**CHANNELS)  # type: ignore[attr-defined]
    encoder = build_encoder(modality, known).double()
    fill(encoder, lambda name: encoder.init_spec(name, 0.5))
    return encoder


def fill(module: nn.Module, spec: Callable[[str], InitSpec]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(draw(spec(name), parameter.shape, 0, name, parameter.dtype))


def section(modality: str, name: str) -> dict[str, Any]:
    return (IMAGE if modality == "image" else AUDIO)[name]


@lru_cache
def made(modality: str, name: str) -> MediaEncoder:
    return make(modality, **section(modality, name))


def features(modality: str, *size: int, items: int = 1, seed: int = 0) -> Tensor:
    shape = (items, CHANNELS["image"], *size) if modality == "image" else (items, *size, CHANNELS["audio"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- positions --------------------------------------------------------------------------------------------------------


def test_positions_are_sines_and_cosines_of_row_and_column() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    grid = grid_positions(3, 5, 12, like).view(3, 5, 12)
    for row in range(3):
        for column in range(5):
            want = []
            for place in (row, column):
                angles = [place * 10_000 ** -(i / 3) for i in range(3)]
                want += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(grid[row, column], torch.tensor(want, dtype=torch.float64))
    # A larger grid has the same positions where the smaller one has some.
    assert torch.equal(grid_positions(4, 7, 12, like).view(4, 7, 12)[:3, :5], grid)
    frequencies = 10_000 ** -(torch.arange(3, dtype=torch.float64) / 3)
    assert torch.equal(line_positions(4, 6, like)[:, :3], torch.outer(torch.arange(4.0).double(), frequencies).sin())


@pytest.mark.parametrize("dim", [1, 2, 3, 6, 7])
def test_positions_of_any_width_tell_all_cells_apart(dim: int) -> None:
    grid = grid_positions(4, 5, dim, torch.zeros(1))
    assert grid.shape == (20, dim) and grid.abs().max() <= 1
    if dim >= 4:
        assert len(set(map(tuple, grid.tolist()))) == 20


# -- stems against their definitions ----------------------------------------------------------------------------------


def test_patches_are_a_convolution_with_the_patch_as_stride() -> None:
    encoder = make("image", **IMAGE["linear"])
    x = features("image", 10, 13, items=2)
    kernel = encoder.stem.projection.weight.view(32, CHANNELS["image"], 4, 4)
    want = F.conv2d(F.pad(x, (0, 3, 0, 2)), kernel, encoder.stem.projection.bias, stride=4)  # 12 x 16: 3 x 4 patches
    want = want.flatten(2).transpose(1, 2) + grid_positions(3, 4, 32, x)
    got, valid = encoder.stem(x, torch.tensor([[10, 13], [10, 13]]))
    torch.testing.assert_close(got, want)
    assert valid.all()
    tokens, _ = encoder(x, torch.tensor([[10, 13], [10, 13]]))
    torch.testing.assert_close(tokens, encoder.projection(F.layer_norm(want, (32,), eps=1e-6)))


def test_convolutions_of_a_picture_alone() -> None:
    encoder = make("image", **IMAGE["conv without blocks"])
    x = features("image", 9, 6)
    want, stem = x, encoder.stem
    for convolution in stem.convolutions:
        want = F.conv2d(want, convolution.weight, convolution.bias, stride=2, padding=1)
        want = F.gelu(F.layer_norm(want.movedim(1, -1), (want.shape[1],), eps=1e-6)).movedim(-1, 1)
    assert want.shape[2:] == (3, 2)
    want = F.linear(want.flatten(2).mT, stem.projection.weight, stem.projection.bias) + grid_positions(3, 2, 32, x)
    torch.testing.assert_close(encoder.stem(x, torch.tensor([[9, 6]]))[0], want)


def test_convolutions_and_patches_of_a_recording_alone() -> None:
    x = features("audio", 11)
    encoder = make("audio", **AUDIO["conv"])
    want = x.mT
    for layer, convolution in enumerate(encoder.stem.convolutions):
        want = F.conv1d(want, convolution.weight, convolution.bias, stride=2 if layer else 1, padding=1)
        want = F.gelu(F.layer_norm(want.mT, (want.shape[1],), eps=1e-6)).mT
    assert want.shape[2] == 3
    projection = encoder.stem.projection
    want = F.linear(want.mT, projection.weight, projection.bias) + line_positions(3, 32, x)
    torch.testing.assert_close(encoder.stem(x, torch.tensor([[11]]))[0], want)
    encoder = make("audio", **AUDIO["linear"])
    projection = encoder.stem.projection
    whole = torch.cat((x[0], torch.zeros(1, CHANNELS["audio"], dtype=torch.float64)))
    want = torch.stack([projection(whole[start : start + 4].flatten()) for start in (0, 4, 8)])
    torch.testing.assert_close(encoder.stem(x, torch.tensor([[11]]))[0][0], want + line_positions(3, 32, x))


# -- sizes and padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("modality", "name"), CASES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_padding_changes_nothing_and_tokens_are_as_many_as_the_config_says(
    modality: str, name: str, data: st.DataObject
) -> None:
    encoder = made(modality, name)
    config = (ImageEncoderConfig if modality == "image" else AudioEncoderConfig)(**section(modality, name))
    side = st.integers(1, 13)
    sizes = data.draw(
        st.lists(st.tuples(side, side) if modality == "image" else st.tuples(side), min_size=1, max_size=3)
    )
    alone = [features(modality, *size, seed=index) for index, size in enumerate(sizes)]
    whole = [max(parts) + data.draw(st.integers(0, 5)) for parts in zip(*sizes, strict=True)]
    padded = features(modality, *whole, items=len(sizes), seed=99)  # what lies behind an item need not be zero
    for item, (one, size) in enumerate(zip(alone, sizes, strict=True)):
        inside = tuple(slice(length) for length in size)
        padded[(item, slice(None), *inside) if modality == "image" else (item, *inside)] = one[0]
    tokens, valid = encoder(padded, torch.tensor(sizes))
    assert tokens.shape[1] == config.num_tokens(*whole)
    for item, (one, size) in enumerate(zip(alone, sizes, strict=True)):
        want, everything = encoder(one, torch.tensor([size]))
        count = config.num_tokens(*size)
        assert everything.all() and want.shape[1] == count
        assert valid[item].tolist() == [place < count for place in range(tokens.shape[1])]
        torch.testing.assert_close(tokens[item, :count], want[0], rtol=1e-9, atol=1e-9)


def test_a_blank_of_no_size_gives_numbers() -> None:
    for modality, name in CASES:
        encoder = make(modality, **section(modality, name))
        blank = torch.zeros_like(features(modality, *((5, 5) if modality == "image" else (5,)), items=2))
        tokens, valid = encoder(blank, torch.zeros(2, 2 if modality == "image" else 1, dtype=torch.int64))
        assert tokens.isfinite().all() and valid[:, 0].all()
        tokens.sum().backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for n, p in encoder.named_parameters() if n != "missing"
        )


# -- blocks and resampler ---------------------------------------------------------------------------------------------


def heads_by_hand(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor) -> Tensor:
    parts = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = (a @ b.mT / a.shape[-1] ** 0.5).masked_fill(~seen[:, None], -torch.inf)
        parts.append(scores.softmax(-1) @ c)
    return torch.cat(parts, -1)


def test_a_block_is_its_definition_and_has_a_second_derivative() -> None:
    block = EncoderBlock(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    y = block.attention_norm(x)
    read = heads_by_hand(block.attention.q(y), *block.attention.kv(y).chunk(2, -1), 3, valid)
    want = x + block.attention.out(read)
    want = want + block.feed_forward.down(F.gelu(block.feed_forward.up(block.feed_forward_norm(want))))
    torch.testing.assert_close(block(x, valid), want)
    with twice_differentiable():
        twice = block(x, valid)
    torch.testing.assert_close(twice, want)
    (gradient,) = torch.autograd.grad(twice.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), x)[0].isfinite().all()


def test_the_resampler_is_its_definition() -> None:
    resampler = Resampler(12, 3, depth=2, heads=2).double()
    with torch.no_grad():
        resampler.latents.normal_()
    v = torch.randn(2, 5, 12, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    z = resampler.latents.expand(2, -1, -1)
    seen = torch.cat((valid, torch.ones(2, 3, dtype=torch.bool)), 1)
    for layer in resampler.layers:
        q = layer.latent_norm(z)
        source = torch.cat((layer.media_norm(v), q), 1)
        z = z + layer.attention.out(
            heads_by_hand(layer.attention.q(q), *layer.attention.kv(source).chunk(2, -1), 2, seen)
        )
        z = z + layer.feed_forward.down(F.gelu(layer.feed_forward.up(layer.feed_forward_norm(z))))
    torch.testing.assert_close(resampler(v, valid), resampler.norm(z))


# -- weights ----------------------------------------------------------------------------------------------------------


def test_first_values_keep_the_size_of_what_goes_through() -> None:
    for modality, name in CASES:
        module = build_module(media_config(dim=64, **{modality: section(modality, name)}), "cpu")
        initialize(module, 0)
        encoder = module.get_submodule(f"{modality}_encoder")
        x = features(modality, *((16, 16) if modality == "image" else (32,)), items=8).float()
        tokens, _ = encoder(x, torch.tensor([list(x.shape[2:])] * 8 if modality == "image" else [[32]] * 8))
        assert 0.5 < tokens.std() / 0.02 < 2, (modality, name)  # as the vectors of the token embedding
        assert encoder.missing.std() < 0.04
    assert module.parameter_role("audio_encoder.resampler.latents").kind == "vector"
    assert module.parameter_role("audio_encoder.stem.convolutions.0.weight").fan_in == 3 * CHANNELS["audio"]
    assert module.init_spec("audio_encoder.stem.convolutions.0.weight").std == pytest.approx(18**-0.5)


def test_no_norm_looks_at_the_whole_batch() -> None:
    for modality, name in CASES:
        encoder = make(modality, **section(modality, name))
        forbidden = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
        assert not [module for module in encoder.modules() if isinstance(module, forbidden)]
        assert not list(encoder.buffers())


def test_a_frozen_encoder_stays_as_it_is_and_its_projection_is_trained() -> None:
    image = {**IMAGE["resampled"], "frozen": True, "dropout": 0.5}
    config = media_config(image=image)
    module = build_module(config, "cpu")
    initialize(module, 0)
    optimizer = build_optimizer(module, config)
    before = {name: value.clone() for name, value in module.named_parameters()}
    output, _ = module(media_batch(module.config, media_rows()))  # type: ignore[arg-type]
    output.loss_sum.backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    body = ("image_encoder.stem", "image_encoder.blocks", "image_encoder.norm")
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad != name.startswith(body), name
        assert torch.equal(parameter, before[name]) == name.startswith(body), name


def test_input_channels_are_those_of_the_data() -> None:
    config = media_config()
    module = build_module(config)
    assert (module.config.image.in_channels, module.config.audio.in_channels) == (3, 6)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"model\.image\.in_channels: must be known"):
        type(module)(config.model)
    wrong = media_config(audio={**AUDIO["linear"], "in_channels": 7})
    with pytest.raises(ConfigError, match=r"model\.audio\.in_channels: must be 6, as data\.audio\.mels"):
        build_module(wrong)


# -- checkpoints of encoders ------------------------------------------------------------------------------------------


@pytest.fixture
def trained() -> GlowFlowModel:
    model = GlowFlowModel(media_config(image=IMAGE["resampled"]))
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(1.0)
    return model


def encoder_of(state: dict[str, Tensor], prefix: str = "image_encoder.") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "encoder alone"])
def test_a_model_starts_from_an_encoder_s_weights(
    trained: GlowFlowModel, tmp_path: Path, suffix: str, whole: bool
) -> None:
    path = tmp_path / f"weights{suffix}"
    state = trained.module.state_dict()
    if whole:
        trained.save(path)
    elif suffix == ".pt":
        torch.save(encoder_of(state), path)
    else:
        from safetensors.torch import save_file

        save_file({name: value.clone() for name, value in encoder_of(state).items()}, str(path))
    # The same encoder in a wider model: what leads out of it starts anew.
    for dim, kept in ((32, True), (48, False)):
        config = media_config(dim=dim, image={**IMAGE["resampled"], "checkpoint": str(path), "frozen": True})
        fresh, started = (build_module(one, "cpu") for one in (media_config(dim=dim, image=IMAGE["resampled"]), config))
        initialize(fresh, 0)
        initialize(started, 0)
        for name, value in started.named_parameters():
            part = name.split(".")[1]
            given = name.startswith("image_encoder.") and (kept or part in ("stem", "blocks", "norm", "resampler"))
            assert torch.equal(value, state[name] if given else fresh.get_parameter(name)), name


def test_weights_that_do_not_fit_are_named(trained: GlowFlowModel, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    state = encoder_of(trained.module.state_dict())
    state["stem.extra"] = state.pop("blocks.0.attention.q.bias")
    state["stem.projection.weight"] = state["stem.projection.weight"][:, 1:]
    torch.save(state, path)
    config = media_config(image={**IMAGE["resampled"], "checkpoint": str(path)})
    with pytest.raises(CheckpointError) as caught:
        initialize(build_module(config, "cpu"), 0)
    text = str(caught.value)
    assert "lacks the tensor blocks.0.attention.q.bias (20,)" in text
    assert "the tensor stem.projection.weight must have the shape (20, 48)" in text and "(20, 47)" in text
    assert "holds an unknown tensor stem.extra" in text


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("none.pt", None, "does not exist"),
        ("weights.bin", b"x", "must end in .pt or .safetensors"),
        ("cut.pt", b"PK\x03\x04", "cannot be read"),
        ("cut.safetensors", b"\x05\x00\x00\x00\x00\x00\x00\x00{}", "cannot be read"),
        ("empty.safetensors", (2).to_bytes(8, "little") + b"{}", "holds no tensors"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, name: str, content: bytes | None, rule: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    config = media_config(image={**IMAGE["vit"], "checkpoint": str(path)}).model.reading(**CHANNELS)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=rule) as caught:
        encoder_state(config)
    assert "model.image.checkpoint" in str(caught.value) and json.dumps(name)[1:-1] in str(caught.value)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("pickled code ran",)


def test_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"stem": _Evil()}, path)
    config = media_config(image={**IMAGE["vit"], "checkpoint": str(path)}).model.reading(**CHANNELS)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="cannot be read"):
        encoder_state(config)
    assert "pickled" not in capsys.readouterr().out
