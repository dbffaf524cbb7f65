"""The page in a real browser: no error on its console, sensible sizes on a phone and on a desk."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PROBE = """<script>
addEventListener("load", () => {
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.right, r.height]; };
  const text = [...document.querySelectorAll("p, li, h1, h2, h3, figcaption, td, th")];
  parent.postMessage(JSON.stringify({
    width: innerWidth,
    page: document.documentElement.scrollWidth,
    figures: [...document.querySelectorAll("svg")].map(box),
    images: [...document.images].map((i) => i.complete && i.naturalWidth),
    smallest: Math.min(...text.map((e) => parseFloat(getComputedStyle(e).fontSize))),
    columns: getComputedStyle(document.querySelector(".figures")).gridTemplateColumns.split(" ").length,
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("svg")).color,
  }), "*");
});
</script>"""
FRAME = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><title>frame</title>
<iframe src="probed.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="found"></pre>
<script>addEventListener("message", (e) => {{ document.getElementById("found").textContent = e.data; }});
</script>"""


FOUND = [
    path
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
    if (path := shutil.which(name))
]
# Before the report is made, which takes seconds.
pytestmark = pytest.mark.skipif(
    not FOUND, reason="no Chromium on this machine: `apt-get install chromium` runs this test"
)


@pytest.fixture
def browser() -> str:
    return FOUND[0]


@pytest.fixture
def page(written: Path) -> Path:
    return written / "index.html"


def look(
    browser: str, page: Path, width: int, folder: Path, *flags: str
) -> tuple[dict[str, Any], str]:
    """What the page measures in a frame of this width (a window has a least width of its own)."""
    text = page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>")
    (folder / "probed.html").write_text(text, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", "--window-size=1500,1000", "--dump-dom",
         "--virtual-time-budget=20000", *flags, (folder / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    measured = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert measured, done.stderr[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(measured.group(1))), console


@pytest.mark.parametrize(("width", "columns"), [(360, 1), (1280, 2)])
def test_sizes(browser: str, page: Path, width: int, columns: int, tmp_path: Path) -> None:
    measured, console = look(browser, page, width, tmp_path)
    assert console == ""
    assert measured["width"] == width
    assert measured["page"] <= width  # nothing makes the page itself scroll sideways
    assert (measured["columns"] >= 2) == (columns >= 2)
    assert len(measured["figures"]) == 16
    for left, right, height in measured["figures"]:
        assert left >= 0
        assert right <= width
        assert right - left >= 0.6 * min(width, 400)
        assert 80 <= height <= 700
    assert measured["images"]
    assert all(measured["images"])
    assert measured["smallest"] >= 11


def test_dark_mode(browser: str, page: Path, tmp_path: Path) -> None:
    light, _ = look(browser, page, 800, tmp_path)
    dark, console = look(browser, page, 800, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert console == ""

    def brightness(colour: str) -> float:
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 765

    assert brightness(light["paper"]) > 0.9 > 0.3 > brightness(light["ink"])
    assert brightness(dark["paper"]) < 0.2 < 0.8 < brightness(dark["ink"])


def test_the_probe_would_notice_an_error(browser: str, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    text = page.read_text(encoding="utf-8")
    broken.write_text(
        text.replace("</body>", "<script>nothing.here</script></body>"), encoding="utf-8"
    )
    _, console = look(browser, broken, 800, tmp_path)
    assert "nothing is not defined" in console
