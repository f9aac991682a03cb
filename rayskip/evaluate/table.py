"""Cells of the tables for a terminal."""

from __future__ import annotations


def or_dash(value: float | None, form: str) -> str:
    """A number in a format, or a dash where there is none."""
    return "-" if value is None else format(value, form)
