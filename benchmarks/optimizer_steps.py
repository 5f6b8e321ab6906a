"""Time of one step of each registered optimiser against ``torch.optim.AdamW(foreach=True)``, taking turns.

    PYTHONPATH=. python benchmarks/optimizer_steps.py [--millions 10] [--rounds 15] [--threads 1] [--batch 12]
        [--context 64]

The parameters are those of a transformer of about that size. Gradients are drawn anew before every round, outside the
time. Printed are the median milliseconds, the median of the ratios within a round, and the share of a whole training
step: forward and backward pass of one batch of that many sequences are timed in every round too. So are the extra
passes of the optimisers that take some (Sophia's estimates of the Hessian, on the whole batch).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from glowflow.benchmark.train import ready_batch
from glowflow.config.loader import apply_overrides, load_config
from glowflow.config.registry import OPTIMIZERS
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.allocator import keep_freed_memory
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.batch import Batch, StepBatches
from glowflow.core.model import GlowFlowModel
from glowflow.core.optim import build_optimizer
from glowflow.training.hessian import ExtraPasses, make_extra_passes
from glowflow.training.precision import LossScaler
from glowflow.training.strategies import make_strategy

BASELINE = "torch AdamW, foreach"


def config_of(options: argparse.Namespace) -> GlowFlowConfig:
    """A transformer of 6 blocks, as wide as it takes."""
    width = max(64, round((options.millions * 1e6 / (6 * 12)) ** 0.5 / 64) * 64)
    model = {"arch": "transformer", "vocab_size": 256, "dim": width, "depth": 6, "heads": width // 64}
    training = {"batch_size": options.batch, "lr": 1e-4}
    return load_config({"model": model, "data": {"context": options.context}, "training": training})


def module_of(config: GlowFlowConfig) -> BaseArchitecture:
    """The model on the CPU, with the weights of its seed."""
    return GlowFlowModel(config).module.train()


def seconds_of_passes(module: BaseArchitecture, batch: Batch) -> float:
    """Forward and backward pass of a batch; the gradients are let go."""
    module.zero_grad(set_to_none=True)
    began = time.perf_counter()
    output, _ = module(batch)
    (output.objective / batch.num_tokens).backward()
    took = time.perf_counter() - began
    module.zero_grad(set_to_none=True)
    return took


def extra_passes_of(
    config: GlowFlowConfig, module: BaseArchitecture, optimizer: torch.optim.Optimizer
) -> ExtraPasses | None:
    """The extra passes of an optimiser as the loop takes them; None for most."""
    device = torch.device("cpu")
    strategy = make_strategy("single", device=device, precision="fp32")
    return make_extra_passes(config, strategy, module, optimizer, LossScaler(device, enabled=False))


def seconds_of_extra_pass(extra: ExtraPasses, batch: Batch) -> float:
    """One extra pass over a batch that is the whole step."""
    began = time.perf_counter()
    extra.run(StepBatches(0, [batch], float(batch.num_tokens)), [None])
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--context", type=int, default=64)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    config = config_of(options)
    modules = {name: module_of(config) for name in [BASELINE, *OPTIMIZERS.names()]}
    batch = ready_batch(config, torch.device("cpu"))
    made: dict[str, torch.optim.Optimizer] = {}
    for name, module in modules.items():
        if name == BASELINE:
            made[name] = torch.optim.AdamW(module.parameters(), lr=1e-4, foreach=True)
        else:
            made[name] = build_optimizer(module, apply_overrides(config, {"training.optimizer": name}))
    found = {name: extra_passes_of(config, modules[name], optimizer) for name, optimizer in made.items()}
    extras = {name: extra for name, extra in found.items() if extra is not None}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    extra_seconds: dict[str, list[float]] = {name: [] for name in extras}
    passes: list[float] = []
    for number in range(options.rounds + 1):
        took = seconds_of_passes(modules[BASELINE], batch)
        if number:
            passes.append(took)
        for name, extra in extras.items():
            took = seconds_of_extra_pass(extra, batch)
            if number:
                extra_seconds[name].append(took)
        for name, optimizer in made.items():
            for parameter in modules[name].parameters():
                parameter.grad = torch.randn_like(parameter)
            began = time.perf_counter()
            optimizer.step()
            if number:  # the first step makes the state
                seconds[name].append(time.perf_counter() - began)
    count = sum(parameter.numel() for parameter in modules[BASELINE].parameters())
    print(f"{count:,} parameters, {options.threads} threads, {options.rounds} rounds, torch {torch.__version__}")
    size = f"{options.batch} x {options.context} tokens"
    print(f"forward and backward pass of {size}: {1000 * statistics.median(passes):.2f} ms")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[BASELINE], strict=True))
        share = statistics.median(a / (a + b) for a, b in zip(times, passes, strict=True))
        print(f"{name:22} {1000 * statistics.median(times):8.2f} ms  {ratio:6.2f} x  {share:6.1%} of a training step")
    for name, times in extra_seconds.items():
        every = extras[name].optimizer.extra_every
        steps = zip(times, passes, seconds[name], strict=True)
        share = statistics.median(a / every / (a / every + b + c) for a, b, c in steps)
        took = statistics.median(times)
        print(f"{name:22} extra pass {1000 * took:8.2f} ms, every {every} steps: {share:6.1%} of a training step")


if __name__ == "__main__":
    main()
