"""Train on Ray: ``ray job submit --working-dir . -- python pipelines/train.py CONFIG [key=value ...]``.

The same as ``glowflow train``, whose arguments, output and exit codes it shares; a script, because a Ray job runs a
file out of its working directory, where ``glowflow`` need not be installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glowflow.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["train", *sys.argv[1:]]))
