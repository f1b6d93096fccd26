#!/usr/bin/env python3
"""The `segment-durable` command from a checkout, without an installation: `python3 scripts/outbox.py status DIR`."""

import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 (nobody has installed this, so nobody has checked it)
    print("segment-durable: Python 3.10 or newer is needed", file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def run() -> int:
    try:
        from segment_durable.cli import main

        return main()
    except ModuleNotFoundError as problem:
        print(f"segment-durable: the module {problem.name} is missing: pip install segment-durable", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run())
