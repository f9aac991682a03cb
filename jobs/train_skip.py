"""Fine-tuning under a skip schedule, for `accelerate launch jobs/train_skip.py CONFIG`: `rayskip train skip`."""

import sys

from rayskip.cli import main

if __name__ == "__main__":
    main(["train", "skip", *sys.argv[1:]])
