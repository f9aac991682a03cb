"""Kangaroo adapters, for `accelerate launch jobs/train_kangaroo.py CONFIG`: `rayskip train kangaroo`."""

import sys

from rayskip.cli import main

if __name__ == "__main__":
    main(["train", "kangaroo", *sys.argv[1:]])
