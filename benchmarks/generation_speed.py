"""Greedy generation with a key/value cache beside recomputing the prefix and beside transformers' ``generate``.

    PYTHONPATH=. python benchmarks/generation_speed.py [--tokens 512] [--rounds 7] [--threads 1] [--skip-recomputing]

A 25 M-parameter transformer (8 layers of width 512, vocabulary 4096) against transformers' Llama of the same shape,
both with random weights, fp32, batch 1, a short prompt, on the CPU. They take turns. Printed are the median
milliseconds per token and the median of the ratios within a round. Recomputing (a forward pass over everything so far
for every token) is measured last and once, since it takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from glowflow.config.loader import load_config
from glowflow.core.allocator import keep_freed_memory
from glowflow.core.generation import SamplingOptions, generate
from glowflow.core.model import GlowFlowModel

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
WIDTH, LAYERS, HEADS, HIDDEN, VOCABULARY = 512, 8, 8, 1368, 4096


def ours(tokens: int) -> tuple[Callable[[bool], list[int]], int]:
    """Greedy decoding with (True) or without a cache, and the number of parameters."""
    model = {"arch": "transformer", "dim": WIDTH, "depth": LAYERS, "heads": HEADS, "ffn_dim": HIDDEN}
    config = {"model": {**model, "vocab_size": VOCABULARY}, "data": {"context": len(PROMPT) + tokens}}
    module = GlowFlowModel(load_config(config)).module.eval()
    context, greedy = len(PROMPT) + tokens, SamplingOptions(temperature=0)
    return (
        lambda cached: list(generate(module, PROMPT, tokens, context, greedy, cached=cached)),
        module.num_parameters(),
    )


def theirs(tokens: int) -> tuple[Callable[[], object], int]:
    """transformers' greedy decoding with a cache, and the number of parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        max_position_embeddings=len(PROMPT) + tokens,
        tie_word_embeddings=True,
    )
    model, prompt = LlamaForCausalLM(config).eval(), torch.tensor([PROMPT])
    # The same number of tokens whatever the random weights say: no token ends the text.
    model.generation_config.eos_token_id = None

    def run() -> object:
        mask = torch.ones_like(prompt)
        found = model.generate(
            prompt, attention_mask=mask, do_sample=False, use_cache=True, max_new_tokens=tokens, pad_token_id=0
        )
        assert found.shape[1] == len(PROMPT) + tokens
        return found

    return run, sum(parameter.numel() for parameter in model.parameters())


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-recomputing", action="store_true", help="leave out what takes minutes")
    given = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    write, own_parameters = ours(given.tokens)
    write_theirs, their_parameters = theirs(given.tokens)
    seconds: dict[str, list[float]] = {"glowflow, cached": [], "transformers, cached": []}
    for number in range(given.rounds + 1):
        for name, run in zip(seconds, (lambda: write(True), write_theirs), strict=True):
            taken = timed(run)
            if number:  # the first round warms up
                seconds[name].append(taken)
    print(f"{own_parameters:,} and {their_parameters:,} parameters, {given.tokens} tokens, {given.threads} threads")
    print(f"{given.rounds} rounds, torch {torch.__version__}")
    for name, each in seconds.items():
        print(f"{name:24} {1000 * statistics.median(each) / given.tokens:8.2f} ms per token")
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    print(f"{'glowflow / transformers':24} {ratio:8.3f}")
    if given.skip_recomputing:
        return
    found: list[list[int]] = []
    recomputing = timed(lambda: found.append(write(False)))
    cached = timed(lambda: found.append(write(True)))
    print(f"{'glowflow, recomputing':24} {1000 * recomputing / given.tokens:8.2f} ms per token")
    print(f"{'recomputing / cached':24} {recomputing / statistics.median(seconds['glowflow, cached']):8.2f}")
    print(f"{'':24} {recomputing / cached:8.2f} (cached measured right after); the same tokens: {found[0] == found[1]}")


if __name__ == "__main__":
    main()
