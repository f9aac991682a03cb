"""Writes a Llama of any size with random weights and the embedded model's tokenizer: to time, not to read.

python infra/random_llama.py out/llama-7b                                  # the shape of Llama 2 7B, 14 GB
python infra/random_llama.py out/small --layers 4 --hidden 512 --intermediate 1376 --heads 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rayskip.model.checkpoint import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Llama with random weights in bfloat16.")
    parser.add_argument("output", type=Path, help="folder")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"), trust_remote_code=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
