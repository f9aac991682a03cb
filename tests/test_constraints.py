"""Constrained generation: nothing leaves its grammar, and no drafter, batch or policy changes a token.

The reference is plain: logits of transformers over the whole text at every token, and a grammar that is replayed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

from rayskip import Engine
from rayskip.config import JobConfig, SamplingParams
from rayskip.config.constraint import Constraint
from rayskip.config.file import load_config
from rayskip.data.formats import openai
from rayskip.data.json_columns import columns_of, values_of
from rayskip.data.tokenizer import load_tokenizer
from rayskip.decode.constraints import Grammars, check_constraint
from rayskip.decode.draft import NEWEST, Draft
from rayskip.errors import ConfigError, RowError

TICKET = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["bug", "question", "praise"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
        "score": {"type": "number", "minimum": 0, "maximum": 10},
        "where": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "zip": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    "required": ["kind", "tags", "score"],
    "additionalProperties": False,
}
END = 2
"""The embedded model's end token."""


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path], smollm2: Path) -> Path:
    """A small random model with the embedded model's tokenizer."""
    made = tiny_llama("constrained", 3, vocab_size=49152, eos_token_id=END, initializer_range=0.3)
    for file in smollm2.glob("*token*"):
        shutil.copy(file, made)
    return made


@pytest.fixture(scope="module")
def grammars(smollm2: Path) -> Grammars:
    return Grammars(load_tokenizer(smollm2), 49152, (END,))


def _schemas() -> st.SearchStrategy[dict[str, Any]]:
    texts = st.text(st.characters(max_codepoint=0x7FF), max_size=4)  # which the tokenizer can spell
    leaves = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "maxLength": 5}]),
        st.integers(-20, 20).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 7}),
        st.lists(texts, min_size=1, max_size=4, unique=True).map(lambda some: {"enum": some}),
        st.just({"type": "number", "minimum": 0, "maximum": 1}),
    )

    def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        properties = st.dictionaries(
            st.text('abcé"\\', min_size=1, max_size=3), inner, min_size=1, max_size=3
        )
        objects = properties.flatmap(
            lambda own: st.sets(st.sampled_from(sorted(own))).map(
                lambda required: {
                    "type": "object",
                    "properties": own,
                    "required": sorted(required),
                    "additionalProperties": False,
                }
            )
        )
        arrays = inner.map(lambda own: {"type": "array", "items": own, "minItems": 1, "maxItems": 2})
        return objects | arrays | st.lists(inner, min_size=1, max_size=2).map(lambda own: {"anyOf": own})

    return st.recursive(leaves, nested, max_leaves=5)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(_schemas(), st.integers(0, 2**32 - 1))
def test_random_logits_never_leave_the_grammar_and_going_back_is_replay(
    grammars: Grammars, schema: dict[str, Any], seed: int
) -> None:
    """Along random drafts, good and bad ones, masks are those of a matcher that has only seen what came."""
    random = np.random.default_rng(seed)
    constraint = Constraint(json_schema=schema)
    matcher, tokens = grammars.matcher(constraint), list[int]()
    while len(tokens) < 300:
        draft = Draft()
        matcher.follow(tokens, draft, depth=6, tokens=6)
        fresh = grammars.matcher(constraint)
        fresh.follow(tokens, Draft(), 0, 0)
        forced = list(draft.tokens)
        node = NEWEST
        for _ in range(random.integers(4)):  # a chain that may leave the grammar, and a branch beside it
            node = draft.add(node, int(_some(random, matcher.masks.get(node))), "test")
        draft.add(NEWEST, int(random.integers(49152)), "test")
        matcher.prune(draft)
        assert draft.tokens[: len(forced)] == forced
        for at in [NEWEST, *range(len(draft))]:
            path = [draft.tokens[on] for on in draft.path(at)]
            if at not in matcher.masks or END in path:
                continue
            replayed = grammars.matcher(constraint)
            replayed.follow([*tokens, *path], Draft(), 0, 0)
            own, other = matcher.masks[at], replayed.masks[NEWEST]
            assert own is not None
            assert other is not None
            assert (own.bits == other.bits).all()
        token = _some(random, matcher.masks[NEWEST])
        if token == END:
            break
        tokens.append(int(token))
    assert matcher.error is None
    tokenizer = grammars._tokenizer
    jsonschema.validate(json.loads(tokenizer.decode_str(tokens)), schema)


def _some(random: np.random.Generator, mask: Any) -> int:
    """A token that the mask allows, the end and short ones more often, so that texts come to an end."""
    if mask is None:
        return END
    (allowed,) = np.unpackbits(mask.bits, bitorder="little").nonzero()
    return (
        END
        if END in allowed and random.random() < 0.5
        else int(random.choice(allowed[: random.integers(1, 60)]))
    )


def _params(row: int) -> dict[str, Any]:
    constraints = (
        {"json_schema": TICKET},
        {"choice": ["yes", "yes, but", "no", "ça dépend"]},
        {"regex": r"[A-Z]{2}-\d{3,5}( \(new\))?"},
        None,
        {"grammar": 'start: item ("; " item)*\nitem: "red" | "green" | /[0-9]{1,2}/'},
    )
    sampling = ({}, {"temperature": 0.9}, {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2})
    own = {"max_tokens": 50, "seed": row, "logprobs": 1 if row % 4 == 0 else None} | sampling[row % 3]
    return own | {"n": 2 if row == 7 else 1, "constraint": constraints[row % 5]}


def _prompt(row: int) -> list[int]:
    return [5 + row % 7, *range(40, 46 + row % 3), 9]


def _generate(folder: Path, rows: list[int], **sections: Any) -> list[list[Any]]:
    engine = Engine.load(
        {"path": str(folder), "dtype": "float32"}, sections.get("engine"), sections.get("decode")
    )
    # a row's place is part of its random key, so rows left out are given as prompts that cannot run
    wanted = [_prompt(row) if row in rows else [] for row in range(max(rows) + 1)]
    found = engine.generate(wanted, [_params(row) for row in range(max(rows) + 1)])
    return [found[row] for row in rows]


def _facts(rows: list[list[Any]]) -> list[Any]:
    return [
        (sample.token_ids, sample.text, sample.finish_reason, sample.error_message)
        for row in rows
        for sample in row
    ]


def test_constrained_rows_are_the_same_with_any_drafter_and_in_any_batch(folder: Path) -> None:
    rows = list(range(12))
    alone = _generate(folder, rows, engine={"max_batch_rows": 1})
    for row, samples in enumerate(alone):
        _check(row, samples)
    for draft in ({"kind": "auto"}, {"kind": "lookahead"}):
        assert _facts(
            _generate(folder, rows, engine={"max_batch_rows": 8}, decode={"draft": draft})
        ) == _facts(alone)
    few_pages = {"max_batch_rows": 12, "kv_cache_gb": 0.001, "max_batch_tokens": 32}
    assert _facts(_generate(folder, rows, engine=few_pages)) == _facts(alone)


def test_layers_that_are_skipped_keep_to_the_grammar(folder: Path) -> None:
    skip = {"kind": "layers", "layers": [[0, 1, 2, 3], [0, 1, 3], [0, 3]]}
    rows = list(range(10))
    plain = _generate(folder, rows, decode={"skip": skip})
    for row, samples in enumerate(plain):
        _check(row, samples)
    drafted = _generate(folder, rows, decode={"skip": skip, "draft": {"kind": "lookup"}})
    assert _facts(drafted) == _facts(plain)


def _check(row: int, samples: list[Any]) -> None:
    for sample in samples:
        assert sample.finish_reason in ("stop", "length"), sample
        if sample.finish_reason == "length":
            continue
        match row % 5:
            case 0:
                jsonschema.validate(json.loads(sample.text), TICKET)
            case 1:
                assert sample.text in ("yes", "yes, but", "no", "ça dépend")
            case 2:
                assert len(sample.text) >= 6
                assert sample.text[2] == "-"


def test_greedy_tokens_are_those_of_a_plain_loop(folder: Path, grammars: Grammars) -> None:
    """transformers computes the logits anew at every token; the mask comes from a replay."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine.load({"path": str(folder), "dtype": "float32"})
    for row in (0, 6, 12):
        constraint = _params(row)["constraint"]
        tokens = list[int]()
        while len(tokens) < 40 and tokens[-1:] != [END]:
            matcher = grammars.matcher(Constraint.model_validate(constraint))
            matcher.follow(tokens, Draft(), 0, 0)
            mask = matcher.masks[NEWEST]
            assert mask is not None
            with torch.inference_mode():
                logits = model(torch.tensor([_prompt(row) + tokens])).logits[0, -1]
            forbidden = np.unpackbits(mask.bits, count=49152, bitorder="little") == 0
            tokens.append(int(logits.masked_fill(torch.from_numpy(forbidden), -torch.inf).argmax()))
        (sample,) = engine.generate([_prompt(row)], {"max_tokens": 40, "constraint": constraint})[0]
        assert sample.token_ids == tokens
        assert engine.take_stats().accepted_by["grammar"] > 0


class Ticket(BaseModel):
    kind: str
    score: int


def test_a_schema_may_be_a_file_or_a_pydantic_model_of_the_jobs_own_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text(json.dumps(TICKET))
    (tmp_path / "shapes_of_mine.py").write_text(
        "from pydantic import BaseModel\nclass Ticket(BaseModel):\n    kind: str\n    score: int\n"
    )

    def schema(named: Any) -> Any:
        constraint = load_config(_job({"json_schema": named})).sampling.constraint
        assert constraint is not None
        return constraint.json_schema

    assert schema("schema.json") == TICKET
    assert schema("shapes_of_mine:Ticket") == Ticket.model_json_schema() == schema(Ticket)
    assert schema(json.dumps(TICKET)) == TICKET
    for named in ("nothing.json", "shapes_of_mine:Nothing", "no_such_module:Ticket", "json:JSONDecoder"):
        with pytest.raises(ConfigError, match=named):
            schema(named)
    with pytest.raises(ValueError, match="is no JSON"):  # a row's data names no file
        SamplingParams.model_validate({"constraint": {"json_schema": "schema.json"}})


def _job(constraint: Any) -> JobConfig | dict[str, Any]:
    return {
        "name": "labels",
        "model": {"path": "m"},
        "input": {"path": "i"},
        "output": {"path": "o"},
        "sampling": {"constraint": constraint},
    }


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ({}, "give one of choice, regex, json_schema, grammar; got none"),
        ({"choice": ["a"], "regex": "b"}, "got choice and regex"),
        ({"choice": [True, False]}, "has true, which is no text; in YAML put yes, no, on, off in quotes"),
        ({"choice": ["a", "a"]}, "names a text twice"),
        ({"choice": []}, "a list that is not empty"),
    ],
)
def test_a_constraint_with_a_fault_is_refused(constraint: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(_job(constraint))


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ({"regex": "(a"}, "sampling.constraint.regex cannot be compiled.*unclosed group"),
        ({"json_schema": {"type": "objekt"}}, "json_schema cannot be compiled: Invalid type: objekt"),
        (
            {"json_schema": {"type": "array", "unevaluatedItems": 3}},
            'Unimplemented keys: ."unevaluatedItems"',
        ),
        ({"grammar": "start: nothing"}, "grammar cannot be compiled"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_loads(constraint: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_constraint(Constraint.model_validate(constraint))


def test_a_row_whose_constraint_cannot_be_compiled_is_an_error_row(folder: Path) -> None:
    engine = Engine.load(str(folder))
    bad, good = engine.generate(
        [[5, 6], [5, 6]], [{"constraint": {"regex": "["}}, {"constraint": {"choice": [1]}}]
    )
    assert bad[0].error_type == "invalid_constraint"
    assert good[0].text == "1"
    with pytest.raises(RowError, match="constraints need a tokenizer"):
        Grammars(None, 10, (1,)).matcher(Constraint(regex="a"))


def test_a_schema_gives_typed_columns() -> None:
    schema = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"$ref": "#/$defs/node"}, "id": {"type": "integer"}},
            }
        },
        "type": "object",
        "properties": TICKET["properties"]
        | {
            "note": {"type": ["string", "null"]},
            "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "level": {"enum": [1, 2, None]},
            "tree": {"$ref": "#/$defs/node"},
        },
    }
    columns = columns_of(schema)
    node = pa.struct([("next", pa.string()), ("id", pa.int64())])
    assert columns == {
        "kind": pa.string(),
        "tags": pa.list_(pa.string()),
        "score": pa.float64(),
        "where": pa.struct([("city", pa.string()), ("zip", pa.int64())]),
        "note": pa.string(),
        "either": pa.string(),
        "maybe": pa.int64(),
        "level": pa.int64(),
        "tree": node,
    }
    said = {
        "kind": "bug",
        "tags": ["a"],
        "score": 3,
        "where": {"city": "x", "zip": 10**30},
        "either": 7,
        "level": None,
        "tree": {"id": 1, "next": {"id": 2}},
    }
    rows = [values_of(text, columns) for text in (json.dumps(said), '{"kind": "bu', "[1]", None)]
    table = pa.Table.from_pylist(rows, pa.schema(list(columns.items())))
    first, *others = table.to_pylist()
    assert first == said | {
        "where": {"city": "x", "zip": None},  # too large for the column; the text has it
        "either": "7",
        "tree": {"id": 1, "next": '{"id": 2}'},
        "note": None,
        "maybe": None,
    }
    assert all(value is None for row in others for value in row.values())


def test_openai_lines_may_ask_for_json(tmp_path: Path) -> None:
    asked = [
        {"type": "json_schema", "json_schema": {"name": "ticket", "strict": True, "schema": TICKET}},
        {"type": "json_object"},
        {"type": "text"},
        {"type": "xml"},
    ]
    lines = [
        {
            "custom_id": str(row),
            "method": "POST",
            "url": openai.CHAT,
            "body": {"messages": [{"role": "user", "content": "Hi"}], "response_format": form},
        }
        for row, form in enumerate(asked)
    ]
    found = [openai._params(line["body"]).get("constraint") for line in lines[:3]]  # type: ignore[arg-type]
    assert found == [{"json_schema": TICKET}, {"json_schema": {"type": "object"}}, None]
    assert "text, json_object or json_schema" in str(openai._fault(openai.CHAT, lines[3]["body"]))
