"""How tokens are sampled, and when a generation ends. A row of the dataset may carry its own parameters."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticKnownError

from rayskip.config.constraint import Constraint
from rayskip.config.section import Section


def _only_numbers(error: str) -> BeforeValidator:
    """Refuse true and "7", which pydantic would convert to numbers. error: pydantic's name of the refusal."""

    def check(value: object) -> object:
        if isinstance(value, bool | str | bytes):
            raise PydanticKnownError(error)  # type: ignore[arg-type]
        return value

    return BeforeValidator(check)


Int = Annotated[int, _only_numbers("int_type")]
Float = Annotated[float, _only_numbers("float_type")]
TokenId = Annotated[Int, Field(ge=0, lt=2**31)]
StopText = Annotated[str, Field(max_length=1024)]


class SamplingParams(Section):
    """How tokens are sampled; the names are vLLM's and OpenAI's.

    A row may have its own parameters, so bounds keep what one row can cost a replica small.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    max_tokens: Int = Field(128, ge=1, lt=2**31, description="most tokens to generate")
    temperature: Float = Field(0.0, ge=0, le=1000, description="0 is greedy")
    top_p: Float = Field(1.0, gt=0, le=1)
    top_k: Int = Field(0, ge=-1, lt=2**31, description="0 or -1: all tokens")
    min_p: Float = Field(0.0, ge=0, le=1)
    repetition_penalty: Float = Field(1.0, gt=0, le=1000)
    presence_penalty: Float = Field(
        0.0, ge=-2, le=2, description="taken from the logit of each token generated before"
    )
    frequency_penalty: Float = Field(
        0.0, ge=-2, le=2, description="likewise, as often as the token was generated"
    )
    logit_bias: dict[Annotated[int, Field(ge=0, lt=2**31)], Float] = Field(
        {}, max_length=1024, description="added to logits, by token id"
    )
    min_tokens: Int = Field(
        0, ge=0, lt=2**31, description="before so many tokens, no end token and none of stop_token_ids comes"
    )
    stop: tuple[StopText, ...] = Field(
        (), max_length=64, description="strings that end the text; not part of it"
    )
    include_stop_str_in_output: bool = Field(
        False, strict=True, description="the text ends with its stop string"
    )
    stop_token_ids: tuple[TokenId, ...] = Field((), max_length=1024)
    seed: Int = Field(
        0, ge=-(2**63), lt=2**64, description="the job seed; a row's stream is hash(seed, row, sample)"
    )
    n: Int = Field(1, ge=1, le=1024, description="samples per row")
    logprobs: Int | None = Field(
        None, ge=0, le=20, description="log-probabilities of the token and this many others"
    )
    ignore_eos: bool = Field(False, strict=True)
    constraint: Constraint | None = Field(None, description="which texts a generation may be")

    @field_validator("stop", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @property
    def counts_tokens(self) -> bool:
        """Whether the next token depends on which were generated before, but by the model."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def reads_tokens(self) -> bool:
        """Whether it depends on which came before, the prompt's too, but by the model."""
        return self.repetition_penalty != 1 or self.counts_tokens

    @model_validator(mode="after")
    def _check_constraint(self) -> SamplingParams:
        for key in ("ignore_eos", "min_tokens"):
            if self.constraint is not None and getattr(self, key):
                raise ValueError(
                    f"{key} and a constraint, which may leave no token but the end, exclude each other"
                )
        return self

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not text for text in value):
            raise ValueError("a stop string may not be empty")
        return value
