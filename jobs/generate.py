"""The main job, for `ray job submit -- python jobs/generate.py CONFIG`: `rayskip run`, with its options."""

import sys

from rayskip.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
