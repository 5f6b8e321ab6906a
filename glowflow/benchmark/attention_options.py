"""What ``glowflow bench attention`` can be asked: one list of options for both command lines. No torch here."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["KINDS", "OPTIONS", "PASSES", "Option", "Pass"]

Pass = Literal["forward", "backward", "decode"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "decode")

KINDS = (
    "dense",
    "windowed",
    "sparse",
    "linear",
    "sparse.fixed",
    "sparse.local_global",
    "sparse.blocks",
    "linear.feature_map",
    "linear.retention",
    "linear.gated_delta",
)
"""What can be measured: a kind, or one of its variants behind a dot; without one the default of the config."""


class Option(NamedTuple):
    """One option of the command line; its value is text, empty for the default that the help names."""

    name: str
    default: str
    help: str


OPTIONS = (
    Option("kinds", "dense,windowed,sparse,linear", f"Of {', '.join(KINDS)}."),
    Option("backends", "auto", "Names of kernels; `auto`: the one that is chosen; `all`: each that knows the kind."),
    Option("lengths", "1024,2048,4096,8192,16384,32768,65536", "Positions of a sequence, forward and backward."),
    Option("positions", "1024,2048,4096,8192,16384,32768", "Where steps of decoding are timed."),
    Option("passes", ",".join(PASSES), "`backward`: forward and backward; `decode`: one step of a layer with cache."),
    Option("heads", "4", "Query heads."),
    Option("kv-heads", "", "Key/value heads; default: as many as query heads."),
    Option("head-dim", "64", "Width of a head."),
    Option("batch", "1", "Sequences at a time."),
    Option("window", "256", "Keys that a window sees; the sparse patterns are made of it and of a quarter of it."),
    Option("dtype", "", "Default: float32 on a CPU, bfloat16 on CUDA."),
    Option("device", "", "cpu or cuda; default: cuda where there is one."),
    Option("repeat", "5", "Rounds; each visits every case."),
    Option("most-seconds", "20", "Leave out a pass that would take longer."),
    Option("memory-limit", "", "GiB that a pass on a CPU may take; default: what is available."),
)
