"""Peer: transformers' continuous batching (`generate_batch`, paged attention)."""

from __future__ import annotations

from collections.abc import Callable

from common import Arguments, TokenIds, serve
from transformers_generate import load_model


def load(arguments: Arguments) -> Callable[[TokenIds], TokenIds]:
    import torch
    from transformers import ContinuousBatchingConfig

    model = load_model(arguments, attn_implementation="sdpa")
    page = ContinuousBatchingConfig().page_size  # positions
    blocks = arguments.batch_rows * -(-arguments.longest // page)

    def generate(prompts: TokenIds) -> TokenIds:
        # the library's own choice is most of the machine's memory, free or not
        sizes = ContinuousBatchingConfig(
            page_size=page, num_blocks=blocks, max_requests_per_batch=arguments.batch_rows
        )
        with torch.no_grad():  # not inference_mode: the library computes in a thread of its own
            found = model.generate_batch(
                inputs=prompts, generation_config=model.generation_config, continuous_batching_config=sizes
            )
        # in the order of the requests, which their names count; not in that of their ends
        done = sorted(found.values(), key=lambda one: int(one.request_id.rsplit("_", 1)[-1]))
        return [list(one.generated_tokens) for one in done]

    return generate


if __name__ == "__main__":
    serve(load)
