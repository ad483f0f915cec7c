#!/usr/bin/env python3
"""Pretrain, benchmark and compare; ``--help`` tells more."""

import sys

from pirl_plugin.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main())
