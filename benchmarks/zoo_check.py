"""`python -m benchmarks.zoo_check --only rechub.DeepFM --batches 2,7,64`: the same as `recompile zoo`."""

import sys

from recompile.cli import main

if __name__ == "__main__":
    sys.exit(main(["zoo", *sys.argv[1:]]))
