"""``glowflow import`` and ``glowflow export`` from end to end: every command takes what was read, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow.cli.main import run
from glowflow.config.loader import load_config
from glowflow.core.conversion.huggingface import write_huggingface
from glowflow.core.model import GlowFlowModel, read_single_file
from glowflow.data.processors.text import BpeTokenizer, load_tokenizer_file, train_tokenizer
from tests.core.foreign import VOCABULARY, TinyLlama, tokenizer_bin
from tests.core.test_conversion import PUBLISHED

from .conftest import Workshop

Run = Callable[..., str]
TEXTS = ["the quick brown fox\n", "naïve café – 戦場 🙂\n\tthe fox"] * 8
FAST = [
    *("data.context=16", "training.batch_size=4", "training.max_steps=2", "training.warmup_steps=0"),
    *("training.val_batches=1", "training.threads=1", "resources.accelerator=cpu", "tracking.backend=jsonl"),
    *("tracking.system_metrics=false", "training.seed=0"),
]


@pytest.fixture
def glowflow(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must succeed; gives back what it printed on stdout."""

    def call(*args: object) -> str:
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must fail for the user's sake; gives back its message."""

    def call(*args: object) -> str:
        capsys.readouterr()
        assert run([str(arg) for arg in args]) == 2
        return capsys.readouterr().err

    return call


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A file of llama2.c with its tokenizer beside it."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "tokenizer.bin").write_bytes(tokenizer_bin())
    return TinyLlama().write(folder / "tiny.bin")


def byte_fallback_json() -> str:
    """A tokenizer.json as Llama 2 has it: pieces with ``▁`` for a space, and bytes for what they lack."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁tehqu", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    engine = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    engine.decoder = decoders.Sequence(strip)
    engine.add_special_tokens(["<unk>", "<s>", "</s>"])
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(engine.to_str())


GPT2 = {"norm": "layernorm", "norm_eps": 1e-5, "bias": True, "position": "learned", "max_positions": 24}
GPT2 |= {"ffn": "gelu_tanh", "dim": 16, "depth": 1, "heads": 2}
LLAMA = {"dim": 16, "depth": 1, "heads": 2, "kv_heads": 1, "tie_embeddings": False}


def folder_of(path: Path, model: dict[str, Any], tokenizer: str, rows: int) -> GlowFlowModel:
    """A Hugging Face folder of random weights with this tokenizer.json."""
    made = GlowFlowModel(load_config({"model": {**model, "vocab_size": rows}, "data": {"context": 24}}))
    files = {"tokenizer.json": tokenizer.encode()}
    write_huggingface(path, made.config.model, 24, made.module.state_dict(), files=files)
    return made


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``~/.cache`` is a folder of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_published_text_of_stories260k(glowflow: Run, glowflow_data: Path, tmp_path: Path) -> None:
    folder, out = glowflow_data / "stories260K", tmp_path / "stories.safetensors"
    glowflow("import", folder / "stories260K.bin", out)
    assert glowflow("generate", out, "--temperature", 0, "--max-tokens", 200) == f"{PUBLISHED}\n"
    begun = "Once upon a time, there was a little girl"
    text = glowflow("generate", out, "--temperature", 0, "--max-tokens", 30, "--prompt", begun)
    assert text.startswith(f"{begun} named Lily. She loved to play outside in the park.")


def test_a_llama2c_file_becomes_what_every_command_takes(
    glowflow: Run, tiny: Path, workshop: Workshop, tmp_path: Path
) -> None:
    out = tmp_path / "tiny.safetensors"
    assert glowflow("import", tiny, out) == ""
    content = read_single_file(out)
    assert content["tokenizer"]["kind"] == "llama2c" and content["step"] == 0
    assert content["config"]["data"]["context"] == 32
    assert content["config"]["data"]["tokenizer"] == str(tiny.parent / "tokenizer.bin")
    (tiny.parent / "tokenizer.bin").unlink()  # from here on the checkpoint alone must do

    greedy = ("--temperature", 0, "--max-tokens", 12)
    text = glowflow("generate", out, "--prompt", "the quick", *greedy)
    assert text.startswith("the quick") and text == glowflow("generate", out, "--prompt", "the quick", *greedy)
    evaluated = json.loads(glowflow("eval", out, "--dataset", workshop.text, "--split", "train", "--json"))
    assert evaluated["loss"] > 1 and evaluated["text_bytes"] > 0

    storage = f"tracking.storage={tmp_path / 'runs'}"
    data = [f"data.dataset={workshop.text}", storage]
    record = json.loads(glowflow("train", "--from", out, "--local", "--run", "tuned", "--json", *FAST, *data))
    assert record["status"] == "FINISHED" and record["steps"] == 2
    tuned = read_single_file(tmp_path / "runs/tuned/checkpoints/model-2.pt")
    assert tuned["config"]["model"] == content["config"]["model"] and tuned["tokenizer"] == content["tokenizer"]
    moved = [float((tuned["state_dict"][name] - tensor).abs().max()) for name, tensor in content["state_dict"].items()]
    assert 0 < max(moved) < 0.05  # two small steps from the imported weights, not from the seed's
    again = json.loads(glowflow("eval", "tuned", "--storage", tmp_path / "runs", "--split", "train", "--json"))
    assert again["loss"] < evaluated["loss"] and again["data_fingerprint"] == evaluated["data_fingerprint"]

    for version in (0, 1):
        glowflow("export", "llama2c", out, tmp_path / "back.bin", "--version", version)
        assert (tmp_path / "back.bin").read_bytes() == TinyLlama().content(version)
    glowflow("export", out, tmp_path / "again.pt")
    assert read_single_file(tmp_path / "again.pt")["digest"] == content["digest"]
    glowflow("export", "hf", out, tmp_path / "folder")
    glowflow("import", tmp_path / "folder", tmp_path / "third.pt")
    assert read_single_file(tmp_path / "third.pt")["digest"] == content["digest"]


def test_a_config_beside_the_weights_gives_everything_but_the_model(
    glowflow: Run, refused: Run, tiny: Path, workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, config = tmp_path / "tiny.safetensors", tmp_path / "tune.yaml"
    glowflow("import", tiny, out)
    config.write_text(
        f"model: {{dim: 64}}\ndata: {{dataset: {workshop.text}, tokenizer: bytes, context: 8}}\n"
        f"training: {{lr: 1.0e-4}}\ntracking: {{storage: {tmp_path / 'runs'}}}\n"
    )
    fast = [item for item in FAST if "context" not in item]
    record = json.loads(glowflow("train", config, "--from", out, "--local", "--json", *fast, "model.dropout=0.1"))
    assert record["run"].startswith("tune") and "its section model is not used" in caplog.text
    used = record["config"]
    assert (used["model"]["dim"], used["model"]["dropout"], used["model"]["vocab_size"]) == (16, 0.1, VOCABULARY)
    assert (used["data"]["context"], used["training"]["lr"]) == (8, 1e-4)
    assert used["data"]["tokenizer"].endswith("tokenizer.bin")
    assert "shape" in refused("train", config, "--from", out, "--local", "model.dim=32")
    message = refused("train", config, "--from", out, "--local", "model.mup=true", "model.base_dim=8")
    assert "maximal-update parametrisation" in message
    built = f"data.dataset={workshop.built}"  # of bytes
    assert "another tokenizer" in refused("train", "--from", out, "--local", built, *FAST)
    assert "cannot be given with --resume" in refused("train", "--from", out, "--resume", "x")
    assert "does not exist" in refused("train", "--from", tmp_path / "none.pt", "--local")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_hugging_face_folder_and_its_tokenizer_go_both_ways(
    glowflow: Run, tmp_path: Path, family: str, workshop: Workshop
) -> None:
    if family == "gpt2":
        bpe = train_tokenizer("bpe", TEXTS, 280)
        assert isinstance(bpe, BpeTokenizer)
        given, model = bpe.content, GPT2
    else:
        given, model = byte_fallback_json(), LLAMA
    rows = BpeTokenizer(given).vocab_size + 3  # padded, as vocabularies often are
    made = folder_of(tmp_path / "theirs", model, given, rows)
    glowflow("import", tmp_path / "theirs", tmp_path / "ours.safetensors")
    ours = GlowFlowModel.load(tmp_path / "ours.safetensors")
    assert ours.config.model.vocab_size == rows and ours.config.data.context == 24
    for name, tensor in made.module.state_dict().items():
        assert torch.equal(ours.module.state_dict()[name], tensor)
    glowflow("generate", tmp_path / "ours.safetensors", "--max-tokens", 5, "--prompt", "the")
    glowflow("export", "hf", tmp_path / "ours.safetensors", tmp_path / "back")
    tokenizer = load_tokenizer_file(tmp_path / "back/tokenizer.json")
    assert tokenizer.fingerprint == load_tokenizer_file(tmp_path / "theirs/tokenizer.json").fingerprint
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    glowflow("import", tmp_path / "back", tmp_path / "third.safetensors")
    digests = {read_single_file(tmp_path / f"{name}.safetensors")["digest"] for name in ("ours", "third")}
    assert len(digests) == 1

    reason = "the comparison needs transformers (pip install -e .[dev])"
    transformers = pytest.importorskip("transformers", reason=reason)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
        assert theirs.decode(tokenizer.encode(text).tolist()) == text
    assert theirs.bos_token_id == tokenizer.bos_id


def test_a_foreign_tokenizer_reads_documents_as_its_model_knows_them() -> None:
    tokenizer = BpeTokenizer(byte_fallback_json())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 268)
    # ▁the ▁ q u, with the space in front; é as its two bytes; no <s> but the document's own.
    assert tokenizer.encode_document("the qué").tolist() == [1, 267, 259, 263, 264, 0xC3 + 3, 0xA9 + 3, 2]
    for text in ("the the", " the", "</s>", "戦場 🙂", ""):
        assert tokenizer.decode(tokenizer.encode_document(text)) == text
        assert not {1, 2} & set(tokenizer.encode(text).tolist())


def test_a_tokenizer_must_be_there_and_fit(refused: Run, glowflow: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    large = tmp_path / "large.bin"
    large.write_bytes(tokenizer_bin([f"word{number}" for number in range(40)]))
    message = refused("import", tiny, out, "--tokenizer", large)
    assert f"has 395 tokens, but the model in {tiny} knows {VOCABULARY}" in message and not out.exists()
    assert "must be a tokenizer.json, or a tokenizer.bin" in refused(
        "import", tiny, out, "--tokenizer", tmp_path / "x.bin"
    )
    (tmp_path / "tok.model").write_bytes(b"\x0a\x0e")
    assert "sentencepiece" in refused("import", tiny, out, "--tokenizer", tmp_path / "tok.model")
    assert "is no tokenizer.bin of llama2.c" in refused("import", tiny, out, "--tokenizer", tiny)
    (tmp_path / "bad.json").write_text("{}")
    assert "is no valid tokenizer.json" in refused("import", tiny, out, "--tokenizer", tmp_path / "bad.json")

    beside = tiny.parent / "tokenizer.bin"
    beside.rename(tiny.parent / "tok372.bin")
    glowflow("import", tiny, out)
    (tiny.parent / "tok373.bin").write_bytes(tokenizer_bin())
    assert "beside the weights lie tok372.bin, tok373.bin" in refused("import", tiny, out)
    for path in tiny.parent.glob("tok*.bin"):
        path.unlink()
    assert "must be given: neither tokenizer.json nor tok*.bin" in refused("import", tiny, out)
    assert "OUT: must end in .pt or .safetensors" in refused("import", tiny, tmp_path / "out.bin")


def test_bad_sources_and_models_are_one_message(refused: Run, workshop: Workshop, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    cut = tmp_path / "cut.bin"
    cut.write_bytes(tiny.read_bytes()[:-100])
    assert refused("import", cut, out).count("\n") == 1 and "is truncated" in refused("import", cut, out)
    assert "config.json: does not exist" in refused("import", tmp_path, out)
    storage = ("--storage", workshop.storage)
    message = refused("export", "llama2c", workshop.run, tmp_path / "x.bin", *storage)
    assert "model.norm_eps: must be 1e-05 for llama2.c" in message
    message = refused("export", workshop.run, tmp_path / "x.bin", *storage)
    assert "must end in .pt or .safetensors" in message and "glowflow export llama2c" in message
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "must be new or an empty folder" in refused("export", "hf", workshop.run, tmp_path / "full", *storage)


def test_a_trained_run_is_exported_as_a_llama(glowflow: Run, workshop: Workshop, tmp_path: Path) -> None:
    storage = ("--storage", workshop.storage)
    glowflow("export", "hf", workshop.run, tmp_path / "folder", "--dtype", "bf16", *storage)
    names = {path.name for path in (tmp_path / "folder").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }  # of bytes there is no tokenizer.json
    assert json.loads((tmp_path / "folder/config.json").read_text())["model_type"] == "llama"
    assert "llama2c" in glowflow("export", "--help")
