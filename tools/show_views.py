"""Draw the views of a method: ``python tools/show_views.py --help``."""

import sys

from pirl_plugin.commands.show_views import main

if __name__ == "__main__":
    sys.exit(main())
