"""Medusa heads, for `accelerate launch jobs/train_medusa.py CONFIG`: `rayskip train medusa`."""

import sys

from rayskip.cli import main

if __name__ == "__main__":
    main(["train", "medusa", *sys.argv[1:]])
