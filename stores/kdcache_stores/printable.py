"""Text from a store, a path or a data set as it may be shown to people, wherever that is."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with every character that does not print as its code, such as `\\n` and `\\x1b`.

    A name may hold the end of a line, the start of a terminal's commands, or marks that reorder or
    hide text. Shown so, it stays on its line and looks like what it is.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
