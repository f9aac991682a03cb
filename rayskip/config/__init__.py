"""The config of a job and of every other command: frozen pydantic sections, unknown keys refused.

The names below are a job's sections. train, evaluate: the other commands' configs; commands: all of them by
command; file: reads a YAML file and `--set`.

Knows neither torch nor ray: `rayskip schema`, `--help` and every validation answer before they load.
Field descriptions are the reference documentation; `rayskip schema` prints them.
"""

from rayskip.config.decode import (
    AutoDraft,
    DecodeConfig,
    DraftConfig,
    DraftModelDraft,
    HierarchicalSkip,
    KangarooDraft,
    LayersSkip,
    LookaheadDraft,
    LookupDraft,
    MedusaDraft,
    NoDraft,
    NoSkip,
    RetrievalDraft,
    SkipConfig,
    SkipDecodeSkip,
    UnifiedSkip,
)
from rayskip.config.job import (
    ClusterConfig,
    EngineConfig,
    InputConfig,
    JobConfig,
    OutputConfig,
    QualityConfig,
    RetryConfig,
)
from rayskip.config.sampling import SamplingParams
from rayskip.config.section import Dtype, ModelConfig, Section

__all__ = [
    "AutoDraft",
    "ClusterConfig",
    "DecodeConfig",
    "DraftConfig",
    "DraftModelDraft",
    "Dtype",
    "EngineConfig",
    "HierarchicalSkip",
    "InputConfig",
    "JobConfig",
    "KangarooDraft",
    "LayersSkip",
    "LookaheadDraft",
    "LookupDraft",
    "MedusaDraft",
    "ModelConfig",
    "NoDraft",
    "NoSkip",
    "OutputConfig",
    "QualityConfig",
    "RetrievalDraft",
    "RetryConfig",
    "SamplingParams",
    "Section",
    "SkipConfig",
    "SkipDecodeSkip",
    "UnifiedSkip",
]
