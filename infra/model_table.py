"""Writes docs/models.md: which road each causal LM of transformers takes here, tried out on a tiny random one.

python infra/model_table.py docs/models.md                      # all, some ten minutes
python infra/model_table.py docs/models.md olmo2 bloom          # those alone, the others' lines stay

A type runs if greedy tokens of some prompts in one batch, with and without look-up drafts, are those of
transformers' generate. One that could not be made tiny is said to be untried.
"""

from __future__ import annotations

import argparse
import logging
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rayskip.config import DecodeConfig, EngineConfig, SamplingParams
from rayskip.engine import Engine
from rayskip.errors import RayskipError, first_line
from rayskip.model.checkpoint import load, resolve
from rayskip.model.decoder import Decoder
from rayskip.model.families import FAMILIES

SIZES: dict[str, int | float] = {
    **dict.fromkeys(("vocab_size",), 199),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), 96),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"), 80
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
         "encoder_attention_heads"), 6,
    ),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "sliding_window"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(
        ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_dense_layers", "bos_token_id",
         "encoder_layers"), 1,
    ),
    "pad_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
LATENT = {"head_dim": 8, "num_key_value_heads": 6, "topk_method": "greedy"}
OWN: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "minicpm3": LATENT,
    "youtu": LATENT,
    "falcon": {"head_dim": None, "num_kv_heads": 2, "new_decoder_architecture": True},
}
"""What some types need otherwise. None: as it comes."""
GIVEN = (
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "head_dim",
    "num_key_value_heads",
    "n_inner",
    "sliding_window",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Keys that are set although a type's default is none."""
KINDS = ("layer_types", "mlp_layer_types")
"""Lists with an entry for each layer."""
MOST = 30_000_000
"""Weights of a tiny one."""
NOTES = {
    "arcee": "squared ReLU without a gate",
    "cohere": "both branches from one norm, rope by neighbours, scaled logits; `use_qk_norm` is refused",
    "cohere2": "as `cohere`, and layers that see everything have no rope",
    "ernie4_5": "rope by neighbours",
    "exaone4": "norms after the branches; layers that see everything have no rope",
    "falcon": "both architectures; `alibi` is refused",
    "gemma3": "of a model that also sees images, the language model",
    "glm": "half of a head turned, rope by neighbours",
    "glm4": "as `glm`, with norms after the branches too",
    "glm4_moe": "GLM 4.5: shared experts, groups of experts",
    "gpt2": "`add_cross_attention` and `scale_attn_by_inverse_layer_idx` are refused",
    "gpt_oss": "attention sinks; MXFP4 is read as the bfloat16 that it stands for",
    "granite": "`residual_multiplier` is folded into weights, which rounds them once more where they are bfloat16",
    "granitemoe": "as `granite`",
    "helium": "rope by neighbours",
    "hunyuan_v1_dense": "norms on queries and keys after rope",
    "llama": "SmolLM, Vicuna and many others",
    "ministral3": "texts up to `original_max_position_embeddings`: past them it scales queries by position",
    "mistral3": "of a model that also sees images, the language model (`mistral` or `ministral3`)",
    "nemotron": "squared ReLU without a gate",
    "olmo": "norms without weights; `clip_qkv` is refused",
    "olmo2": "norms after the branches, and over all heads' queries and keys",
    "olmo3": "as `olmo2`, with windows",
    "olmoe": "norms over all heads; `clip_qkv` is refused",
    "opt": "projected embeddings and norms after the branches (OPT-350m) are refused",
    "phi": "Phi-1, 1.5 and 2",
    "phi3": "Phi-3 with a short context, Phi-4; `longrope` is refused",
    "qwen2_5_vl": "the language model, on text alone",
    "qwen2_moe": "a shared expert with a gate",
    "qwen2_vl": "the language model, on text alone",
    "qwen3_vl": "the language model, on text alone",
    "smollm3": "every fourth layer has no rope",
    "stablelm": "`qk_layernorm` is refused",
}
"""What is special about types that we have families for."""
PROMPT_LENGTHS = (1, 5, 17, 33, 40)
NEW_TOKENS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("types", nargs="*")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    lines = read_lines(arguments.output) if arguments.types else {}
    for model_type in arguments.types or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *FAMILIES}):
        lines[model_type] = line = road(model_type)
        print(f"{model_type}: {line}", flush=True)
        arguments.output.write_text(table(lines))


def road(model_type: str) -> str:
    """What runs a model_type here, or why nothing does."""
    if model_type in FAMILIES:
        return f"own: {NOTES[model_type]}" if model_type in NOTES else "own"
    try:
        config = tiny_config(model_type)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
        if size > MOST:
            return f"untried: no tiny one can be made (it has {size:,} weights)"
        torch.manual_seed(0)
        peer = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except Exception as error:  # of a type whose sizes hang together in a way of their own
        return f"untried: no tiny one can be made ({said(error)})"
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    with tempfile.TemporaryDirectory() as folder:
        try:
            peer.save_pretrained(folder)
            decoder = Decoder(*load(resolve(folder), torch.float32, torch.device("cpu")))
            return "through transformers" if same_tokens(decoder, peer) else "WRONG: other tokens"
        except RayskipError as error:
            return f"refused: {said(error, folder)}"
        except Exception as error:
            return f"FAILS: {type(error).__name__}: {said(error, folder)}"


def said(error: Exception, folder: str = "no folder") -> str:
    """An error without what is the same in all, in a table's cell."""
    words = first_line(error).replace(folder, "FOLDER")
    for prefix in ("model.path: FOLDER: ", "transformers' modules: "):
        words = words.partition(prefix)[2] or words
    return re.sub(r" \(\w+(Error|Exception): .*", "", words).replace("|", "/")[:160]


def tiny_config(model_type: str) -> Any:
    """A config of the type, small enough to run in a second."""
    text = CONFIG_MAPPING[model_type]().get_text_config()
    own = OWN.get(model_type, {})
    sizes = {
        name: own.get(name, size)
        for name, size in SIZES.items()
        if is_settable(text, name) and (getattr(text, name) is not None or name in GIVEN)
    }
    sizes |= {name: value for name, value in own.items() if is_settable(text, name)}
    for name in KINDS:
        if is_settable(text, name) and (every := getattr(text, name)):
            sizes[name] = [*dict.fromkeys(every), *every][: SIZES["num_hidden_layers"]]
    return type(text)(**{name: value for name, value in sizes.items() if value is not None})


def is_settable(config: Any, name: str) -> bool:
    """Whether it has such a key, of its own or under another name."""
    kind = getattr(type(config), config.attribute_map.get(name, name), None)
    return hasattr(config, name) and not (isinstance(kind, property) and kind.fset is None)


def same_tokens(decoder: Decoder, peer: Any) -> bool:
    """Whether both choose the same tokens."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 190, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    theirs = [
        peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    for draft in ("none", "lookup"):
        decode = DecodeConfig.model_validate({"draft": {"kind": draft}})
        engine = Engine(decoder, engine=EngineConfig(max_batch_rows=3), decode=decode)
        ours = engine.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
        if [generation.token_ids for (generation,) in ours] != theirs:
            return False
    return True


def read_lines(file: Path) -> dict[str, str]:
    """What a table says already."""
    rows = [
        line.strip("| \n").split(" | ") for line in file.read_text().splitlines() if line.startswith("| `")
    ]
    return {name.strip("`"): line for name, line in rows}


HEAD = """# Models

Which `model_type`s run: {own} by a family of ours, {through} more through modules of transformers {version}. Written by
`infra/model_table.py`, which generates with a tiny random model of each type in float32, and compares its tokens with those of
transformers; for our families the tests do that.

Through transformers a model runs more slowly, and Kangaroo and Medusa, which need its parts, do not draft for it. Layer
skipping, look-up drafts, the paged cache and all else of a job are the same. Whether tokens depend on the batch is measured for
each model, and stands in the report.

Whatever the model type, refused are: quantised weights, code in the checkpoint, another head (a reward, a class, an embedding),
and rope whose angles change with the text's length (`longrope`). Rope of type `dynamic` is the plain one up to
`max_position_embeddings`, and texts are no longer than that. Of a model that also sees images the vision tensors are not read;
its image tokens are tokens like any others.

| `model_type` | runs |
|---|---|
"""  # noqa: E501


def table(lines: dict[str, str]) -> str:
    count = {start: sum(line.startswith(start) for line in lines.values()) for start in ("own", "through")}
    head = HEAD.format(**count, version=transformers.__version__)
    return head + "".join(f"| `{name}` | {line} |\n" for name, line in sorted(lines.items()))


if __name__ == "__main__":
    main()
