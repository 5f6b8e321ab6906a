"""What tests of the loop share: one thread, for sums that are equal to the bit, and double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    if dist.is_initialized():  # the group of one that fsdp starts
        dist.destroy_process_group()


@pytest.fixture
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
