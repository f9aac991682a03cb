"""Which config each command reads."""

from __future__ import annotations

from rayskip.config.evaluate import BenchConfig, EvalQualityConfig, SpecBenchConfig
from rayskip.config.job import JobConfig
from rayskip.config.section import Section
from rayskip.config.train import TrainKangarooConfig, TrainMedusaConfig, TrainSkipConfig

CONFIGS: dict[str, type[Section]] = {
    "run": JobConfig,
    "bench": BenchConfig,
    "train skip": TrainSkipConfig,
    "train kangaroo": TrainKangarooConfig,
    "train medusa": TrainMedusaConfig,
    "eval quality": EvalQualityConfig,
    "eval spec-bench": SpecBenchConfig,
}
