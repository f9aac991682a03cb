"""What every training starts from: the base model's folder, its tokenizer, and examples split in two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayskip.config import ModelConfig, SamplingParams
from rayskip.config.train import DataConfig
from rayskip.data.prompts import PromptBuilder
from rayskip.data.tokenizer import Encoder, Tokenizer, has_tokenizer, load_pretrained
from rayskip.errors import InputError, ModelError
from rayskip.model.checkpoint import read_spec, resolve
from rayskip.model.quantised import WANTED, read_scheme
from rayskip.train.examples import Example, read_examples, split

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """end: the token that ends an answer, which also pads."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    end: int
    training: list[Example]
    held_out: list[Example]


def prepare(model: ModelConfig, data: DataConfig, least: int, logprobs: bool = False) -> Prepared:
    """logprobs: read what a job says of other tokens, see `read_examples`.

    Raises UserError for what the config names and is not there, or fewer than `least` examples to train on.
    """
    folder = resolve(model.path, model.revision)
    _check_floats(folder)
    if not has_tokenizer(folder):
        raise ModelError(f"{folder}: training needs a tokenizer, and the model has none")
    pretrained = load_pretrained(folder)
    tokenizer = Tokenizer.of(pretrained)
    spec = read_spec(folder)
    builder = PromptBuilder(data.input, SamplingParams(), tokenizer, spec.max_positions)
    end: int = pretrained.eos_token_id
    examples = read_examples(data, Encoder(tokenizer), builder, end, spec.vocab if logprobs else None)
    training, held_out = split(examples, data.held_out)
    if len(training) < least or not held_out:
        raise InputError(
            f"{data.input.path}: {len(training)} examples to train on and {len(held_out)} held out; "
            f"at least {least} (batch_size) and 1 are needed"
        )
    return Prepared(folder, pretrained, end, training, held_out)


def _check_floats(folder: Path) -> None:
    """Refuse weights that transformers would train, or learn from, in their quantised form."""
    if read_scheme(folder):
        raise ModelError(
            f"model.path: {folder} is quantised, and training is of weights in floating point; {WANTED}"
        )


def frozen(folder: Path) -> Any:
    """A checkpoint as a transformers model that learns nothing: a teacher, a target."""
    from rayskip.train.precision import fast_dtype

    _check_floats(folder)
    return transformers_model(folder, fast_dtype()).eval().requires_grad_(False)


def transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    """A checkpoint as transformers has it: a causal LM, or what also sees images."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    made = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    return made.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
