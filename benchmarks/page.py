"""Figures in pages: written by the command that measured them, between two marks."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent


def marks(name: str, command: str) -> tuple[str, str]:
    """Where a section begins and ends."""
    return f"<!-- {name}:begin (written by {command}) -->", f"<!-- {name}:end -->"


def write_section(page: Path, name: str, command: str, *parts: str) -> None:
    """Put paragraphs between the marks of a section, in place of what is there."""
    begin, end = marks(name, command)
    text = page.read_text()
    before, after = text[: text.index(begin)], text[text.index(end) + len(end) :]
    page.write_text(before + "\n\n".join([begin, *parts, end]) + after)
