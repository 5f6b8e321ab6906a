"""The bare loop: one process, one device, a batch that is ready in memory; nothing but forward, backward, update.

It is what any other way to train is measured against. It needs torch, numpy, pydantic and PyYAML, so it also runs on
a GPU box that has nothing else: ``python -m glowflow.benchmark.train configs/lm_350m.yaml --steps 30``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from glowflow.benchmark.measure import Measurement, summarise
from glowflow.config.errors import ConfigError, GlowFlowError, PreflightError, Problem
from glowflow.config.loader import load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.allocator import keep_freed_memory
from glowflow.core.batch import Batch
from glowflow.core.optim import build_optimizer
from glowflow.training.flops import device_peak, measure_gemm_peak, mfu
from glowflow.training.precision import autocast, precision_warnings
from glowflow.training.strategies import make_strategy

__all__ = ["bare_loop", "choose_device", "main", "ready_batch", "report"]


def choose_device(accelerator: str) -> torch.device:
    """The device that ``resources.accelerator`` asks for.

    Raises:
        PreflightError: a GPU is asked for and there is none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise PreflightError(
            Problem("resources.accelerator", "there is no CUDA device here", "gpu", "use `auto` or `cpu`")
        )
    use_gpu = accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")


def ready_batch(config: GlowFlowConfig, device: torch.device) -> Batch:
    """One micro-batch of random tokens without document borders, on the device."""
    if config.model.vocab_size is None:
        raise ConfigError(
            Problem("model.vocab_size", "must be given for the bare loop", hint="add model.vocab_size=257")
        )
    shape = (config.micro_batch_size, config.data.context)
    generator = torch.Generator().manual_seed(config.training.seed)
    tokens = torch.randint(config.model.vocab_size, (shape[0], shape[1] + 1), generator=generator)
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        targets=tokens[:, 1:].contiguous(),
        loss_weights=torch.ones(shape),
        positions=torch.arange(shape[1]).expand(shape).contiguous(),
        document_ids=torch.zeros(shape, dtype=torch.int64),
        sample_ids=torch.arange(shape[0]),
        reset=torch.zeros(shape[0], dtype=torch.bool),
        single_document=True,
    ).to(device)


def bare_loop(config: GlowFlowConfig, steps: int, warmup: int) -> Measurement:
    """Time ``steps`` optimiser steps after ``warmup`` more."""
    began = time.perf_counter()
    device = choose_device(config.resources.accelerator)
    if device.type == "cpu":
        keep_freed_memory()
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    strategy = make_strategy("single", device=device, precision=config.training.precision)
    module = strategy.prepare(config)
    module.train()
    architecture = strategy.unwrap(module)
    optimizer, batch = build_optimizer(module, config), ready_batch(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times, first = [], 0.0
    for step in range(warmup + steps):
        start = time.perf_counter()
        _step(config, strategy, module, optimizer, batch)
        _synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
        if step == 0:
            first = time.perf_counter() - began
    tokens = config.training.batch_size // config.resources.workers * config.data.context
    return Measurement(
        step_ms=times[warmup:],
        tokens_per_step=tokens,
        seconds_to_first_step=first,
        peak_memory_bytes=_peak_memory(device),
        details={
            "parameters": architecture.num_parameters(),
            "flops_per_token": architecture.flops_per_token(config.data.context),
        },
    )


def _step(config: GlowFlowConfig, strategy: Any, module: nn.Module, optimizer: Optimizer, batch: Batch) -> Tensor:
    """One optimiser step on the same batch; accumulation runs it several times."""
    weight = float(batch.num_tokens * config.grad_accum_steps)
    total = torch.zeros((), device=batch.tokens.device)
    for _ in range(config.grad_accum_steps):
        with autocast(config.training.precision, batch.tokens.device):
            output, _ = module(batch, None)
        (output.objective / weight).backward()
        total += output.loss_sum.detach() / weight
    strategy.clip_grad_norm(module, config.training.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def report(config: GlowFlowConfig, measurement: Measurement) -> dict[str, Any]:
    """The JSON document of one bare measurement, with the utilisation and what it is relative to."""
    device = choose_device(config.resources.accelerator)
    row = summarise({"bare": [measurement]}, baseline="bare")["bare"]
    flops, rate = measurement.details["flops_per_token"], row["tokens_per_second"]
    peak = device_peak(device)
    document: dict[str, Any] = {
        "benchmark": "train",
        "bare": {key: value for key, value in row.items() if key not in ("rounds", "ratios", "speed_relative_to_bare")},
        "parameters": measurement.details["parameters"],
        "precision": config.training.precision,
        "compile": config.training.compile,
        "model_flops_per_second": rate * flops,
        "mfu": None if peak is None else mfu(rate, flops, peak),
        "mfu_denominator": None if peak is None else peak.label,
        "environment": environment(device),
    }
    if device.type == "cpu":
        measured = measure_gemm_peak(device)
        document["share_of_measured_gemm_peak"] = mfu(rate, flops, measured)
        document["gemm_peak"] = measured.label
    return document


def environment(device: torch.device) -> dict[str, Any]:
    """What a number must carry to mean something."""
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def main(args: Sequence[str] | None = None) -> int:
    """Command line of the bare loop."""
    parser = argparse.ArgumentParser(prog="python -m glowflow.benchmark.train", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them")
    given = parser.parse_args(args)
    try:
        config = load_config(given.config, ["resources.workers=1", *given.overrides])
        device = choose_device(config.resources.accelerator)
        for warning in precision_warnings(config.training.precision, device):
            sys.stderr.write(f"warning: {warning}\n")
        document = report(config, bare_loop(config, given.steps, given.warmup))
    except GlowFlowError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    document = {"config": given.config, "overrides": given.overrides, **document}
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
