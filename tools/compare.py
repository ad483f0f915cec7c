import sys

from pirl_plugin.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
