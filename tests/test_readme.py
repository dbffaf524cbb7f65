"""The README's tables are made of the records; that its code runs is held with all pages, in test_docs."""

from __future__ import annotations

from pathlib import Path

from kdcache.methods.table import METHODS
from kdcache_cli.names import WORDS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_methods_is_that_of_the_records() -> None:
    rows = []
    for method in METHODS.values():
        own = ", ".join(
            f"`--{method.flag(option).replace('_', '-')} {option.default}`"
            for option in method.options
        )
        rows.append(f"| `{method.name}` | {method.source} | {method.title} | {own} |")
    table = "\n".join(
        ("| method | source | what it computes | own options |", "|---|---|---|---|", *rows)
    )
    assert table in README


def test_the_five_words_are_those_of_the_command_line() -> None:
    five = list(WORDS.items())[:5]
    assert [word for word, _ in five] == ["store", "view", "plan", "seal", "break-even"]
    assert "\n".join(f"- **{word}**: {what}" for word, what in five) in README
