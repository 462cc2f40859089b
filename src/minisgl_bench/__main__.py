"""`python -m minisgl_bench NAME` is `minisgl bench NAME`, also where the package is not installed."""

import sys

from minisgl_bench.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
