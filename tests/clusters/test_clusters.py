"""The cluster examples: each is checked against a schema, or run with a stand-in for what a cluster provides."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"


def _jsonschema():
    return pytest.importorskip("jsonschema", reason="jsonschema comes with the dev extra")


def test_launcher_file_fits_rays_own_schema() -> None:
    jsonschema = _jsonschema()
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    document = yaml.safe_load((CLUSTERS / "aws-gpu.yaml").read_text())
    jsonschema.validate(document, schema)
    assert document["head_node_type"] in document["available_node_types"]


def test_launcher_dashboard_is_on_loopback_with_a_token() -> None:
    document = yaml.safe_load((CLUSTERS / "aws-gpu.yaml").read_text())
    start = document["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start and "RAY_AUTH_MODE=token" in start


def test_rayjob_fits_the_schema_and_a_typing_mistake_does_not() -> None:
    jsonschema = _jsonschema()
    schema = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())
    document = yaml.safe_load((CLUSTERS / "kuberay-rayjob.yaml").read_text())
    jsonschema.validate(document, schema)
    yaml.safe_load(document["spec"]["runtimeEnvYAML"])
    document["spec"]["entryPoint"] = document["spec"].pop("entrypoint")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


def test_rayjob_and_package_agree_on_the_ray_version() -> None:
    document = yaml.safe_load((CLUSTERS / "kuberay-rayjob.yaml").read_text())
    assert f"ray=={document['spec']['rayClusterSpec']['rayVersion']}" in (ROOT / "constraints.txt").read_text()


def _fake_slurm(folder: Path) -> dict[str, str]:
    """`srun` and `scontrol` as one node would answer; `ray` writes down what it was asked to run."""
    scripts = {
        "scontrol": "echo node-a; echo node-b",
        "srun": 'while [ "${1#-}" != "$1" ]; do [ "$1" = -w ] && shift; shift; done\n'
        'if [ "$1" = hostname ]; then echo 10.0.0.5; else exec "$@"; fi',
        "ray": 'printf "%s\\n" "$@" > "$FAKE_OUT"\n'
        'test "$RAY_AUTH_MODE" = token && test ${#RAY_AUTH_TOKEN} = 64 || exit 9\n'
        'exit "${FAKE_EXIT:-0}"',
    }
    for name, body in scripts.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "FAKE_OUT": str(folder / "asked"),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_GPUS_ON_NODE": "8",
    }


def test_slurm_script_parses() -> None:
    subprocess.run(["bash", "-n", str(CLUSTERS / "slurm.sbatch")], check=True)


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_script_runs_and_passes_the_exit_code_on(tmp_path: Path, code: int) -> None:
    env = {**_fake_slurm(tmp_path), "FAKE_EXIT": str(code)}
    override = "tracking.run=two words"
    done = subprocess.run(["bash", str(CLUSTERS / "slurm.sbatch"), "configs/lm_1b3.yaml", override], env=env, cwd=ROOT)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert done.returncode == code
    assert asked[:3] == ["symmetric-run", "--address", "10.0.0.5:6379"]
    assert "--num-gpus=8" in asked and "--num-cpus=4" in asked
    assert asked[asked.index("--") + 1 :] == ["python3", "pipelines/train.py", "configs/lm_1b3.yaml", override]


def test_slurm_script_without_a_config_says_how_to_call_it(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(CLUSTERS / "slurm.sbatch")], env=_fake_slurm(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 2 and "usage: sbatch" in done.stderr
