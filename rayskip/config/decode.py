"""How tokens are decoded: the layer-skipping policies and the drafters. A section's `kind` says which it is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayskip.config.section import ModelConfig, Section, UserPath


class NoSkip(Section):
    """Every layer runs at every position."""

    kind: Literal["none"] = "none"


class SkipDecodeSkip(Section):
    """SkipDecode (arXiv 2307.02628): fewer layers the later the position. Lossy without fine-tuning.

    Give speedup, or max_layers and min_layers.
    """

    kind: Literal["skipdecode"]
    speedup: Literal[1, 2, 3, 4, 5] | None = Field(None, description="the paper's max and min layers, scaled")
    warmup: int = Field(1, ge=1, description="bottom layers that always run")
    max_layers: int | None = Field(None, ge=1, description="layers run at the first generated position")
    min_layers: int | None = Field(None, ge=1, description="layers run from the horizon on")
    horizon: int = Field(
        128, ge=1, description="position from which min_layers run; the median completion length suits"
    )

    @model_validator(mode="after")
    def _check_layers(self) -> SkipDecodeSkip:
        numbers = (self.max_layers, self.min_layers)
        if (self.speedup is None) == (numbers == (None, None)) or (self.speedup is None and None in numbers):
            raise ValueError("give either speedup, or both max_layers and min_layers")
        return self


class UnifiedSkip(Section):
    """Unified Layer Skipping (arXiv 2404.06954): first, last and evenly spaced layers, at every position."""

    kind: Literal["unified"]
    speedup: float = Field(ge=1, description="layers of the model / layers run")


class HierarchicalSkip(Section):
    """HSD (arXiv 2403.14919): every (skip + 1)th layer, at every position."""

    kind: Literal["hierarchical"]
    skip: int = Field(ge=1, description="layers left out between two that run")


class LayersSkip(Section):
    """An explicit schedule."""

    kind: Literal["layers"]
    layers: tuple[tuple[int, ...], ...] = Field(
        min_length=1,
        description="the layers that run at generated position 0, 1, ...; the last holds for all later",
    )


SkipConfig = Annotated[
    NoSkip | SkipDecodeSkip | UnifiedSkip | HierarchicalSkip | LayersSkip, Field(discriminator="kind")
]


class NoDraft(Section):
    """No drafter: one token per row and step."""

    kind: Literal["none"] = "none"


class LookupDraft(Section):
    """What followed the newest tokens earlier in the text (LLMA, arXiv 2304.04487)."""

    kind: Literal["lookup"]
    max_ngram: int = Field(3, ge=1, description="newest tokens looked up, at most")
    tokens: int = Field(10, ge=1, description="tokens proposed at once")


class KangarooDraft(Section):
    """The model's first layers and a trained adapter (arXiv 2404.18911)."""

    kind: Literal["kangaroo"]
    path: UserPath | None = Field(
        None, description="the adapter's folder; by default the one that ships for the model"
    )
    gamma: int = Field(6, ge=1, description="tokens drafted in a row, at most")
    eta: float = Field(
        0.6,
        ge=0,
        le=1,
        description="a draft ends where the next tokens, together, are less probable than this",
    )
    branches: int = Field(
        1,
        ge=1,
        description="top-k tokens proposed after a token; the draft continues from the top-k of its newest",
    )


class MedusaDraft(Section):
    """Heads on the last state, one for each token ahead (arXiv 2401.10774)."""

    kind: Literal["medusa"]
    path: UserPath | None = Field(
        None, description="the heads' folder; by default those that ship for the model"
    )
    branches: int = Field(1, ge=1, description="top-k tokens of each head that are verified")


class DraftModelDraft(Section):
    """A smaller model with the same tokenizer drafts greedily (arXiv 2211.17192)."""

    kind: Literal["draft_model"]
    model: ModelConfig
    tokens: int = Field(4, ge=1, description="tokens drafted in a row")


class RetrievalDraft(Section):
    """What followed the newest tokens in the replica's earlier generations or a corpus (REST, arXiv 2311.08252)."""

    kind: Literal["retrieval"]
    corpus: UserPath | None = Field(None, description="text file to begin with, a text a line")
    tokens: int = Field(10, ge=1, description="tokens proposed at once")
    max_tokens: int = Field(
        1_000_000,
        ge=1,
        description="tokens of generations remembered, half a kilobyte each; full, they are forgotten",
    )


class LookaheadDraft(Section):
    """Jacobi iteration and a pool of the n-grams it passes through (Lookahead, arXiv 2402.02057)."""

    kind: Literal["lookahead"]
    tokens: int = Field(5, ge=1, description="tokens proposed at once")


class AutoDraft(Section):
    """Lookups, a Kangaroo tree, both or nothing: at each step what pays by measured costs and acceptance rates."""

    kind: Literal["auto"]
    path: UserPath | None = Field(
        None, description="Kangaroo adapter; by default the one that ships, if one does"
    )
    max_ngram: int = Field(4, ge=1, description="newest tokens looked up, at most")
    tokens: int = Field(16, ge=1, description="tokens looked up at once, at most")
    copies: int = Field(3, ge=1, description="different continuations looked up, at most")
    gamma: int = Field(6, ge=1, description="tokens that Kangaroo drafts in a row, at most")
    branches: int = Field(2, ge=1, description="Kangaroo's top-k tokens after a token, at most")
    eta: float = Field(
        0.4,
        ge=0,
        le=1,
        description="Kangaroo's draft ends where the next tokens, together, are less probable than this",
    )


DraftConfig = Annotated[
    NoDraft
    | LookupDraft
    | RetrievalDraft
    | LookaheadDraft
    | KangarooDraft
    | MedusaDraft
    | DraftModelDraft
    | AutoDraft,
    Field(discriminator="kind"),
]


class DecodeConfig(Section):
    """Layer-skipping policy and drafter."""

    skip: SkipConfig = NoSkip()
    draft: DraftConfig = NoDraft()
