"""The key/value cache of decoding: fixed memory, filled from the left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glowflow.config.errors import ConfigError, Problem

__all__ = ["KVCache"]


@dataclass
class KVCache:
    """Keys and values of all layers.

    ``keys`` and ``values`` are (L, B, K, S, D): layers, sequences, key/value heads, room, head width.
    """

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def empty(
        cls,
        layers: int,
        batch_size: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> KVCache:
        """Room for ``max_length`` positions."""
        shape = (layers, batch_size, kv_heads, max_length, head_dim)
        return cls(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def require(self, num_new: int) -> None:
        """Check that ``num_new`` positions fit.

        Raises:
            ConfigError: they do not.
        """
        if self.length + num_new > self.max_length:
            raise ConfigError(
                Problem(
                    "max_length",
                    f"the cache holds {self.max_length} positions",
                    self.length + num_new,
                    "ask for a longer cache",
                )
            )

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, D) behind what is there; returns all keys and values of the layer so far.

        ``length`` moves on only with :meth:`advance`, after the last layer.
        """
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_new: int) -> None:
        self.length += num_new
