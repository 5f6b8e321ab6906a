"""Time of one step of each registered optimiser against ``torch.optim.AdamW(foreach=True)``, taking turns.

    PYTHONPATH=. python benchmarks/optimizer_steps.py [--millions 10] [--rounds 15] [--threads 1]

The parameters are those of a transformer of about that size. Gradients are drawn anew before every round, outside the
time. Printed are the median milliseconds and the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from glowflow.config.loader import load_config
from glowflow.config.registry import OPTIMIZERS
from glowflow.core.allocator import keep_freed_memory
from glowflow.core.model import build_module
from glowflow.core.optim import build_optimizer

BASELINE = "torch AdamW, foreach"


def module_of(millions: float) -> nn.Module:
    """A transformer of 6 blocks, as wide as it takes."""
    width = max(64, round((millions * 1e6 / (6 * 12)) ** 0.5 / 64) * 64)
    model = {"arch": "transformer", "vocab_size": 256, "dim": width, "depth": 6, "heads": width // 64}
    return build_module(load_config({"model": model}), "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    modules = {name: module_of(options.millions) for name in [BASELINE, *OPTIMIZERS.names()]}
    made: dict[str, torch.optim.Optimizer] = {}
    for name, module in modules.items():
        if name == BASELINE:
            made[name] = torch.optim.AdamW(module.parameters(), lr=1e-4, foreach=True)
        else:
            made[name] = build_optimizer(module, load_config({"training": {"optimizer": name, "lr": 1e-4}}))
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(options.rounds + 1):
        for name, optimizer in made.items():
            for parameter in modules[name].parameters():
                parameter.grad = torch.randn_like(parameter)
            began = time.perf_counter()
            optimizer.step()
            if number:  # the first step makes the state
                seconds[name].append(time.perf_counter() - began)
    count = sum(parameter.numel() for parameter in modules[BASELINE].parameters())
    print(f"{count:,} parameters, {options.threads} threads, {options.rounds} rounds, torch {torch.__version__}")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[BASELINE], strict=True))
        print(f"{name:22} {1000 * statistics.median(times):8.2f} ms  {ratio:6.2f} x")


if __name__ == "__main__":
    main()
