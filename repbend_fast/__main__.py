"""``python -m repbend_fast``: the command line as a launcher of several processes starts it."""

import sys

from repbend_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
