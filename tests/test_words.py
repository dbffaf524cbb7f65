"""One word for one thing: names and texts of the project use the field's own words."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("kdcache", "stores/kdcache_stores", "cli/kdcache_cli")
SOURCES = [
    file
    for folder in (*PACKAGES, "evidence", "examples", "docs")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "stores/FORMAT.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

#: Names of variables, arguments, attributes, functions, classes and modules: by the whole name.
WHOLE = {"found", "one", "there", "said", "hot", "sure", "loud", "once"}
#: The same, by a part of the name.
PARTS = {"lesson", "teach", "taught", "answer", "answers", "softened", "heard",
         "sureness", "surest", "judged", "judge", "judgement", "telling", "strangers", "says",
         "speak", "speaks", "wrongly"}  # fmt: skip

#: In docstrings, comments, messages and pages. A file or a manifest may say something; a network predicts.
TEXT = re.compile(
    r"\b(lessons?|sureness|surest|(least|most|how) sure|sure of|softened|strangers|heard"
    r"|judg(e[sd]?|ing|ement)|(most|more) telling|silent(ly)?|silence|loud(ly)?|quietly|sp(eaks?|oken)"
    r"|what (an?|the|one|its|these)? ?(teachers?|students?|networks?|logits|rows) (say|says|said|learned)"
    r"|(teachers?|students?|networks?|logits) (says?|said|answers?|knows?|tells?)"
    r"|(teacher|student|network)'s (\w+ )?answers?|(right|wrong) answers?|says? nothing"
    r"|asked (in|rightly|wrongly)|is it asked)\b",
    re.IGNORECASE,
)


def names(file: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    yield 1, file.stem
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name


def is_strange(name: str) -> bool:
    bare = name.strip("_").lower()
    return bare in WHOLE or bool(PARTS & set(bare.split("_")))


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Comments and strings, by their first line."""
    wanted = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in wanted:
            yield token.start[0], token.string


def strange_texts(lines: Iterator[tuple[int, str]]) -> list[str]:
    return [f"{line} {m[0]}" for line, text in lines for m in TEXT.finditer(" ".join(text.split()))]


def test_names_are_the_field_s_words() -> None:
    bad = [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file in SOURCES
        for line, name in names(file, ast.parse(file.read_text(encoding="utf-8")))
        if is_strange(name)
    ]
    assert not bad, "\n".join(bad)


def test_texts_use_the_field_s_words() -> None:
    bad = [
        f"{file.relative_to(ROOT)}:{text}"
        for file in [*SOURCES, *PAGES]
        for source in [file.read_text(encoding="utf-8")]
        for text in strange_texts(
            texts(source) if file.suffix == ".py" else iter(enumerate(source.splitlines(), 1))
        )
    ]
    assert not bad, "\n".join(bad)
