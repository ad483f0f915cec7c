"""Text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], indent: int = 0) -> str:
    """Rows of cells as text, each column as wide as its widest cell.

    Args:
        rows: all of the same length, at least one.
        indent: spaces before each row.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(" " * indent + line for line in lines)


def printable(name: str) -> str:
    """A file's name as one line that any terminal and any UTF-8 file takes: what cannot be printed, escaped."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)
