"""Shipped configs still train as they did: same machine and corpus, to the last digit; another machine, to 1e-3."""

from __future__ import annotations

import os

import pytest

from tests.golden.curves import CASES, FOLDER, load, run_case

STEPS = 20
NEEDS_DATA = {"shakespeare_char", "shakespeare_muon", "wikitext2"}


@pytest.mark.parametrize("name", CASES)
def test_golden_curve(name: str) -> None:
    if name in NEEDS_DATA and not os.environ.get("GLOWFLOW_DATA"):
        pytest.skip(f"{name} needs a data set: set GLOWFLOW_DATA")
    assert (FOLDER / f"{name}.jsonl").is_file(), f"record it: python tests/golden/curves.py {name}"
    golden_key, golden = load(name)
    key, losses = run_case(name, STEPS)
    if key["corpus"] != golden_key["corpus"]:
        pytest.skip("another corpus (python-stdlib differs between Python versions): nothing to compare with")
    if key == golden_key:
        assert losses == golden[:STEPS]
    else:
        assert losses == pytest.approx(golden[:STEPS], rel=1e-3)
