"""A labelling task: which labels there are, how one is chosen, and how sure of it one may be."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rayskip.config.section import Section, UserPath, as_text

Label = Annotated[str, Field(min_length=1, max_length=1024)]


class LabelledFile(Section):
    """Rows whose label is known, read as the input is."""

    path: UserPath = Field(description="file, glob or folder, as input.path")
    column: str = Field("label", description="column with the right label")


class LabelTask(Section):
    """Gives each row one of some labels, with how likely the model holds it."""

    kind: Literal["label"] = "label"
    labels: dict[Label, str | None] = Field(
        min_length=2, max_length=10_000, description="a list, or what each label means by its name"
    )
    method: Literal["score", "generate"] = Field(
        "score",
        description="score: a forward per row gives every label's probability; generate: the model writes a label",
    )
    instruction: str = Field(
        "Which label fits the text best? Answer with the label alone.",
        min_length=1,
        description="what the model is told before the labels and the text",
    )
    by_token: bool = Field(
        False,
        strict=True,
        description="compare labels by the mean log-probability of their tokens, and not by the sum, which favours "
        "short ones",
    )
    abstain_below: float | None = Field(
        None, gt=0, le=1, description="a row whose label is less probable than this has none"
    )
    calibrate: LabelledFile | None = Field(
        None, description="labelled rows to which the probabilities are fitted, by one temperature"
    )
    gold: str | None = Field(
        None,
        description="column of the input with the right label, for accuracy and calibration in the report",
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _read_labels(cls, value: object) -> object:
        """A list is labels without a description."""
        if isinstance(value, list | tuple):
            every = [str(label).strip() for label in value]
            if twice := [label for place, label in enumerate(every) if label in every[:place]]:
                raise ValueError(f"names {twice[0]} twice")
            value = dict.fromkeys(value)
        if not isinstance(value, dict):
            raise ValueError("must be a list of labels, or what each means by its name")
        if len(value) < 2:
            raise ValueError(f"must have two labels at least, got {len(value)}")
        return {as_text(label): said for label, said in value.items()}

    @model_validator(mode="after")
    def _check_method(self) -> LabelTask:
        if self.method == "generate":
            for key in ("by_token", "abstain_below", "calibrate"):
                if getattr(self, key) not in (None, False):
                    raise ValueError(f"{key} needs method: score, which gives probabilities")
        return self

    @property
    def names(self) -> list[str]:
        return list(self.labels)
