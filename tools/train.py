"""Pretrain a trunk: ``python tools/train.py --help``."""

import sys

from pirl_plugin.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
