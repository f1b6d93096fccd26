#!/usr/bin/env python3
"""The `segment-durable` command from a checkout: `scripts/outbox.py status DIR`.

Makes .venv and installs the project into it first, unless this Python has what it needs.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:1] = [os.path.dirname(HERE), HERE]


def run():
    try:
        from segment_durable.cli import main
    except (ImportError, SyntaxError):  # a dependency is missing, or this Python is too old
        import _venv

        _venv.run_inside()
        raise
    return main()


if __name__ == "__main__":
    sys.exit(run())
