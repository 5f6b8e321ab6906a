"""Several integer arrays in one buffer, each in its narrowest type: what an item of a Ray stream carries.

A buffer is one Arrow value whatever the shapes inside, so items of different length need no ragged tensor column, and
reading it copies nothing. Layout: 8 bytes length of the header, JSON header, the arrays one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["pack", "unpack"]

_LENGTH = 8


def pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Pack arrays into one buffer; whole numbers, floating ones too, are stored in the narrowest type for them."""
    narrow = {name: np.ascontiguousarray(_narrowest(array)) for name, array in arrays.items()}
    header = json.dumps([[name, array.dtype.str, array.shape] for name, array in narrow.items()]).encode()
    return b"".join([len(header).to_bytes(_LENGTH, "little"), header, *(array.tobytes() for array in narrow.values())])


def unpack(buffer: Any) -> dict[str, NDArray[Any]]:
    """The arrays of a buffer as read-only views of it, in the type they were packed in."""
    view = memoryview(buffer)
    at = _LENGTH + int.from_bytes(view[:_LENGTH], "little")
    arrays = {}
    for name, dtype, shape in json.loads(bytes(view[_LENGTH:at])):
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(view, dtype=dtype, count=count, offset=at).reshape(shape)
        at += arrays[name].nbytes
    return arrays


def _narrowest(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype == np.bool_ or not array.size:
        return array
    if array.dtype.kind == "f" and not (array == np.floor(array)).all():
        return array
    dtype = np.promote_types(np.min_scalar_type(int(array.min())), np.min_scalar_type(int(array.max())))
    return array.astype(dtype)
