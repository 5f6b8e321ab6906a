"""Searching on a narrow model for a wide one, under maximal-update parametrisation (arXiv:2203.03466, tables 1 and 2).

With ``model.mup`` the best learning rate, schedule, betas and initialisation are the same at every width, everything
else being equal. So the proxy differs in its width alone, a space may vary what transfers over the width alone, and
whatever would need more than that is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from glowflow.config.architectures import DecoderConfig
from glowflow.config.errors import ConfigError, Problem
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.spaces.model import Space
from glowflow.config.spaces.rules import places
from glowflow.config.spaces.values import close_to, overlap

__all__ = ["Proxy", "make_proxy", "transfer_doubts", "transfer_rules"]

_TRANSFERS = (
    "training.lr",
    "training.min_lr",
    "training.schedule",
    "training.warmup_steps",
    "training.decay_fraction",
    "training.grad_clip",
    "training.optimizer",
    "model.init_std",
)
"""What may be searched, sections with all their keys but those of `_STAYS`."""

_EXPERIENCE = "holds at another one by experience only: the proxy must have the one of the full training"
_STAYS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("model.dim", "model.heads", "model.kv_heads", "model.ffn_dim", "model.moe"),
        "is a size, which the proxy has its own of",
    ),
    (("model.mup", "model.base_dim", "model.base_head_dim"), "decides how everything else transfers"),
    (("model.depth",), f"is the depth: what is best at one {_EXPERIENCE}"),
    (
        ("model.dropout", "training.optimizer.weight_decay"),
        "regularises: how much of that is best depends on the width and on the amount of data",
    ),
    (("data.context",), f"is the length of the sequences: what is best at one {_EXPERIENCE}"),
    (("data",), "is about the data, which must be those of the full training"),
    (
        ("training.batch_size", "training.micro_batch_size", "training.optimizer.hessian_batch_size"),
        f"is a batch size: what is best at one {_EXPERIENCE}",
    ),
    (("training.max_steps",), f"is the length of the training: what is best at one {_EXPERIENCE}"),
    (("model",), "makes another model: results transfer to the same one at another width"),
    (("",), "is not among what is known to transfer over the width"),
)
"""Keys or sections -> why no search on a proxy can tell which value is best for the full width; the first counts."""

_OWN_SIZES = ("model.dim", "model.heads", "model.kv_heads", "model.ffn_dim", "model.moe")
_PARAMETRISATION = ("model.mup", "model.base_dim", "model.base_head_dim")
_WITH_GRADIENTS = ("training.optimizer.eps", "training.optimizer.rho", "training.optimizer.gamma")

_NO_PROXY = {
    "depth": f"makes another depth: what is best at one {_EXPERIENCE}",
    "steps": f"makes a shorter training, in which too high a rate looks best: what is best at one {_EXPERIENCE}",
    "batch": f"makes another batch: what is best at one {_EXPERIENCE}",
    "context": f"makes other sequences: what is best at one length {_EXPERIENCE}",
    "heads": "follows from the width: heads keep their own width, and there are as many as fit",
}
_SYNONYMS = {
    "layers": "depth",
    "max_steps": "steps",
    "tokens": "steps",
    "batch_size": "batch",
    "seq_len": "context",
    "length": "context",
    "kv_heads": "heads",
}


@dataclass(frozen=True)
class Proxy:
    """The narrow model that trials train, and the way back.

    Args:
        width: model.dim of the trials.
        full_width: model.dim of the config, which the result is for.
        changes: dotted key -> its value in the trials.
        full: the same keys -> their values in the config.
    """

    width: int
    full_width: int
    changes: dict[str, Any]
    full: dict[str, Any]

    def __str__(self) -> str:
        return f"found at width {self.width}, for width {self.full_width}"

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Proxy | None:
        """What `to_dict` gave; None for None, a sweep without a proxy."""
        return None if values is None else cls(**values)


def make_proxy(config: GlowFlowConfig, text: str) -> tuple[Proxy | None, list[Problem]]:
    """The proxy of a config that `--proxy` asks for.

    Args:
        config: the experiment at its full width.
        text: `width=128`.

    Returns:
        The proxy, or None and all that is wrong.
    """
    width, problems = _read(text)
    model = config.model
    if not isinstance(model, DecoderConfig):
        rule = "cannot be searched on a proxy: its widths and its parametrisation are its own"
        problems.append(Problem("model.arch", rule, model.arch))
        return None, problems
    if not model.mup:
        rule = "must be true: otherwise each width has a best learning rate of its own, and nothing transfers"
        hint = "model.mup=true, and model.base_dim for the width at which it changes nothing"
        problems.append(Problem("model.mup", rule, False, hint))
    if width is None:
        return None, problems
    if width >= model.dim:
        problems.append(Problem("--proxy width", f"must be less than model.dim, which is {model.dim}", width))
        return None, problems
    try:
        changes = {f"model.{key}": value for key, value in model.at_width(width).items()}
    except ConfigError as error:
        problems += [Problem("--proxy width", found.rule, width, found.hint) for found in error.problems]
        return None, problems
    full = {f"model.{key}": value for key, value in model.at_width(model.dim).items()}
    return (None if problems else Proxy(width, model.dim, changes, full)), problems


def _read(text: str) -> tuple[int | None, list[Problem]]:
    """The width that is asked for, and what is wrong with the rest."""
    widths: list[int] = []
    problems: list[Problem] = []
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        refused = _NO_PROXY.get(_SYNONYMS.get(key, key))
        if not equals or not key:
            problems.append(Problem("--proxy", "must look like width=128", item))
        elif refused is not None:
            problems.append(Problem(f"--proxy {key}", refused, value))
        elif key != "width":
            problems.append(Problem(f"--proxy {key}", "is not known", value, close_to(key, ("width",), "known")))
        elif widths:
            problems.append(Problem("--proxy width", "is given twice", text))
        elif not value.isdecimal() or int(value) < 1:
            problems.append(Problem("--proxy width", "must be a whole number of at least 1", value))
        else:
            widths.append(int(value))
    if not widths and not problems:
        problems.append(Problem("--proxy", "must say the width, as in width=128", text))
    return (widths[0] if widths else None), problems


def transfer_rules(space: Space) -> Iterator[Problem]:
    """What a search on a proxy cannot answer for the full width."""
    for where, key in places(space):
        if where.startswith("set."):
            # The same in trial and full training, unless it is what the two differ in.
            if any(overlap(key, own) for own in (*_OWN_SIZES, *_PARAMETRISATION)):
                yield Problem(where, f"{key} {_why(key)}", space.fixed[key], "give it in the config, at its full width")
        elif not _transfers(key):
            hint = "give it one value, in the config or under `set`"
            yield Problem(where, f"{key} does not transfer over the width: it {_why(key)}", hint=hint)
    if space.scheduler.name in ("pbt", "pb2"):
        rule = "finds weights and a history of values, which no config of another width can hold"
        yield Problem("scheduler", rule, space.scheduler.name, "use fifo, asha, median or hyperband")


def _why(key: str) -> str:
    return next(why for keys, why in _STAYS if any(not name or overlap(key, name) for name in keys))


def _transfers(key: str) -> bool:
    known = any(key == name or key.startswith(f"{name}.") for name in _TRANSFERS)
    return known and not any(key in keys for keys, _ in _STAYS)


def transfer_doubts(space: Space) -> Iterator[str]:
    """What transfers with a restriction."""
    for key in space.keys():
        if key in _WITH_GRADIENTS:
            yield (
                f"{key} is compared with gradients or their squares, which become smaller with the width: what is best "
                "for the proxy serves the full width as far as it hardly matters"
            )
