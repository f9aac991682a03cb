"""Peer: transformers' `generate`, in static left-padded batches of rows sorted by prompt length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common import Arguments, TokenIds, serve


def load_model(arguments: Arguments, **options: Any) -> Any:
    """The model, greedy by its generation config: a checkpoint's own may ask for penalties or sampling.

    options: of from_pretrained.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    greedy: Any = GenerationConfig
    dtype = getattr(torch, arguments.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=dtype, trust_remote_code=False, **options
    )
    eos = None if arguments.ignore_eos else model.generation_config.eos_token_id
    model.generation_config = greedy(
        max_new_tokens=arguments.max_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load(arguments: Arguments) -> Callable[[TokenIds], TokenIds]:
    import torch

    model = load_model(arguments)
    eos = model.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])

    def until_end(tokens: list[int]) -> list[int]:
        """Without the padding behind the token that ends a row."""
        stop = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
        return tokens[:stop]

    def batch(prompts: TokenIds) -> TokenIds:
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with torch.inference_mode():
            found = model.generate(
                torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
            )
        return [until_end(tokens) for tokens in found[:, width:].tolist()]

    def generate(prompts: TokenIds) -> TokenIds:
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        completions: dict[int, list[int]] = {}
        for start in range(0, len(order), arguments.batch_rows):
            some = order[start : start + arguments.batch_rows]
            completions.update(zip(some, batch([prompts[index] for index in some]), strict=True))
        return [completions[index] for index in range(len(prompts))]

    return generate


if __name__ == "__main__":
    serve(load)
