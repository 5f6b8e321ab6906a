"""What a layer remembers while tokens are appended one by one: all keys, the last ones in a ring, or a state.

Each attention layer makes its own part (``new_cache``) and is the only one to read it; ``DecodeCache`` holds the parts
and how far the text has come. A layer writes with ``length`` as it was before the pass; ``advance`` comes after the
last layer.

Legend: B batch, K key/value heads, T new positions, S positions held, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from glowflow.config.errors import ConfigError, Problem

__all__ = ["DecodeCache", "FullKV", "LayerCache", "RingKV", "StateCache"]


class LayerCache(Protocol):
    """One layer's part."""

    def nbytes(self) -> int:
        """Memory held, in bytes."""

    def select(self, rows: Tensor) -> None:
        """Hold these rows (int64) of the batch, in this order; one may occur several times."""

    def save(self) -> Any:
        """What ``restore`` needs to come back to how it is now."""

    def restore(self, saved: Any) -> None:
        """Be as when this was saved; once for each ``save``, and only after reading on."""

    def cut(self, length: int) -> bool:
        """Forget the positions from ``length`` on; False where they cannot be told from the others."""


@dataclass
class DecodeCache:
    """The parts of all layers.

    Args:
        layers: one part per layer.
        max_length: positions that fit.
        length: positions read so far.
    """

    layers: list[LayerCache]
    max_length: int
    length: int = 0

    def require(self, num_new: int) -> None:
        """Check that ``num_new`` positions fit.

        Raises:
            ConfigError: they do not.
        """
        if self.length + num_new > self.max_length:
            rule = f"the cache holds {self.max_length} positions"
            raise ConfigError(Problem("max_length", rule, self.length + num_new, "ask for a longer cache"))

    def advance(self, num_new: int) -> None:
        """The pass over ``num_new`` positions is over."""
        self.length += num_new

    def nbytes(self) -> int:
        """Memory held by all layers, in bytes."""
        return sum(layer.nbytes() for layer in self.layers)

    def select(self, rows: Tensor) -> None:
        """Hold these rows (int64) of the batch, in this order; one may occur several times."""
        for layer in self.layers:
            layer.select(rows)

    def save(self) -> tuple[int, list[Any]]:
        """What ``restore`` needs; costs a copy where later positions overwrite earlier ones."""
        return self.length, [layer.save() for layer in self.layers]

    def restore(self, saved: tuple[int, list[Any]]) -> None:
        """Be as when this was saved; once for each ``save``."""
        self.length, parts = saved
        for layer, part in zip(self.layers, parts, strict=True):
            layer.restore(part)

    def cut(self, length: int) -> bool:
        """Forget the positions from ``length`` on; False where a layer cannot, and all must be restored."""
        if not all(layer.cut(length) for layer in self.layers):
            return False
        self.length = length
        return True


class FullKV:
    """All keys and values, filled from the left: (B, K, S, D) each."""

    def __init__(
        self,
        batch_size: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (batch_size, kv_heads, max_length, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.filled = 0

    def update(self, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write (B, K, T, D) behind the ``length`` that are there.

        Returns:
            All keys and values so far, and None: they lie in order.
        """
        count = k.shape[2]
        self.filled = length + count
        self.keys.narrow(2, length, count).copy_(k)
        self.values.narrow(2, length, count).copy_(v)
        return self.keys.narrow(2, 0, self.filled), self.values.narrow(2, 0, self.filled), None

    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def select(self, rows: Tensor) -> None:
        self.keys, self.values = self._selected(self.keys, rows), self._selected(self.values, rows)

    def _selected(self, held: Tensor, rows: Tensor) -> Tensor:
        chosen = held.new_empty(len(rows), *held.shape[1:])
        chosen[:, :, : self.filled] = held[rows, :, : self.filled]  # what is not filled need not be copied
        return chosen

    def save(self) -> int:
        return self.filled

    def restore(self, saved: int) -> None:
        self.filled = saved

    def cut(self, length: int) -> bool:
        self.filled = length
        return True


class RingKV:
    """The first ``sinks`` and the last ``window`` keys and values; memory does not grow with the text.

    Room for S = sinks + window positions; ``positions`` (S,) says which position lies where, -1: none yet.
    """

    def __init__(
        self,
        batch_size: int,
        kv_heads: int,
        window: int,
        sinks: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (batch_size, kv_heads, sinks + window, head_dim)
        self.window, self.sinks = window, sinks
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.positions = torch.full((sinks + window,), -1, dtype=torch.int64, device=device)

    def update(self, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in (B, K, T, D) at positions ``length`` .. ``length + T - 1``.

        Returns:
            Keys, values and positions of what was held and what is new, which is all that the T queries may see; for
            one new position that is the ring itself.
        """
        new = torch.arange(length, length + k.shape[2], device=k.device)
        if k.shape[2] == 1:
            self._store(k, v, new, length)
            return self.keys, self.values, self.positions
        seen = (
            torch.cat((self.keys, k.to(self.keys.dtype)), dim=2),
            torch.cat((self.values, v.to(self.values.dtype)), dim=2),
            torch.cat((self.positions, new)),
        )
        self._store(k, v, new, length)
        return seen

    def _store(self, k: Tensor, v: Tensor, new: Tensor, length: int) -> None:
        """Keep the sinks, and of the others the last ``window``."""
        count = k.shape[2]
        sinks = max(0, min(self.sinks - length, count))
        recent = max(sinks, count - self.window)
        kept = torch.cat((torch.arange(sinks), torch.arange(recent, count))).to(k.device)
        position = new[kept]
        slot = torch.where(position < self.sinks, position, self.sinks + (position - self.sinks) % self.window)
        self.keys[:, :, slot] = k[:, :, kept].to(self.keys.dtype)
        self.values[:, :, slot] = v[:, :, kept].to(self.values.dtype)
        self.positions[slot] = position

    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def select(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    def save(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys.clone(), self.values.clone(), self.positions.clone()

    def restore(self, saved: tuple[Tensor, Tensor, Tensor]) -> None:
        self.keys, self.values, self.positions = saved

    def cut(self, length: int) -> bool:
        return False  # what lay in the overwritten slots is gone


@dataclass
class StateCache:
    """A recurrent state: tensors by name, of constant size; empty before the first position."""

    state: dict[str, Tensor] = field(default_factory=dict)

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.values())

    def select(self, rows: Tensor) -> None:
        self.state = {name: tensor[rows] for name, tensor in self.state.items()}

    def save(self) -> dict[str, Tensor]:
        return dict(self.state)  # each step makes new tensors

    def restore(self, saved: dict[str, Tensor]) -> None:
        self.state = dict(saved)

    def cut(self, length: int) -> bool:
        return False
