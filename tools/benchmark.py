"""Benchmark frozen weights: ``python tools/benchmark.py --help``."""

import sys

from pirl_plugin.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
