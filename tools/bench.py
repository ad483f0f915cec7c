"""Measure speed and memory against the plain way: ``python tools/bench.py --help``."""

import sys

from pirl_plugin.commands.bench import main

if __name__ == "__main__":
    sys.exit(main())
