"""The coordinate check of maximal-update parametrisation (arXiv:2203.03466, appendix D.1): does width matter?

The same model is built at several widths and takes a few steps on the same tokens. What a layer puts out may
change by as much per step in a wide model as in a narrow one, no more (it would explode) and no less (it would stop
to learn). So the slope of log2 mean|x_t - x_0| over log2 width must be about 0 at every place, x_t being what a place
puts out after t steps.

It is the changes that are judged, not mean|x_t|: the scores that an output matrix of its own starts with become smaller
with the width, as 1/sqrt(width), and what a block starts with would hide what it learns.

Legend: S steps, B sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glowflow.config.architectures import DecoderConfig
from glowflow.config.errors import ConfigError, Problem
from glowflow.config.loader import load_config, to_dict
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.decoder import Decoder
from glowflow.core.batch import Batch
from glowflow.core.initialization import initialize
from glowflow.core.model import architecture_class, build_module
from glowflow.core.optim import build_optimizer

__all__ = ["LIMIT", "LR", "CoordinateCheck", "coordinate_check", "default_widths"]

LIMIT = 0.1
"""Slopes up to which a place counts as independent of the width."""

LR = 3e-4
"""Learning rate of the check: with those of real trainings scores would saturate at once, without their warm-up."""

# Few enough to be learned at every width alike: with as many different inputs as channels, the noise of the initial
# weights, 1/sqrt(width) of what is learned, would pass for a slope.
_VOCABULARY, _SEQUENCES, _POSITIONS = 4, 4, 8


@dataclass(frozen=True)
class CoordinateCheck:
    """What was measured, under one parametrisation.

    Args:
        mup: maximal-update parametrisation; else the standard one.
        optimizer: registered name.
        lr: learning rate of every step, at the narrowest width.
        seeds: over how many initial weights and batches was averaged.
        widths: in ascending order.
        sizes: place -> mean absolute value after 0 .. S steps, at each width.
        changes: the same of what differs from before the first step; after 0 steps it is 0.
    """

    mup: bool
    optimizer: str
    lr: float
    seeds: int
    widths: tuple[int, ...]
    sizes: dict[str, list[list[float]]]
    changes: dict[str, list[list[float]]]

    @property
    def steps(self) -> int:
        """S."""
        return len(next(iter(self.sizes.values()))) - 1

    def slope(self, place: str, step: int | None = None) -> float:
        """Of log2 of the mean absolute change over log2 width; after all steps where none is named.

        Returns:
            NaN where a change is not finite, or nothing changes.
        """
        return _slope(self.widths, self.changes[place][self.steps if step is None else step])

    def size_slope(self, place: str, step: int | None = None) -> float:
        """The same of the absolute value itself."""
        return _slope(self.widths, self.sizes[place][self.steps if step is None else step])

    @property
    def failures(self) -> list[str]:
        """Places whose changes depend on the width after the last step, or are not finite."""
        return [place for place in self.changes if not abs(self.slope(place)) <= LIMIT]

    @property
    def ok(self) -> bool:
        """Whether all changes are as large at every width."""
        return not self.failures


def _slope(widths: Sequence[int], values: Sequence[float]) -> float:
    if not all(math.isfinite(value) and value > 0 for value in values):
        return math.nan
    x, y = ([math.log2(number) for number in numbers] for numbers in (widths, values))
    return statistics.linear_regression(x, y).slope


def default_widths(config: GlowFlowConfig) -> tuple[int, ...]:
    """Four doublings, from the narrowest width of at least 64 that heads and key/value heads allow.

    Raises:
        ConfigError: the architecture does not know maximal-update parametrisation.
    """
    model = _known(config)
    unit = model.dim // math.gcd(model.heads, model.num_kv_heads)
    narrowest = -(-64 // unit) * unit
    return tuple(narrowest * 2**doublings for doublings in range(4))


def _known(config: GlowFlowConfig) -> DecoderConfig:
    """The section ``model`` of an architecture whose parametrisation can be chosen."""
    model = config.model
    if isinstance(model, DecoderConfig) and issubclass(architecture_class(model.arch), Decoder):
        return model
    rule = "is an architecture that does not know maximal-update parametrisation"
    hint = "derive it from glowflow.core.architectures.decoder.Decoder, and its config_class from DecoderConfig"
    raise ConfigError(Problem("model.arch", rule, model.arch, hint))


def _checked_widths(model: DecoderConfig, widths: Sequence[int]) -> tuple[int, ...]:
    ordered = tuple(sorted({*widths}))
    problems = []
    if len(ordered) < 2:
        problems.append(Problem("widths", "must be two different ones at least", list(widths)))
    for width in ordered:
        try:
            model.at_width(width)
        except ConfigError as error:
            problems += [Problem("widths", found.rule, width, found.hint) for found in error.problems]
    if problems:
        raise ConfigError(problems)
    return ordered


def _resized(config: GlowFlowConfig, width: int, base_dim: int | None) -> GlowFlowConfig:
    """The experiment at another width, as it is checked: a small vocabulary, no dropout, no more memory than needed.

    Args:
        base_dim: of maximal-update parametrisation; None: the standard one.
    """
    values = to_dict(config)
    section = values["model"]
    changes: dict[str, Any] = {**_known(config).at_width(width), "vocab_size": _VOCABULARY, "dropout": 0.0}
    if base_dim is None:
        del section["mup"], section["base_dim"], section["base_head_dim"]
    else:
        changes |= {"mup": True, "base_dim": base_dim}
    for key in ("memory", "eval_memory"):
        if section.get(key) is not None:
            changes[key] = min(section[key], _POSITIONS)
    for key, value in changes.items():
        parent, _, name = key.rpartition(".")
        (section[parent] if parent else section)[name] = value
    return load_config(values)


def coordinate_check(
    config: GlowFlowConfig,
    widths: Sequence[int],
    *,
    mup: bool = True,
    steps: int = 5,
    seeds: int = 3,
    lr: float = LR,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> CoordinateCheck:
    """Train the model at each width for a few steps and measure every block.

    ``base_dim`` is the narrowest width, whatever the config's: it makes the same difference at every width, none to the
    slopes. Tokens are drawn at random, one batch per seed for all steps and widths; the rate is constant, nothing is
    clipped and weights are fp32. Of an optimiser that takes extra passes (Sophia) none is made.

    Args:
        config: model and optimiser; its own width is not used.
        widths: values of ``model.dim``, whose heads are as wide as the config's.
        mup: maximal-update or standard parametrisation, whichever the config has.
        steps: S. seeds: repetitions.
        lr: rate at the narrowest width. So large a one that scores saturate within the steps makes slopes of its own.
        device: where to compute.
        progress: called with (width, seed) before each training.

    Raises:
        ConfigError: the architecture or the widths do not fit, with all problems.
    """
    ordered = _checked_widths(_known(config), widths)
    sizes: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for column, width in enumerate(ordered):
        sized = _resized(config, width, ordered[0] if mup else None)
        for seed in range(seeds):
            if progress is not None:
                progress(width, seed)
            history = _train(sized, steps, seed, lr, torch.device(device))
            for place in history[0]:
                first = history[0][place]
                for step, seen in enumerate(history):
                    for table, value in ((sizes, seen[place]), (changes, seen[place] - first)):
                        whole = table.setdefault(place, torch.zeros(steps + 1, len(ordered), dtype=torch.float64))
                        whole[step, column] += value.abs().mean(dtype=torch.float64).item() / seeds
    return CoordinateCheck(
        mup,
        config.training.optimizer.name,
        lr,
        seeds,
        ordered,
        {place: table.tolist() for place, table in sizes.items()},
        {place: table.tolist() for place, table in changes.items()},
    )


def _train(config: GlowFlowConfig, steps: int, seed: int, lr: float, device: torch.device) -> list[dict[str, Tensor]]:
    """Place -> what it put out, before the first step and after each."""
    module = build_module(config).to_empty(device=device)
    assert isinstance(module, Decoder)
    initialize(module, seed)
    optimizer = build_optimizer(module, config)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    batch = _batch(seed).to(device)
    history = []
    for step in range(steps + 1):
        with _recording(module) as seen:
            output, _ = module(batch)
        history.append({**seen, "logits": module.logits(output.hidden).detach()})
        if step < steps:
            (output.objective / batch.num_tokens).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return history


def _batch(seed: int) -> Batch:
    """Tokens drawn at random, each to be predicted from those before it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(_VOCABULARY, (_SEQUENCES, _POSITIONS + 1), generator=generator)
    rows = torch.arange(_SEQUENCES)
    return Batch(
        tokens=drawn[:, :-1],
        targets=drawn[:, 1:],
        loss_weights=torch.ones(_SEQUENCES, _POSITIONS),
        positions=torch.arange(_POSITIONS).expand(_SEQUENCES, -1),
        document_ids=rows[:, None].expand(-1, _POSITIONS),
        sample_ids=rows,
        reset=torch.zeros(_SEQUENCES, dtype=torch.bool),
        single_document=True,
    )


@contextmanager
def _recording(module: Decoder) -> Iterator[dict[str, Tensor]]:
    """What passes the places in one forward pass: (B, T, D) each, in order of execution."""
    seen: dict[str, Tensor] = {}

    def keep(place: str, value: Any) -> None:
        seen[place] = (value[0] if isinstance(value, tuple) else value).detach()

    def after(place: str, _module: nn.Module, _inputs: Any, value: Any) -> None:
        keep(place, value)

    first: nn.Module = module.blocks[0]
    handles = [first.register_forward_pre_hook(lambda _module, inputs: keep("embedding", inputs))]
    for index, block in enumerate(module.blocks):
        for name, part in (("attention", "attention"), ("feed-forward", "feed_forward"), ("residual", "")):
            place = partial(after, f"block {index + 1} {name}")
            handles.append(block.get_submodule(part).register_forward_hook(place))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
