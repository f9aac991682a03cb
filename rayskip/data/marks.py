"""Which special tokens in a rendered text the template wrote itself, and not the data in it.

Text alone: knows no tokenizer and renders nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import jinja2

from rayskip.errors import ModelError

FIRST, LAST = 0xDC00, 0xDFFF
"""Marks are lone surrogates, which no text has that UTF-8 can hold: in a rendered text they are the template's."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "observation", "model", "human")
"""Words that chat templates put between pieces of a special token, as in <|{{ message.role }}|>."""

_LEXER = jinja2.Environment(keep_trailing_newline=True)
_JOINS = ("+", "~")


class Marks:
    """`mark` puts a mark in place of each special token in a template's own text, before it is rendered.

    Then every mark in what it renders is a special token, and all else is text, however it may look: data never
    becomes a special token, not even with pieces of the template's own text around it. What a template puts
    together itself, from a word of ROLES between two pieces, is one; so such pieces have marks too.
    """

    def __init__(self, special: Iterable[str]) -> None:
        """special: the special tokens, as text."""
        self._special = set(special)
        self._any_special = _any_of(self._special)
        self._marks: dict[str, str] = {}  # a text of a template's -> its mark
        self._texts: dict[str, str] = {}  # the reverse
        self._halves = {
            (token[: token.index(role)], role, token[token.index(role) + len(role) :]): token
            for token in self._special
            for role in ROLES
            if role in token
        }
        self._openings = _any_of({before for before, _, _ in self._halves if before}, at_end=True)
        self._closings = _any_of({after for _, _, after in self._halves if after})
        self._assembled = re.compile(f"({_MARK})({'|'.join(ROLES)})({_MARK})")

    def mark(self, template: str) -> str:
        """The source of a Jinja template with marks in its texts and strings; its syntax stays as it is.

        Raises jinja2.TemplateSyntaxError.
        """
        tokens = [(kind, value) for _, kind, value in _LEXER.lex(template)]
        words = [place for place, (kind, _) in enumerate(tokens) if kind != "whitespace"]
        around = dict(zip(words, zip([-1, *words], [*words[1:], -1], strict=False), strict=True))
        marked = []
        for place, (kind, value) in enumerate(tokens):
            if kind == "data":
                value = self._halved(self.tokens(value), True, True)
            elif kind == "string":
                before, after = (tokens[near] if near >= 0 else ("", "") for near in around[place])
                opens = after[1] in _JOINS or after[0] == "variable_end"
                closes = before[1] in _JOINS or before[0] == "variable_begin"
                value = value[0] + self._halved(self.tokens(value[1:-1]), opens, closes) + value[-1]
            marked.append(value)
        return "".join(marked)

    def tokens(self, text: str) -> str:
        """A text of the template's with marks in place of special tokens."""
        return self._any_special.sub(lambda found: self._mark(found[0]), text)

    def runs(self, rendered: str) -> list[tuple[str, bool]]:
        """A rendered text, cut where it must be encoded in pieces: (piece, whether special tokens in it are such).

        One piece, unless the data has what looks like a special token.
        """
        rendered = self._assembled.sub(self._whole, rendered)
        text = _MARKS.sub(lambda found: self._pieces_only(found[0]), rendered)
        runs: list[tuple[str, bool]] = []
        end = 0
        for found in self._any_special.finditer(text):
            runs += [*self._written(text[end : found.start()]), (found[0], False)]
            end = found.end()
        return [*runs, *self._written(text[end:])]

    def begins_with(self, rendered: str, token: str) -> bool:
        """Whether a rendered text begins with a special token of the template's."""
        return token in self._marks and rendered.startswith(self._marks[token])

    def _halved(self, text: str, opens: bool, closes: bool) -> str:
        """opens: the text's end may begin a special token; closes: its beginning may end one."""
        if closes and (found := self._closings.match(text)):
            text = self._mark(found[0]) + text[found.end() :]
        if opens and (found := self._openings.search(text)):
            text = text[: found.start()] + self._mark(found[0])
        return text

    def _mark(self, text: str) -> str:
        if text not in self._marks:
            if (code := FIRST + len(self._marks)) > LAST:
                raise ModelError(f"templates write more than {LAST - FIRST + 1:,} different special tokens")
            self._marks[text] = chr(code)
            self._texts[chr(code)] = text
        return self._marks[text]

    def _whole(self, found: re.Match[str]) -> str:
        """The mark of the special token that two pieces and the role between them are."""
        before, role, after = (self._texts.get(part, part) for part in found.groups())
        token = self._halves.get((before, role, after))
        return found[0] if token is None else self._mark(token)

    def _pieces_only(self, mark: str) -> str:
        """The mark of a special token; for a piece that became none, its text; U+FFFD for what is no mark."""
        text = self._texts.get(mark, "\ufffd")
        return mark if text in self._special else text

    def _written(self, text: str) -> list[tuple[str, bool]]:
        """A text whose special tokens are all marks. Where one makes another with the text beside it, as <s>
        followed by > may, they stand alone."""
        whole, spans, end = "", [], 0
        for found in _MARKS.finditer(text):
            whole += text[end : found.start()]
            spans.append((len(whole), len(whole) + len(self._texts[found[0]])))
            whole, end = whole + self._texts[found[0]], found.end()
        whole += text[end:]
        if [found.span() for found in self._any_special.finditer(whole)] == spans:
            return [(whole, True)] if whole else []
        parts = re.split(f"({_MARK})", text)
        return [(self._texts.get(part, part), place % 2 == 1) for place, part in enumerate(parts) if part]


_MARK = "[\ud800-\udfff]"
_MARKS = re.compile(_MARK)


def _any_of(texts: set[str], at_end: bool = False) -> re.Pattern[str]:
    """Finds any of the texts, the longest first, so that none hides behind one that starts like it."""
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    pattern = "|".join(map(re.escape, ordered)) or r"(?!)"
    return re.compile(rf"(?:{pattern})\Z" if at_end else pattern)
