"""Sweep on Ray: ``ray job submit --working-dir . -- python pipelines/sweep.py CONFIG SPACE [key=value ...]``.

The same as ``glowflow sweep``, whose arguments, output and exit codes it shares.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glowflow.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["sweep", *sys.argv[1:]]))
