"""Writes a Llama, or a Qwen 3 with experts, of any size with random weights and the embedded model's tokenizer: to
time, not to read.

python infra/random_llama.py out/llama-7b                                  # the shape of Llama 2 7B, 14 GB
python infra/random_llama.py out/small --layers 4 --hidden 512 --intermediate 1376 --heads 8
python infra/random_llama.py out/moe --layers 12 --hidden 768 --intermediate 448 --heads 12 --experts 32
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from rayskip.model.checkpoint import resolve

ACTIVE = 4
"""Experts that a token goes to."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model with random weights in bfloat16.")
    parser.add_argument("output", type=Path, help="folder")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument(
        "--experts", type=int, help="of each layer, --intermediate wide; 4 of them for a token"
    )
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"), trust_remote_code=False)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.heads,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config: PreTrainedConfig = LlamaConfig(**sizes)
    if arguments.experts:
        config = Qwen3MoeConfig(
            **sizes,
            moe_intermediate_size=arguments.intermediate,
            num_experts=arguments.experts,
            num_experts_per_tok=ACTIVE,
            head_dim=arguments.hidden // arguments.heads,
            norm_topk_prob=True,
        )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
