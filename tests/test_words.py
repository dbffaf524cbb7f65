"""One word for one thing: names and texts of the three packages use the field's own words."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [
    file
    for folder in ("kdcache", "stores/kdcache_stores", "cli/kdcache_cli")
    for file in sorted((ROOT / folder).rglob("*.py"))
]

#: Names of variables, arguments, functions, classes and modules, by the whole name or a part of it.
LOCALS = {"found", "one", "there", "said", "hot"}
PARTS = {"lesson", "teach", "taught", "answers", "softened", "heard", "loud",
         "sureness", "judged", "judge", "telling", "strangers", "says"}  # fmt: skip

#: In docstrings, comments and messages.
TEXT = re.compile(
    r"\b(lessons?|what (the )?teachers? sa(y|ys|id)|teachers? sa(y|id)|the teacher's answers?|softened"
    r"|says nothing|sureness|strangers)\b",
    re.IGNORECASE,
)


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Comments and strings, by their first line."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, tokenize.FSTRING_MIDDLE
                          if hasattr(tokenize, "FSTRING_MIDDLE") else tokenize.STRING):  # fmt: skip
            yield token.start[0], token.string


def test_names_are_the_field_s_words() -> None:
    bad = [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file in SOURCES
        for line, name in names(ast.parse(file.read_text(encoding="utf-8")))
        if name in LOCALS or PARTS & set(name.strip("_").lower().split("_"))
    ]
    assert not bad, "\n".join(bad)


def test_texts_use_the_field_s_words() -> None:
    bad = [
        f"{file.relative_to(ROOT)}:{line} {match[0]}"
        for file in SOURCES
        for line, text in texts(file.read_text(encoding="utf-8"))
        if (match := TEXT.search(text))
    ]
    assert not bad, "\n".join(bad)
