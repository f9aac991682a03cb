"""What `rayskip train` reads. A training's data and model are named by a job's sections."""

from __future__ import annotations

from pydantic import Field

from rayskip.config.decode import NoSkip, SkipConfig
from rayskip.config.job import InputConfig
from rayskip.config.section import ModelConfig, Section, UserPath


class DataConfig(Section):
    """Supervised examples: an input, and the column with the answer."""

    input: InputConfig
    answer: str = Field(description="column with the answer to learn")
    group: str | None = Field(None, description="column whose equal values stay on one side of the split")
    held_out: float = Field(0.05, gt=0, lt=1, description="share of groups kept for validation")


class LoraConfig(Section):
    """Low-rank adapters on every linear layer, merged into the checkpoint that is saved beside them."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)


class DistillConfig(Section):
    """Soft targets of a full-depth model."""

    teacher: UserPath | None = Field(None, description="its checkpoint; by default model.path")
    weight: float = Field(0.5, ge=0, le=1, description="share of the loss; the rest is cross-entropy")


class TrainingConfig(Section):
    """What the one training loop reads; every training has these keys."""

    name: str = Field(min_length=1)
    model: ModelConfig
    data: DataConfig
    steps: int = Field(ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="examples per forward and process")
    accumulate: int = Field(1, ge=1, description="forwards per step")
    learning_rate: float = Field(2e-4, gt=0)
    warmup_steps: int = Field(10, ge=0)
    seed: int = 0
    evaluate_every: int = Field(50, ge=1, description="steps between held-out losses")
    held_out_examples: int = Field(128, ge=1, description="held-out examples looked at each time")
    save_every: int = Field(100, ge=1, description="steps between checkpoints to resume from")
    keep_every: int | None = Field(
        None, ge=1, description="steps between checkpoints to evaluate: output/step-N"
    )
    output: UserPath = Field(description="local folder for what is trained and the loss curve")


class TrainSkipConfig(TrainingConfig):
    """Fine-tuning under a skip schedule: `rayskip train skip`."""

    skip: SkipConfig = NoSkip()
    lora: LoraConfig | None = Field(None, description="adapters instead of full fine-tuning")
    distill: DistillConfig | None = None


class DraftTrainingConfig(TrainingConfig):
    """What the trainings of drafters have in common."""

    head_tokens: int | None = Field(
        None,
        ge=1,
        description="most frequent tokens, which the draft's head scores; null: 16384, or as many as `start` has",
    )


class TrainKangarooConfig(DraftTrainingConfig):
    """Adapters that draft from the model's first layers: `rayskip train kangaroo`."""

    exit_layers: tuple[int, ...] = Field(
        (2, 3, 4), min_length=1, description="layers before an adapter, one each"
    )
    start: UserPath | None = Field(
        None,
        description="folder of an adapter to begin with, and its tokens; null: the model's own attention",
    )
    gamma: int = Field(6, ge=1, description="for the expected tokens per round, as in decode.draft")
    eta: float = Field(0.6, ge=0, le=1, description="as gamma")


class TrainMedusaConfig(DraftTrainingConfig):
    """Heads that draft from the model's last state: `rayskip train medusa`."""

    heads: int = Field(4, ge=1, description="one for each token drafted")
