"""Files of the repository outside docs/ that pages link to: they are part of the site, links lead there.

A hook of MkDocs.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "stores/FORMAT.md": "reference/format.md",
}
"""Pages outside docs/ -> their places in the site."""
FOLDERS = ("evidence", "examples")
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def place_of(path: str) -> str:
    """Where a file or folder of the repository is in the site."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in FOLDERS:
        return f"source/{path}/index.md"
    return f"source/{path}".removesuffix(".py") + (".md" if path.endswith(".py") else "")


def path_of(place: str) -> str:
    """The inverse of `place_of`, for pages written by hand."""
    written = {value: key for key, value in PAGES.items()}
    return written.get(place, f"docs/{place}")


def relinked(markdown: str, place: str) -> str:
    """A page whose links, which hold in the repository, hold in the site."""
    folder = posixpath.dirname(path_of(place))

    def link(match: re.Match[str]) -> str:
        target = place_of(posixpath.normpath(posixpath.join(folder, match[1])))
        return f"]({posixpath.relpath(target, posixpath.dirname(place) or '.')}{match[2] or ''})"

    return LINK.sub(link, markdown)


def pages() -> dict[str, str]:
    """Every page that is made of files outside docs/, Markdown by its place in the site."""
    result = {place: (ROOT / path).read_text(encoding="utf-8") for path, place in PAGES.items()}
    for folder in FOLDERS:
        lines = [f"# {folder}"]
        for file in sorted((ROOT / folder).iterdir()):
            path = f"{folder}/{file.name}"
            if file.suffix == ".py":
                code = file.read_text(encoding="utf-8")
                result[place_of(path)] = f"# {path}\n\n````python\n{code}````\n"
                lines.append(f"- [{file.name}]({file.stem}.md)")
            elif file.suffix == ".json":
                lines.append(f"- [{file.name}]({file.name})")
        result[place_of(folder)] = lines[0] + "\n\n" + "\n".join(lines[1:]) + "\n"
    return result


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the measured files."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).glob("*.json")):
            place = place_of(f"{folder}/{file.name}")
            files.append(File.generated(config, place, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Make the links of a page those of the site; pages that are made from records have theirs."""
    place = page.file.src_uri
    by_hand = place in PAGES.values() or (ROOT / "docs" / place).exists()
    return relinked(markdown, place) if by_hand else markdown
