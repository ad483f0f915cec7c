"""Show probes along a run: ``python tools/show_curves.py --help``."""

import sys

from pirl_plugin.commands.show_curves import main

if __name__ == "__main__":
    sys.exit(main())
