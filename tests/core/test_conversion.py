"""Weights of others: logits equal theirs, the way back gives the same bytes, and bad files are refused by name."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glowflow.config.errors import CheckpointError
from glowflow.config.loader import load_config
from glowflow.core.conversion.huggingface import write_huggingface
from glowflow.core.conversion.layout import Foreign
from glowflow.core.conversion.llama2c import write_llama2c
from glowflow.core.conversion.source import read_foreign
from glowflow.core.generation import SamplingOptions, generate
from glowflow.core.model import GlowFlowModel
from glowflow.data.processors.text import load_tokenizer_file
from tests.core.foreign import TinyLlama

PUBLISHED = (  # the expected output of llama2.c's own test: `run stories260K.bin -z tok512.bin -t 0.0 -n 200`
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, \"I want to "
    "play with your ball, but I can't find it.\"\n"
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
    "Lily didn't want to help her mom, so she"
)


def model_of(foreign: Foreign) -> GlowFlowModel:
    model = GlowFlowModel(load_config({"model": foreign.model, "data": {"context": foreign.context}}))
    model.load_state_dict(foreign.state)
    model.module.eval()
    return model


def scores(model: GlowFlowModel, tokens_bt: Tensor) -> Tensor:
    """All scores, with a cache that is filled in three steps."""
    cache = model.module.new_cache(len(tokens_bt), tokens_bt.shape[1])
    with torch.no_grad():
        return torch.cat([model.module.decode(part, cache) for part in tokens_bt.tensor_split((5, 6), dim=1)], 1)


# -- llama2.c ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_llama2c_gives_the_logits_of_run_c_and_goes_back_byte_for_byte(
    tmp_path: Path, version: int, tied: bool
) -> None:
    tiny = TinyLlama(tied=tied)
    source = tiny.write(tmp_path / "tiny.bin", version)
    foreign = read_foreign(source)
    assert foreign.context == 32 and foreign.described == ("llama2.c, version 1" if version else "llama2.c, legacy")
    model, tokens = model_of(foreign), [1, 300, 7, 300, 12, 259, 3, 370, 370, 0]
    got = scores(model, torch.tensor([tokens]))[0]
    np.testing.assert_allclose(got.numpy(), tiny.logits(tokens), rtol=0, atol=1e-5)
    for back in (0, 1):
        write_llama2c(tmp_path / "back.bin", model.config.model, 32, model.module.state_dict(), back)
        assert (tmp_path / "back.bin").read_bytes() == tiny.content(back)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.bin", "tiny.bin"]


@pytest.mark.parametrize("cached", [True, False])
def test_stories260k_writes_the_published_text_with_and_without_a_cache(glowflow_data: Path, cached: bool) -> None:
    folder = glowflow_data / "stories260K"
    model, tokenizer = model_of(read_foreign(folder / "stories260K.bin")), load_tokenizer_file(folder / "tok512.bin")
    assert model.num_parameters() == 260_032 and model.config.data.context == 512
    steps, greedy = 256 if cached else 200, SamplingOptions(temperature=0, eos_id=tokenizer.eos_id)
    ids = list(generate(model.module, [tokenizer.bos_id], steps, 512, greedy, cached=cached))
    assert len(ids) == steps and tokenizer.decode(ids[:200]) == PUBLISHED
    if cached:  # as many as its page shows
        page = (folder / "stories260K.md").read_text(encoding="utf-8")
        assert f"-t 0.0\n{tokenizer.decode(ids)}\n```" in page


def test_stories260k_goes_back_byte_for_byte(glowflow_data: Path, tmp_path: Path) -> None:
    folder = glowflow_data / "stories260K"
    names = ("stories260K.bin", "stories260K.v1.bin")
    foreign = [read_foreign(folder / name) for name in names]
    for version, name in enumerate(names):
        other = model_of(foreign[1 - version])
        write_llama2c(tmp_path / name, other.config.model, 512, other.module.state_dict(), version)
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


WHOLE = {version: TinyLlama().content(version) for version in (0, 1)}
CUT = [(version, size) for version in (0, 1) for size in (0, 1, 4, 8, 27, 28, 200, 255, 256, 257, 5000, -4, -1)]


@pytest.mark.parametrize(("version", "size"), CUT)
def test_a_truncated_file_of_llama2c_is_refused(tmp_path: Path, version: int, size: int) -> None:
    path = tmp_path / "cut.bin"
    path.write_bytes(WHOLE[version][:size])
    with pytest.raises(CheckpointError, match=r"cut\.bin: is truncated|cut\.bin: is no checkpoint of llama2\.c"):
        read_foreign(path)


def changed(at: int, value: int) -> bytes:
    return WHOLE[0][:at] + struct.pack("<i", value) + WHOLE[0][at + 4 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WHOLE[0] + bytes(4), r"is longer than its header says: [\d,]+ bytes instead of"),
        (np.random.default_rng(1).bytes(5000), "is no checkpoint of llama2.c: its header has no sizes of a model"),
        (bytes(5000), "is no checkpoint of llama2.c"),
        (b"# A text about llamas\n" * 100, "is no checkpoint of llama2.c"),
        (changed(0, 18), "describes a model that cannot be: model.heads: must divide model.dim"),
        (changed(16, 3), "describes a model that cannot be: model.kv_heads"),
        (changed(8, 2_000_000), "its header has no sizes of a model"),
        (changed(8, 3), "is truncated"),
        (struct.pack("<Ii", 0x616B3432, 2) + bytes(5000), r"is quantised \(version 2 of llama2.c\).*fp32"),
        (struct.pack("<Ii", 0x616B3432, 7) + bytes(5000), r"of a version of llama2.c that is not known \(got 7\)"),
        (b"\x80\x02}q\x00." * 100, "is a pickle of PyTorch or a zip, which may run code.*safetensors"),
    ],
)
def test_what_is_no_checkpoint_of_llama2c_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "foreign.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_foreign(path)


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as file:
        file.writestr("data.pkl", b"")
    torch.save({"w": torch.zeros(2)}, tmp_path / "b.pt")
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    for name, message in {
        "a.bin": "is a pickle of PyTorch or a zip",
        "b.pt": "is a pickle of PyTorch or a zip",
        "model.safetensors": "is one file of a Hugging Face folder, or of GlowFlow; give the folder",
        "none.bin": "does not exist",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            read_foreign(tmp_path / name)


def test_every_reason_why_llama2c_cannot_have_a_model_is_given(tmp_path: Path) -> None:
    model = {
        "norm_placement": "sandwich",
        "qk_norm": True,
        "ffn": "gelu",
        "rope_theta": 5e5,
        "vocab_size": 11,
        "dim": 32,
    }
    model |= {"attention": {"kind": "windowed", "window": 3, "sinks": 2}, "bias": "qkv"}
    module = GlowFlowModel(load_config({"model": model})).module
    with pytest.raises(CheckpointError, match=r"cannot be written as llama2\.c: 8 problems") as caught:
        write_llama2c(tmp_path / "x.bin", module.config, 16, module.state_dict())
    keys = {"norm_placement", "qk_norm", "ffn", "rope_theta", "norm_eps", "attention.kind", "attention.sinks", "bias"}
    assert {problem.key for problem in caught.value.problems} == {f"model.{key}" for key in keys}
    assert not list(tmp_path.iterdir())
    recurrent = GlowFlowModel(load_config({"model": {"arch": "transformer-xl", "vocab_size": 11}}))
    with pytest.raises(CheckpointError, match=r"model\.arch: must be transformer for llama2\.c"):
        write_llama2c(tmp_path / "x.bin", recurrent.config.model, 16, {})


# -- Hugging Face -----------------------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61,
    "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 48, "bos_token_id": 1, "eos_token_id": 1
}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 5000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZES, "num_key_value_heads": 4}),
    "llama-tied": ("Llama", {**SIZES, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-gqa": ("Llama", {**SIZES, "num_key_value_heads": 2, "rope_parameters": THETA, "rms_norm_eps": 1e-3}),
    "llama-linear-geglu": (
        "Llama",
        {**SIZES, "num_key_value_heads": 1, "hidden_act": "gelu", "rope_parameters": LINEAR},
    ),
    "llama-attention-bias": ("Llama", {**SIZES, "num_key_value_heads": 2, "attention_bias": True}),
    "llama-bias": ("Llama", {**SIZES, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("Mistral", {**SIZES, "num_key_value_heads": 2, "sliding_window": 7}),
    "mistral-dense": ("Mistral", {**SIZES, "num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {**SIZES, "num_key_value_heads": 2}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"}),
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="the comparison needs transformers (pip install -e .[dev])")


Make = Callable[[str, Path], Any]


@pytest.fixture(scope="module")
def make(transformers: Any) -> Make:
    def made(case: str, folder: Path, **save: Any) -> Any:
        family, options = CASES[case]
        torch.manual_seed(0)
        head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
        model = getattr(transformers, head)(getattr(transformers, f"{family}Config")(**options)).eval()
        with torch.no_grad():  # biases and gains start neutral, and small weights hide positions
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(parameter + 0.3 * noise if parameter.ndim == 1 else 0.15 * noise)
        model.save_pretrained(folder, **save)
        return model

    return made


@pytest.mark.parametrize("case", CASES)
def test_hugging_face_folder_gives_their_logits_and_goes_back_the_same(
    make: Make, transformers: Any, tmp_path: Path, case: str
) -> None:
    theirs = make(case, tmp_path / "theirs")
    model = model_of(read_foreign(tmp_path / "theirs"))
    tokens = torch.randint(0, 61, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(tokens).logits
    assert want.std() > 0.3
    torch.testing.assert_close(scores(model, tokens), want, rtol=0, atol=1e-5)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    back = write_huggingface(
        tmp_path / "back", model.config.model, model.config.data.context, model.module.state_dict(), special_ids=ids
    )
    if case != "mistral-dense":  # which is a Llama in all but name
        first, second = load_file(tmp_path / "theirs/model.safetensors"), load_file(back / "model.safetensors")
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        assert type(transformers.AutoModelForCausalLM.from_pretrained(back)) is type(theirs)
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(back).eval()(tokens).logits
    torch.testing.assert_close(again, want, rtol=0, atol=0)
    assert read_foreign(back).model == model_of(read_foreign(back)).config.model.model_dump(exclude_unset=True)


def test_shards_and_half_precision_are_read_and_written_back(make: Make, tmp_path: Path) -> None:
    model = make("llama-gqa", tmp_path / "whole").bfloat16()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    foreign = read_foreign(tmp_path / "shards")
    assert foreign.described == "Hugging Face llama, bfloat16"
    config = model_of(foreign).config
    back = write_huggingface(tmp_path / "back", config.model, 48, foreign.state, dtype="bf16")
    second = load_file(back / "model.safetensors")
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, second[name]) and second[name].dtype == torch.bfloat16
    (tmp_path / "shards" / files[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{files[1]}: does not exist, but the index names it"):
        read_foreign(tmp_path / "shards")


def edit_config(folder: Path, **values: Any) -> None:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_folders_of_earlier_versions_are_read(make: Make, tmp_path: Path) -> None:
    make("llama-linear-geglu", tmp_path / "llama")
    want = read_foreign(tmp_path / "llama")
    edit_config(tmp_path / "llama", rope_parameters=None, rope_theta=5000.0, head_dim=None)
    edit_config(tmp_path / "llama", rope_scaling={"type": "linear", "factor": 2.0})
    tensors = load_file(tmp_path / "llama/model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "llama/model.safetensors")
    got = read_foreign(tmp_path / "llama")
    assert got.model == want.model and all(torch.equal(got.state[name], want.state[name]) for name in want.state)

    make("gpt2", tmp_path / "gpt2")
    want = read_foreign(tmp_path / "gpt2")
    tensors = load_file(tmp_path / "gpt2/model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "lm_head.weight": tensors["wte.weight"].clone()}
    save_file(tensors, tmp_path / "gpt2/model.safetensors")
    got = read_foreign(tmp_path / "gpt2")
    assert all(torch.equal(got.state[name], want.state[name]) for name in want.state)


@pytest.fixture(scope="module")
def llama(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make("llama-tied", folder)
    return folder


BAD_CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "family": ({"model_type": "bert"}, ["model_type: must be one of llama, mistral, qwen2, gpt2 (got 'bert')"]),
    "everything": (
        {
            "hidden_act": "relu2", "mlp_bias": True, "quantization_config": {"bits": 4}, "head_dim": 16,
            "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        [
            "a llama that GlowFlow has no architecture for: 6 problems", "config.json: hidden_act: must be one of silu",
            "config.json: mlp_bias: must be false", "quantization_config: must be null", "head_dim: must be 8",
            "rope_parameters: must be of the type default or linear", "partial_rotary_factor: must be 1.0",
        ],
    ),
    "missing": ({"hidden_size": None, "vocab_size": "61"}, ["hidden_size: is missing", "vocab_size: must be a number"]),
    "sizes": ({"num_attention_heads": 3, "num_key_value_heads": 3}, ["describes a model that cannot be: model.heads"]),
    "shapes": (
        {"intermediate_size": 60, "num_hidden_layers": 3},
        [
            "tensor model.layers.0.mlp.gate_proj.weight must have the shape (60, 32) (got (56, 32))",
            "lacks the tensor model.layers.2.mlp.up_proj.weight (60, 32)",
        ],
    ),
    "layers": ({"num_hidden_layers": 1}, ["holds an unknown tensor model.layers.1.mlp.up_proj.weight"]),
    "untied": ({"tie_word_embeddings": False}, ["lacks the tensor lm_head.weight (61, 32)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_every_reason_against_a_folder_is_given(llama: Path, tmp_path: Path, case: str) -> None:
    values, messages = BAD_CONFIGS[case]
    folder = shutil.copytree(llama, tmp_path / "bad")
    edit_config(folder, **values)
    with pytest.raises(CheckpointError) as caught:
        read_foreign(folder)
    for message in messages:
        assert message in str(caught.value)


def test_damaged_folders_are_refused(llama: Path, tmp_path: Path) -> None:
    def refused(message: str, **files: bytes | None) -> None:
        folder = shutil.copytree(llama, tmp_path / "bad")
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_foreign(folder)
        shutil.rmtree(folder)

    weights = (llama / "model.safetensors").read_bytes()
    for size in (0, 4, 8, 100, len(weights) - 1):
        refused(r"model\.safetensors: is damaged or no safetensors file", model__safetensors=weights[:size])
    refused("is damaged", model__safetensors=np.random.default_rng(0).bytes(4000))
    refused("has neither model.safetensors nor model.safetensors.index.json$", model__safetensors=None)
    pickled = {"model__safetensors": None, "pytorch_model__bin": b"PK"}
    refused(r"only pytorch_model\.bin; a pickle may run code.*safe_serialization=True", **pickled)
    refused(r"config\.json: does not exist; a Hugging Face folder has it", config__json=None)
    refused(r"config\.json: cannot be read as JSON", config__json=b"{")
    refused(r"config\.json: must hold a mapping", config__json=b"[]")
    index = {"weight_map": {"a": "../model.safetensors", "b": "/x.safetensors"}}
    refused("must name files beside it", model__safetensors__index__json=json.dumps(index).encode())
    refused("must hold a mapping weight_map", model__safetensors__index__json=b"{}")


def test_weights_that_cannot_be_meant_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "bad")
    tensors = load_file(llama / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has tie_word_embeddings, but lm_head\.weight is not the embedding"):
        read_foreign(folder)
    save_file({**tensors, "model.norm.weight": torch.ones(32, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight must hold floating-point numbers"):
        read_foreign(folder)


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ({"ffn": "gelu", "qk_norm": True, "logit_softcap": 3.0}, {"ffn", "qk_norm", "logit_softcap"}),
        ({"position": "alibi", "norm": "layernorm", "moe": {"experts": 2}}, {"position", "norm", "moe"}),
        ({"position": "learned", "parallel_block": True}, {"norm", "bias", "ffn", "parallel_block"}),
        ({"bias": "qkv", "mup": True}, {"mup"}),
        ({"rope_scaling": {"method": "yarn", "factor": 2.0, "original_context": 8}}, {"rope_scaling"}),
        ({"attention": {"kind": "linear"}}, {"attention.kind"}),
        ({"arch": "transformer-xl"}, {"arch"}),
    ],
)
def test_every_reason_why_hugging_face_cannot_have_a_model_is_given(
    tmp_path: Path, model: dict[str, Any], keys: set[str]
) -> None:
    config = load_config({"model": {"vocab_size": 11, "dim": 32, **model}}).model
    with pytest.raises(CheckpointError) as caught:
        write_huggingface(tmp_path / "out", config, 16, {})
    assert {problem.key for problem in caught.value.problems} == {f"model.{key}" for key in keys}
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_not_written_over(tmp_path: Path) -> None:
    model = GlowFlowModel(load_config({"model": {"vocab_size": 11, "dim": 32, "depth": 1}}))
    args = (model.config.model, 16, model.module.state_dict())
    write_huggingface(tmp_path / "out", *args)
    for place in (tmp_path / "out", tmp_path / "out/config.json"):
        with pytest.raises(CheckpointError, match="must be new or an empty folder"):
            write_huggingface(place, *args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
