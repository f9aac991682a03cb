"""Every family against transformers in float32: logits, and greedy tokens of ragged prompts in one batch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import reference_logits
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rayskip.config import DecodeConfig, EngineConfig, SamplingParams
from rayskip.engine import Engine
from rayskip.errors import ModelError
from rayskip.model.backends.torch import TorchBackend
from rayskip.model.checkpoint import load
from rayskip.model.decoder import Decoder
from rayskip.model.families import FAMILIES
from rayskip.model.invariance import is_batch_invariant
from rayskip.skip import skip_policy
from rayskip.train.examples import Example, collate
from rayskip.train.skip import answer_logits

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPE_MINISTRAL3 = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 128,
    "llama_4_scaling_beta": 0.1,
}
ROPE_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_IMAGES = {**ROPE_PLAIN, "mrope_section": [4, 2, 2]}
ROPE_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
ROPE_ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0}
ROPE_LONG = {
    **ROPE_PLAIN,
    "rope_type": "longrope",
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "depth": 1,
    "embed_dim": 16,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 96,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
WINDOWS = ["sliding_attention", "full_attention"] * 2
PLAIN = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
OPT_SIZES = {
    **{key: PLAIN[key] for key in PLAIN if key not in ("intermediate_size", "initializer_range")},
    "ffn_dim": 80,
    "init_std": 0.3,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3}


def _config(model_type: str, **own: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **{**SIZES, **own})


def _wrapping(model_type: str, text_type: str, **own: Any) -> PreTrainedConfig:
    """A model that also sees images."""
    return AutoConfig.for_model(
        model_type, text_config={"model_type": text_type, **SIZES, **own}, vision_config=VISION
    )


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-scaled-rope": LlamaConfig(**SIZES, rope_parameters=ROPE_LLAMA3, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=8, head_dim=32),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": Qwen3Config(**SIZES, head_dim=48),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=32, sliding_window=8, layer_types=WINDOWS, query_pre_attn_scalar=12
    ),
    "gemma3_text": Gemma3TextConfig(
        **SIZES, head_dim=32, sliding_window=8, layer_types=WINDOWS, query_pre_attn_scalar=12
    ),
    "gemma3": Gemma3Config(
        text_config={
            **SIZES,
            "head_dim": 32,
            "sliding_window": 8,
            "layer_types": WINDOWS,
            "query_pre_attn_scalar": 12,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=1,
        boi_token_index=196,
        eoi_token_index=197,
        image_token_index=198,
    ),
    "gpt_neox": GPTNeoXConfig(**PLAIN, rotary_pct=0.5),
    "gpt_neox-sequential": GPTNeoXConfig(**PLAIN, use_parallel_residual=False),
    "opt": OPTConfig(**OPT_SIZES, word_embed_proj_dim=96),
    "arcee": _config("arcee"),
    "cohere": _config("cohere", logit_scale=0.3),
    "cohere2": _config("cohere2", sliding_window=8, layer_types=WINDOWS),
    "ernie4_5": _config("ernie4_5", head_dim=32),
    "exaone4": _config("exaone4", sliding_window=8, layer_types=WINDOWS),
    "falcon": _config("falcon", rope_parameters=ROPE_PLAIN),
    "falcon-new": _config("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "gemma": _config("gemma", head_dim=32),
    "gpt2": _config("gpt2"),
    "gptj": _config("gptj", rotary_dim=8),
    "mistral3": _wrapping("mistral3", "ministral3", rope_parameters=ROPE_MINISTRAL3, head_dim=32),
    "qwen2_5_vl": _wrapping("qwen2_5_vl", "qwen2_5_vl_text", rope_parameters=ROPE_IMAGES),
    "qwen2_vl": _wrapping("qwen2_vl", "qwen2_vl_text", rope_parameters=ROPE_IMAGES),
    "qwen3_vl": _wrapping("qwen3_vl", "qwen3_vl_text", head_dim=16, rope_parameters=ROPE_IMAGES),
    "glm": _config("glm", head_dim=32),
    "glm4": _config("glm4", head_dim=32),
    "granite": _config(
        "granite",
        attention_multiplier=0.2,
        embedding_multiplier=3.0,
        logits_scaling=1.7,
        residual_multiplier=0.6,
    ),
    "helium": _config("helium", head_dim=16),
    "hunyuan_v1_dense": _config("hunyuan_v1_dense", head_dim=32),
    "ministral": _config("ministral", sliding_window=8, layer_types=WINDOWS, head_dim=32),
    "ministral3": _config("ministral3", sliding_window=8, head_dim=32, rope_parameters=ROPE_MINISTRAL3),
    "nemotron": _config("nemotron"),
    "olmo": _config("olmo"),
    "olmo2": _config("olmo2"),
    "olmo3": _config("olmo3", sliding_window=8, layer_types=WINDOWS),
    "phi": _config("phi"),
    "phi3": _config("phi3", sliding_window=8),
    "seed_oss": _config("seed_oss", head_dim=32),
    "smollm3": _config("smollm3", no_rope_layers=[1, 0, 1, 0]),
    "stablelm": _config("stablelm"),
    "starcoder2": _config("starcoder2", sliding_window=8),
    "mixtral": MixtralConfig(**SIZES, sliding_window=8, num_local_experts=8, num_experts_per_tok=3),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, **EXPERTS, moe_intermediate_size=48, shared_expert_intermediate_size=64, mlp_only_layers=[1]
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, **EXPERTS, moe_intermediate_size=48, head_dim=48, norm_topk_prob=True
    ),
    "olmoe": OlmoeConfig(**SIZES, **EXPERTS),
    "granitemoe": GraniteMoeConfig(
        **SIZES,
        num_local_experts=8,
        num_experts_per_tok=3,
        attention_multiplier=0.2,
        embedding_multiplier=1.5,
        residual_multiplier=0.7,
        logits_scaling=1.3,
    ),
    "glm4_moe": Glm4MoeConfig(
        **SIZES,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=48,
        routed_scaling_factor=1.7,
        head_dim=32,
        use_qk_norm=True,
        attention_bias=True,
    ),
    "gpt_oss": GptOssConfig(
        **SIZES,
        num_local_experts=8,
        num_experts_per_tok=3,
        head_dim=48,
        sliding_window=8,
        swiglu_limit=1.5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    ),
}
GEMMA3: Any = CONFIGS["gemma3"]
ROPE_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 24,
}
VARIANTS: dict[str, PreTrainedConfig] = {
    "falcon-one-norm": _config(
        "falcon", new_decoder_architecture=True, num_kv_heads=3, num_ln_in_parallel_attn=1, bias=True
    ),
    "falcon-sequential": _config("falcon", multi_query=False, parallel_attn=False),
    "exaone4-full": _config("exaone4", sliding_window=None, layer_types=["full_attention"] * 4),
    "hunyuan-alpha": _config("hunyuan_v1_dense", head_dim=32, rope_parameters=ROPE_ALPHA),
    "llama-dynamic-rope": LlamaConfig(**SIZES, rope_parameters=ROPE_DYNAMIC),
    "llama-linear-rope": LlamaConfig(**SIZES, rope_parameters={**ROPE_DYNAMIC, "rope_type": "linear"}),
    "mistral3-mistral": _wrapping("mistral3", "mistral", head_dim=32),
    "nemotron-biases": _config("nemotron", attention_bias=True, mlp_bias=True),
    "phi-head-norms": _config("phi", qk_layernorm=True),
    "stablelm-parallel": _config("stablelm", use_parallel_residual=True, use_qkv_bias=True),
    "starcoder2-no-biases": _config("starcoder2", use_bias=False),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-yarn": LlamaConfig(**{**SIZES, "max_position_embeddings": 24}, rope_parameters=ROPE_YARN),
    "qwen3-biases": Qwen3Config(**SIZES, head_dim=48, attention_bias=True),
    "gemma2-biases": Gemma2Config(**SIZES, head_dim=32, attention_bias=True, final_logit_softcapping=None),
    "gemma3-untied": Gemma3Config(
        text_config={**GEMMA3.text_config.to_dict(), "tie_word_embeddings": True},
        vision_config=GEMMA3.vision_config.to_dict(),
        mm_tokens_per_image=1,
        image_token_index=198,
        tie_word_embeddings=False,
    ),
    "gpt_neox-no-biases": GPTNeoXConfig(**PLAIN, attention_bias=False, rotary_pct=0.25),
    "qwen2_moe-windows": Qwen2MoeConfig(
        **SIZES,
        **EXPERTS,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=64,
        norm_topk_prob=True,
        use_sliding_window=True,
        sliding_window=8,
        decoder_sparse_step=2,
        qkv_bias=False,
    ),
    "qwen3_moe-window": Qwen3MoeConfig(
        **SIZES,
        **EXPERTS,
        moe_intermediate_size=48,
        head_dim=48,
        use_sliding_window=True,
        sliding_window=8,
        attention_bias=True,
    ),
    "olmoe-normalised": OlmoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True, attention_bias=True),
    "opt-no-biases": OPTConfig(**OPT_SIZES, enable_bias=False),
}
"""Switches of the configs, whose logits alone are compared."""
ON_TORCH = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "opt")
"""What runs on torch's operations alone too; tests/backends compares the rest of the parts."""
TRAINED = ("cohere2", "falcon", "gpt2", "gpt_neox", "gptj", "olmo3", "opt", "qwen2_5_vl")
"""Models whose layers transformers calls in ways of their own."""
SCHEDULE = {"kind": "skipdecode", "speedup": 2, "horizon": 8}
PROMPT_LENGTHS = (1, 5, 17, 33, 40)
NEW_TOKENS = 24


def test_every_family_is_covered() -> None:
    configs = [own for config in CONFIGS.values() for own in (config, config.get_text_config())]
    assert {config.model_type for config in configs} >= set(FAMILIES)


def test_the_table_of_models_is_that_of_the_families() -> None:
    table = Path(__file__).parents[1] / "docs/models.md"
    rows = dict(
        re.findall(r"^\| `([\w-]+)` \| (own|through|refused|untried)", table.read_text(), re.MULTILINE)
    )
    assert {name for name, road in rows.items() if road == "own"} == set(FAMILIES)
    assert rows.keys() <= set(CONFIG_MAPPING)


def new_peer(config: PreTrainedConfig) -> Any:
    """transformers' model with random weights, in float32."""
    torch.manual_seed(0)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    model = kind.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a swap
        for parameter in model.parameters():
            if parameter.dim() == 1 or (parameter.dim() == 2 and not parameter.any()):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    return model


@pytest.mark.parametrize("name", [*CONFIGS, *VARIANTS])
def test_reference_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    peer = new_peer((CONFIGS | VARIANTS)[name])
    peer.save_pretrained(tmp_path)
    token_ids = torch.randint(3, 190, (45,), generator=torch.Generator().manual_seed(2)).tolist()

    spec, weights = load(tmp_path, torch.float32, torch.device("cpu"))

    with torch.no_grad():
        expected = peer(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(reference_logits(spec, weights, token_ids), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "ops"), [*((name, "native") for name in CONFIGS), *((name, "torch") for name in ON_TORCH)]
)
def test_greedy_tokens_equal_transformers(name: str, ops: str, tmp_path: Path) -> None:
    peer = new_peer(CONFIGS[name])
    peer.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 190, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    spec, weights = load(tmp_path, torch.float32, torch.device("cpu"))
    decoder = Decoder(
        spec,
        weights,
        TorchBackend(spec, weights.embed.dtype, weights.embed.device) if ops == "torch" else None,
    )
    if decoder.backend.name != ops:
        pytest.skip("no C compiler here")
    engine = Engine(decoder, engine=EngineConfig(max_batch_rows=4))
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=3)

    ours = engine.generate(prompts, params)

    for prompt, (generation,) in zip(prompts, ours, strict=True):
        with (
            torch.no_grad()
        ):  # what is greedy after every token is what generating token by token would have chosen
            logits = peer(torch.tensor([prompt + generation.token_ids[:-1]])).logits[0, len(prompt) - 1 :]
        theirs = logits.argmax(-1)
        assert generation.token_ids == theirs.tolist()
        expected = torch.log_softmax(logits, -1).gather(1, theirs[:, None])[:, 0]
        assert generation.logprobs is not None
        measured = torch.tensor([entry.logprob for entry in generation.logprobs])
        torch.testing.assert_close(measured, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["cohere2", "granite", "hunyuan_v1_dense", "nemotron", "olmo3", "smollm3"])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(name: str, tmp_path: Path) -> None:
    new_peer(CONFIGS[name]).save_pretrained(tmp_path)
    assert is_batch_invariant(Decoder(*load(tmp_path, torch.bfloat16, torch.device("cpu"))))


@pytest.mark.parametrize("name", TRAINED)
def test_training_under_a_schedule_runs_the_same_layers(name: str, tmp_path: Path) -> None:
    peer = new_peer(CONFIGS[name])
    peer.save_pretrained(tmp_path)
    spec, weights = load(tmp_path, torch.float32, torch.device("cpu"))
    policy = skip_policy(DecodeConfig.model_validate({"skip": SCHEDULE}).skip, len(weights.layers))
    examples = [Example([5, 6, 7, 8, 9], list(range(10, 22)), ""), Example([5, 7], list(range(30, 38)), "")]
    with torch.no_grad():
        trained = answer_logits(peer, collate(examples, pad=0), policy)

    for row, example in zip(trained, examples, strict=True):
        first = len(example.prompt)

        def runs(layer: int, position: int, first: int = first) -> bool:
            return position < first or layer in policy.layers(position - first)

        expected = reference_logits(spec, weights, example.prompt + example.answer[:-1], runs)[first - 1 :]
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (OPTConfig(**OPT_SIZES, word_embed_proj_dim=48), "word_embed_proj_dim"),
        (OPTConfig(**OPT_SIZES, word_embed_proj_dim=96, do_layer_norm_before=False), "norms after"),
        (LlamaConfig(**SIZES, hidden_act="tanh"), "activation 'tanh'"),
        (_config("cohere", use_qk_norm=True), "use_qk_norm"),
        (_config("falcon", alibi=True), "alibi"),
        (_config("gemma", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (_config("gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (_config("olmo", clip_qkv=8.0), "clip_qkv"),
        (_config("phi3", rope_parameters=ROPE_LONG), "rope_type 'longrope'"),
        (_config("stablelm", qk_layernorm=True), "qk_layernorm"),
        (Gemma3TextConfig(**SIZES, use_bidirectional_attention=True), "use_bidirectional_attention"),
        (Gemma2Config(**SIZES, use_bidirectional_attention=True), "use_bidirectional_attention"),
        (Gemma3TextConfig(**SIZES, attn_logit_softcapping=30.0), "attn_logit_softcapping"),
        (OPTConfig(**OPT_SIZES, layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine"),
        (
            Qwen2Config(**SIZES, layer_types=["full_attention"] * 3 + ["linear_attention"]),
            "layer_types must say",
        ),
        (Qwen3Config(**SIZES, layer_types=["sliding_attention"] * 4), "there is no sliding_window"),
    ],
    ids=[
        "projected-embeddings",
        "post-norm",
        "activation",
        "cohere-head-norms",
        "falcon-alibi",
        "gemma-bidirectional",
        "gpt2-scale",
        "olmo-clip",
        "longrope",
        "stablelm-head-norms",
        "gemma3-bidirectional",
        "gemma2-bidirectional",
        "gemma3-softcap",
        "plain-norms",
        "linear-attention",
        "no-window",
    ],
)
def test_unsupported_variant_is_refused(config: PreTrainedConfig, problem: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=problem):
        load(tmp_path, torch.float32, torch.device("cpu"))
