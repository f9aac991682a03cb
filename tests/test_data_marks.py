"""Special tokens come from templates alone, and templates stay within their limits."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerBase

from rayskip.config import InputConfig, SamplingParams
from rayskip.config.file import load_config
from rayskip.data.prompts import PromptBuilder
from rayskip.data.templates import Templates
from rayskip.data.tokenizer import Encoder, Tokenizer, load_pretrained, load_tokenizer
from rayskip.errors import InputError, RowError
from rayskip.model.checkpoint import resolve

ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "[|user|]", "[|assistant|]")
CHATS = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "trims": "{{- bos_token }}\n{%- for m in messages %}\n    {%- if m.content is string %}\n"
    "        {{- '<|im_start|>' ~ m.role ~ '\\n\\n' ~ m.content | trim ~ eos_token }}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n\\n' }}\n{%- endif %}\n\n",
    "thinks": "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{% if not c.startswith('<tool>') %}<|im_start|>"
    "{{ m.role }}\n{{ c }}<|im_end|>{% endif %}{% endfor %}",
    "roles": "{% for m in messages %}{{ '<|' + m['role'] + '|>' + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "roles in text": "{% for m in messages %}[|{{ m.role }}|]{{ m.content }}{% endfor %}[|assistant|]",
}


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's, with special tokens of roles, and two that overlap."""
    made = load_pretrained(resolve("smollm2-135m-instruct"))
    extra = [AddedToken(text, special=True) for text in (*ROLE_TOKENS, ">>TITLE<<")]
    made.add_special_tokens({"extra_special_tokens": extra})  # type: ignore[dict-item]
    return made


@cache
def special() -> dict[str, int]:
    return {token.content: id for id, token in tokenizer().added_tokens_decoder.items() if token.special}


templates = cache(Templates)


@cache
def chats(name: str) -> Encoder:
    made = tokenizer()
    made.chat_template = CHATS[name]
    return Encoder(Tokenizer.of(made), templates=templates())


def specials_in(ids: list[int]) -> list[int]:
    found = set(special().values())
    return [id for id in ids if id in found]


def written(literal: str) -> list[int]:
    """Reference: the special tokens of one literal, from the left, the longest first."""
    found = []
    while literal:
        here = max((text for text in special() if literal.startswith(text)), key=len, default="")
        found += [special()[here]] if here else []
        literal = literal[max(1, len(here)) :]
    return found


@st.composite
def split_tokens(draw: st.DrawFn) -> list[tuple[bool, str]]:
    """Texts full of special tokens, cut anywhere, each part a template's literal (True) or a value (False)."""
    word = st.sampled_from([*sorted(special()), "<", "|", ">", "a ", "\n", "user"])
    text = "".join(draw(st.lists(word, min_size=1, max_size=4)))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=4)) | {0, len(text)})
    parts = [text[start:stop] for start, stop in pairwise(cuts)]
    return [(draw(st.booleans()), part) for part in parts]


@settings(max_examples=60, deadline=None)
@given(parts=split_tokens(), as_expression=st.booleans())
@example(parts=[(True, "<"), (False, "|im_start|"), (True, ">")], as_expression=False)
@example(parts=[(False, "<|im_"), (False, "end|>")], as_expression=False)
@example(parts=[(False, ">>TITLE<"), (True, "<|im_end|>")], as_expression=True)
@example(parts=[(True, "<|"), (False, "im_end"), (True, "|>")], as_expression=True)
@example(parts=[(False, "\ufdd0\ue0000\ue001"), (True, "<|im_end|>")], as_expression=False)
def test_only_what_a_template_writes_whole_is_a_special_token(
    parts: list[tuple[bool, str]], as_expression: bool
) -> None:
    encoder = chats("chatml")
    row = {f"v{place}": text for place, (literal, text) in enumerate(parts) if not literal}
    names = [json.dumps(text) if literal else f"v{place}" for place, (literal, text) in enumerate(parts)]
    source = (
        "{{ " + " + ".join(names) + " }}"
        if as_expression
        else "".join(
            text if literal else f"{{{{ v{place} }}}}" for place, (literal, text) in enumerate(parts)
        )
    )
    rendered = "".join(text for _, text in parts)
    if not as_expression and parts[-1][0]:  # Jinja drops one
        rendered = rendered.removesuffix("\n")
    literals = _joined(parts, as_expression)
    ids = encoder.written(encoder.render(encoder.mark(source), row)) if rendered else []
    roles = [token for token in ROLE_TOKENS if token in rendered]
    if not roles:  # those, a template may put together
        assert specials_in(ids) == [id for literal in literals for id in written(literal)]
    assert tokenizer().decode(ids, clean_up_tokenization_spaces=False) == rendered


def _joined(parts: list[tuple[bool, str]], as_expression: bool) -> list[str]:
    """The literals of a template; in running text, neighbours are one."""
    joined: list[str] = []
    before = False
    for literal, text in parts:
        if literal and before and not as_expression:
            joined[-1] += text
        elif literal:
            joined.append(text)
        before = literal
    return joined


CONTENT = st.lists(
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "<|user|>", "[|user|]", "<|", "|>", "im_end", "[|", "|]", "user"]
    )
    | st.text("aZ 0.,;:<>|[]{}%'\"\n\té🐢", max_size=5),
    max_size=5,
).map("".join)


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(CONTENT, min_size=1, max_size=3))
def test_no_message_adds_a_special_token(name: str, texts: list[str]) -> None:
    def conversation(texts: list[str]) -> list[dict[str, Any]]:
        roles = ["user", "assistant"] * len(texts)
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]

    ids = chats(name).chat(conversation(texts), continue_final=False)
    harmless = conversation(["x"] * len(texts))
    assert specials_in(ids) == specials_in(chats(name).chat(harmless, continue_final=False))
    rendered = tokenizer().apply_chat_template(
        conversation(texts), chat_template=CHATS[name], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer().decode(ids, clean_up_tokenization_spaces=False) == rendered


@pytest.mark.parametrize("name", CHATS)
def test_ordinary_conversations_are_encoded_as_the_tokenizer_itself_does(name: str) -> None:
    texts = ["  What is\n\n2 < 3? ", "<think>\nEasy\n</think>\n\nYes.", "Żółw 🐢 | a > b\t"]
    messages = [
        {"role": role, "content": text}
        for role, text in zip(["system", "user", "assistant"], texts, strict=True)
    ]
    for conversation in ([messages[1]], messages, messages[1:]):
        expected = tokenizer().apply_chat_template(
            conversation, chat_template=CHATS[name], add_generation_prompt=True, return_dict=False
        )
        assert chats(name).chat(conversation, continue_final=False) == expected
        assert specials_in(expected)


def test_the_quickstart_is_encoded_as_the_tokenizer_itself_does(smollm2: Path) -> None:
    own = load_pretrained(smollm2)
    root = Path(__file__).parent.parent / "configs"
    config = load_config(root / "quickstart.yaml")
    assert config.input.template is not None
    assert config.input.chat
    made = PromptBuilder(config.input, config.sampling, load_tokenizer(smollm2), 2048, templates())
    lines = (root / "data/quickstart.jsonl").read_text().splitlines()
    for index, line in enumerate(lines[::9]):
        row = json.loads(line)
        text = config.input.template
        for column, value in row.items():
            text = text.replace(f"{{{{ {column} }}}}", str(value))
        messages = [{"role": "user", "content": text.removesuffix("\n")}]
        if config.input.system:
            messages.insert(0, {"role": "system", "content": config.input.system})
        expected = own.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert made.build(row, index, "f").token_ids == expected


def test_a_start_token_that_a_template_writes_is_not_put_there_again() -> None:
    class Starting(Encoder):
        """As of a tokenizer that begins with its start token."""

        def _encode(self, text: str, plain: bool, start: bool) -> list[int]:
            return [special()["<|im_start|>"]] * start + super()._encode(text, plain, False)

    encoder = Starting(Tokenizer.of(tokenizer()), templates=templates())
    once = encoder.written(encoder.render(encoder.mark("<|im_start|>{{ q }}"), {"q": "a"}))
    assert once == encoder.written("a")
    assert len(encoder.written(encoder.render("{{ q }}", {"q": "<|im_start|>a"}))) > len(once)


def builder(template: str, **limits: Any) -> PromptBuilder:
    config = InputConfig(path="in", template=template)
    return PromptBuilder(config, SamplingParams(), Tokenizer.of(tokenizer()), 100, Templates(**limits))


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{{ 10 ** (10 ** n) }}", "processor time"),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% if n > 9 %}{% endif %}{% endfor %}{% endfor %}",
            "time",
        ),
        ("{{ 'a' * 10 ** n }}", "memory"),
        ("{{ '%*d' | format(10 ** n, 1) }}", "memory"),
    ],
)
def test_what_a_template_may_cost_is_bounded(template: str, names: str) -> None:
    made = builder("{% if n %}" + template + "{% endif %}x", cpu_s=0.5, memory=1 << 27)
    with pytest.raises(RowError, match=rf"input\.template: takes more than .* {names}") as caught:
        made.build({"n": 9}, 0, "f")
    assert caught.value.kind == "template_error"
    assert made.build({"n": 0}, 1, "f").token_ids == tokenizer().encode("x")


def test_a_template_that_costs_too_much_whatever_the_row_is_refused() -> None:
    with pytest.raises(InputError, match="processor time"):
        builder("{{ 10 ** (10 ** 9) }}", cpu_s=0.5)


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    made = builder("{{ q * 1000 }}")
    with pytest.raises(RowError, match="2,000,000 characters") as caught:
        made.build({"q": "ab" * 1000}, 0, "f")
    assert caught.value.kind == "prompt_too_long"
    with pytest.raises(RowError, match="2,000,000 characters"):
        Encoder(Tokenizer.of(tokenizer()), 100).data("ab" * 1000_000)


def test_a_process_that_was_ended_is_started_anew() -> None:
    made = Templates()
    assert made.plain("{{ q }}", {"q": "a"}, 9) == "a"
    assert made._process is not None
    made._process.kill()
    assert made.plain("{{ q }}", {"q": "b"}, 9) == "b"


def test_an_answer_that_nobody_waited_for_is_no_later_ones() -> None:
    """As when Ctrl-C comes while a template is rendered."""

    class Interrupting(Templates):
        def _running(self) -> Any:
            process = super()._running()
            if interrupt:
                interrupt.clear()
                process.stdout = Interrupted(process.stdout)
            return process

    class Interrupted:
        def __init__(self, pipe: Any) -> None:
            self.close = pipe.close

        def readline(self) -> bytes:
            raise KeyboardInterrupt

    interrupt: list[int] = []
    made = Interrupting()
    assert made.plain("{{ q }}", {"q": "a"}, 9) == "a"
    interrupt.append(1)
    with pytest.raises(KeyboardInterrupt):
        made.plain("{{ q }}", {"q": "b"}, 9)
    assert made.plain("{{ q }}", {"q": "c"}, 9) == "c"
