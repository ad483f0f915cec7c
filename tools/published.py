import sys

from pirl_plugin.commands.published import main

if __name__ == "__main__":
    sys.exit(main())
