"""Skip policies: the paper's numbers, nestedness; what the engine and the training make of them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from reference import reference_logits
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig

from rayskip.config import DecodeConfig, EngineConfig, ModelConfig, SamplingParams, SkipConfig
from rayskip.config.file import load_config
from rayskip.engine import Engine
from rayskip.errors import ConfigError
from rayskip.model.backends.torch import TorchBackend
from rayskip.model.checkpoint import load
from rayskip.model.decoder import Decoder
from rayskip.skip import SkipPolicy, skip_policy
from rayskip.train.examples import Example, collate
from rayskip.train.skip import answer_logits

ROOT = Path(__file__).parent.parent
LAYERS = 6
POLICIES: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "skipdecode": {"kind": "skipdecode", "max_layers": 5, "min_layers": 2, "horizon": 9},
    "skipdecode-speedup": {"kind": "skipdecode", "speedup": 2, "horizon": 6},
    "unified": {"kind": "unified", "speedup": 2},
    "hierarchical": {"kind": "hierarchical", "skip": 1},
    "layers": {"kind": "layers", "layers": [[0, 1, 2, 4, 5], [0, 2, 5], [2, 5]]},
}
SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, PreTrainedConfig] = {
    "opt": OPTConfig(**SIZES, ffn_dim=80, init_std=0.3, word_embed_proj_dim=96, dropout=0.0),
    "llama": LlamaConfig(**SIZES, intermediate_size=80, num_key_value_heads=2, initializer_range=0.3),
}
PROMPT_LENGTHS = (3, 17, 9, 40, 1, 5)
NEW_TOKENS = 11


def _config(values: dict[str, Any]) -> SkipConfig:
    config: SkipConfig = TypeAdapter(SkipConfig).validate_python(values)
    return config


def _policy(layers: int = LAYERS, **values: Any) -> SkipPolicy:
    return skip_policy(_config(values), layers)


@pytest.mark.parametrize(
    ("layers", "speedup", "bounds"),
    [
        (32, 2, (22, 11)),
        (32, 3, (14, 8)),
        (32, 4, (10, 6)),
        (32, 5, (8, 5)),
        (24, 2, (16, 8)),
        (24, 5, (6, 4)),
        (30, 2, (21, 10)),
        (30, 5, (8, 5)),
        (30, 1, (30, 30)),
    ],
)
def test_speedups_are_the_papers(layers: int, speedup: int, bounds: tuple[int, int]) -> None:
    policy = _policy(layers, kind="skipdecode", speedup=speedup, horizon=40)
    assert (policy.depth(0), policy.depth(40), policy.depth(10_000)) == (bounds[0], bounds[1], bounds[1])
    assert policy.layers(40) == (0, *range(layers - bounds[1] + 1, layers))


@given(data=st.data(), layers=st.integers(2, 40))
def test_skipdecode_is_nested_and_has_the_formulas_depths(data: st.DataObject, layers: int) -> None:
    warmup = data.draw(st.integers(1, layers))
    least = data.draw(st.integers(warmup, layers))
    most = data.draw(st.integers(least, layers))
    horizon = data.draw(st.integers(1, 60))
    policy = _policy(
        layers, kind="skipdecode", warmup=warmup, max_layers=most, min_layers=least, horizon=horizon
    )
    for position in range(horizon + 3):
        share = min(position / horizon, 1)
        assert policy.depth(position) == round((1 - share) * most + share * least)
        assert len(policy.layers(position)) == policy.depth(position)
        assert set(policy.layers(position + 1)) <= set(policy.layers(position))
        assert policy.layers(position)[:warmup] == tuple(range(warmup))
    assert policy.depth(-1) == layers
    assert policy.is_full == (least == layers)


def test_others_keep_what_their_papers_keep() -> None:
    assert _policy(8, kind="unified", speedup=2).layers(3) == (0, 2, 5, 7)
    assert _policy(8, kind="hierarchical", skip=2).layers(99) == (0, 3, 6)
    assert _policy(kind="none").is_full


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "layers", "layers": [[0, 2], [0, 3]]}, "position 1 runs layer 3"),
        ({"kind": "layers", "layers": [[0, 6]]}, "layers 0 to 5, got 6"),
        ({"kind": "skipdecode", "max_layers": 7, "min_layers": 2}, "max_layers <= 6"),
        ({"kind": "skipdecode", "max_layers": 3, "min_layers": 2, "warmup": 3}, "warmup <= min_layers"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        skip_policy(_config(values), LAYERS)


@pytest.fixture(scope="module", params=MODELS)
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(MODELS[request.param], dtype=torch.float32).save_pretrained(folder)
    return folder


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 190, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@cache
def _reference_tokens(folder: Path, policy: str, row: int) -> list[int]:
    """Greedy tokens of one prompt; every one from a forward over the whole text, without a cache."""
    schedule = skip_policy(_config(POLICIES[policy]), LAYERS)
    spec, weights = load(folder, torch.float32, torch.device("cpu"))
    prompt = _prompts()[row]
    tokens = list(prompt)
    for _ in range(NEW_TOKENS - row):
        logits = reference_logits(
            spec, weights, tokens, lambda layer, position: layer in schedule.layers(position - len(prompt))
        )
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("ops", ["native", "torch"])
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_equal_a_slow_reference(policy: str, ops: str, model_folder: Path) -> None:
    """Rows of unequal length share a batch with refill; the reference recomputes each from scratch."""
    config = _config(POLICIES[policy])
    schedule = skip_policy(config, LAYERS)
    spec, weights = load(model_folder, torch.float32, torch.device("cpu"))
    decoder = Decoder(
        spec,
        weights,
        TorchBackend(spec, weights.embed.dtype, weights.embed.device) if ops == "torch" else None,
    )
    if decoder.backend.name != ops:
        pytest.skip("no C compiler here")
    engine = Engine(decoder, engine=EngineConfig(max_batch_rows=3), decode=DecodeConfig(skip=config))
    prompts = _prompts()
    ours = engine.generate(
        prompts, [SamplingParams(max_tokens=NEW_TOKENS - i, ignore_eos=True) for i in range(len(prompts))]
    )
    for row, (generation,) in enumerate(ours):
        assert generation.token_ids == _reference_tokens(model_folder, policy, row)[: NEW_TOKENS - row]

    stats = engine.take_stats()
    lengths = [generation.completion_tokens for (generation,) in ours]
    ideal = sum(len(schedule.layers(position)) for length in lengths for position in range(length - 1))
    assert stats.decode_tokens == sum(lengths) - len(lengths)
    assert stats.decode_layer_tokens == ideal
    assert stats.prompt_layer_tokens == LAYERS * (sum(PROMPT_LENGTHS) - stats.prefix_tokens)


def test_a_layer_that_a_row_has_stopped_to_run_takes_no_pages(model_folder: Path) -> None:
    schedule = skip_policy(config := _config(POLICIES["skipdecode"]), LAYERS)
    spec, weights = load(model_folder, torch.float32, torch.device("cpu"))
    engine = Engine(decoder := Decoder(spec, weights), decode=DecodeConfig(skip=config))
    prompt, completion, page = 60, 90, decoder.backend.layout.page
    engine.generate([[5] * prompt], SamplingParams(max_tokens=completion, ignore_eos=True))
    spared = -(-(prompt + completion - 1) // page) * (LAYERS - schedule.depth(completion))
    stats = engine.take_stats()
    assert stats.kv_bytes_saved == spared * page * 2 * spec.kv_heads * spec.head_dim * 4 > 0
    assert stats.kv_fill is not None
    assert 0.5 < stats.kv_fill < 1


@pytest.mark.parametrize("policy", POLICIES)
def test_training_and_decoding_agree(policy: str, model_folder: Path) -> None:
    """Log-probabilities that the engine chose by, against the training forward over the same texts."""
    config = _config(POLICIES[policy])
    engine = Engine.load(
        ModelConfig(path=str(model_folder), dtype="float32"),
        EngineConfig(max_batch_rows=4),
        DecodeConfig(skip=config),
    )
    prompts = _prompts()
    ours = engine.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0))
    examples = [
        Example(prompt, list(row[0].token_ids or ()), "") for prompt, row in zip(prompts, ours, strict=True)
    ]
    batch = collate(examples, pad=0)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = answer_logits(model, batch, skip_policy(config, LAYERS))
    found = logits.log_softmax(-1).gather(2, batch.labels[..., None])[..., 0]
    decoded = torch.tensor([[entry.logprob for entry in row[0].logprobs or ()] for row in ours])
    torch.testing.assert_close(found, decoded, atol=2e-4, rtol=1e-4)


def test_tokens_under_a_policy_do_not_depend_on_the_batch(smollm2: Path) -> None:
    decode = DecodeConfig(skip=_config({"kind": "skipdecode", "speedup": 2, "horizon": 8}))
    prompts = [[3 + row, 40, 50 + row % 3] * (1 + row % 5) for row in range(12)]
    params = [SamplingParams(max_tokens=4 + row, ignore_eos=True) for row in range(12)]
    found = []
    for rows, tokens in ((1, 16), (5, 16), (12, 512)):
        sizes = EngineConfig(max_batch_rows=rows, max_batch_tokens=tokens)
        engine = Engine.load(ModelConfig(path=str(smollm2)), sizes, decode)
        if not engine.info["batch_invariant"]:
            pytest.skip("this machine's kernels are not batch-invariant; the report says so")
        found.append([row[0].token_ids for row in engine.generate(prompts, params)])
    assert found[0] == found[1] == found[2]


def test_a_row_can_run_at_full_depth_beside_others(model_folder: Path) -> None:
    """Quality audits decode the same row both ways in one batch."""
    from rayskip.data.records import Prompt

    decode = DecodeConfig(skip=_config(POLICIES["skipdecode"]))
    model = ModelConfig(path=str(model_folder), dtype="float32")
    engine = Engine.load(model, EngineConfig(max_batch_rows=4), decode)
    plain = Engine.load(model, EngineConfig(max_batch_rows=4))
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = _prompts()[:2]
    for index, prompt in enumerate(prompts):
        engine.add(Prompt(index, prompt, params, 0))
        engine.add(Prompt(index, prompt, params, 0), full_depth=True)
    by_request = {done.request_id: done.generations[0].token_ids for done in engine.run()}
    skipped, full = engine.generate(prompts, params), plain.generate(prompts, params)
    assert [by_request[0], by_request[2]] == [row[0].token_ids for row in skipped]
    assert [by_request[1], by_request[3]] == [row[0].token_ids for row in full]


def test_a_cohort_joins_together(model_folder: Path) -> None:
    """Static batches are the extreme: the tokens are the same, and every step runs one layer set."""
    decode = DecodeConfig(skip=_config(POLICIES["skipdecode"]))
    params = [SamplingParams(max_tokens=3 + row, ignore_eos=True) for row in range(6)]
    found = []
    for cohort in (0.0, 1.0):
        sizes = EngineConfig(max_batch_rows=3, cohort=cohort)
        engine = Engine.load(ModelConfig(path=str(model_folder), dtype="float32"), sizes, decode)
        found.append([row[0].token_ids for row in engine.generate(_prompts(), params)])
        stats = engine.take_stats()
        assert (stats.cohort_fill == 1) == (cohort == 1)
    assert found[0] == found[1]


def test_running_under_another_policy_than_the_trained_one_warns(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    label = model_folder / "rayskip.json"
    config = _config(POLICIES["skipdecode"])
    label.write_text(json.dumps({"skip": skip_policy(config, LAYERS).name}))
    try:
        Engine.load(ModelConfig(path=str(model_folder)), decode=DecodeConfig(skip=config))
        assert "trained" not in caplog.text
        engine = Engine.load(ModelConfig(path=str(model_folder)))
        assert "trained under the skip policy skipdecode" in caplog.text
        assert "trained under the skip policy skipdecode" in engine.info["warnings"][-1]
    finally:
        label.unlink()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{kind: skipdecode}", "give either speedup"),
        ("{kind: skipdecode, speedup: 2, horizn: 9}", 'did you mean "horizon"'),
        ("{kind: skipdecod}", "skipdecode"),
        ("{kind: skipdecode, speedup: 9}", "decode.skip.speedup"),
    ],
)
def test_a_wrong_policy_is_explained(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_config(ROOT / "configs/quickstart.yaml", [f"decode.skip={text}"])
    assert "\n" not in str(error.value)
