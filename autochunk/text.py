"""Text from elsewhere, made safe to print.

A name in a file may have been made to say something else to a terminal than to a reader.
"""

from __future__ import annotations


def one_line(text: str) -> str:
    """The text with line ends, escape sequences and whatever else does not print escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def printable(text: str) -> str:
    """The same, with its line ends."""
    return "\n".join(map(one_line, text.split("\n")))
