"""Write a checkpoint's trunk for another library: ``python tools/convert.py --help``."""

import sys

from pirl_plugin.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
