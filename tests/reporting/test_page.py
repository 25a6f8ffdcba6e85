"""The page: complete in itself, well-formed, and as a browser shows it on two widths."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

_VOID = {"meta", "link", "br", "img", "hr", "input"}
# Windows of the full browser cannot be as narrow as a phone.
_BROWSERS = ("chromium-headless-shell", "chrome-headless-shell")
_SECTIONS = {"answers", "which", "why", "differ", "sure", "cost", "words", "compare", "terms"}


class Page(html.parser.HTMLParser):
    """Collects ids, references, and text; fails where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href", "srcset", "data"):
                self.references.append(value)
            elif name in ("style", "clip-path", "fill", "filter"):
                self.references += re.findall(r"url\((.*?)\)", value or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open[-1:]:
            self.words += data


@pytest.fixture(scope="module")
def text(report: Path) -> str:
    return (report / "report.html").read_text()


def test_is_well_formed_and_complete_in_itself(text: str) -> None:
    page = Page(text)
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert set(page.ids) >= _SECTIONS
    for reference in page.references:
        assert reference.startswith("#") and reference[1:] in page.ids, reference
    assert "<script" not in text and "@import" not in text and "<image" not in text


def test_answers_every_question_for_every_task(text: str) -> None:
    words = re.sub(r"\s+", " ", Page(text).words)
    for question in ("Does it fit?", "Which experts?", "Why these?", "How sure?", "What cost?"):
        assert words.count(question) == 2
    assert re.search(r"\d+ of 24 experts, \d( to \d)? in a layer", words)
    assert re.search(r"They serve \d\d\.\d% of the task's assignments", words)
    assert re.search(r"Two independent samples of \d+ tokens agree on", words)
    assert re.search(
        r"parameters are trained, \d+\.\d% of the model: [\d.]+ kB as an adapter", words
    )


def test_names_are_text_and_not_markup(scored: list[Path], tmp_path: Path) -> None:
    from esft_jax.report import main

    assert main([f"a<b>&c={scored[0]}", "--output", str(tmp_path)]) == 0
    assert "a<b>&c" in Page((tmp_path / "report.html").read_text()).words


# Puts what the browser measures where `--dump-dom` shows it.
_MEASURE = """<script>addEventListener("load", () => {
  const box = e => { const b = e.getBoundingClientRect();
    return [b.left, b.top, b.right, b.bottom].map(Math.round); };
  document.title = "MEASURED" + JSON.stringify({
    width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
    figures: Object.fromEntries([...document.querySelectorAll("figure")].map(
      f => [f.id, box(f.querySelector("svg"))])),
    hidden: Math.max(...[...document.querySelectorAll(".scroll")].map(
      e => e.scrollWidth - e.clientWidth)),
    letters: Math.min(...[...document.querySelectorAll("p, dd, td")].map(
      e => parseFloat(getComputedStyle(e).fontSize))),
  }); });</script></body>"""


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it(text: str, tmp_path: Path, width: int) -> None:
    """Nothing sticks out, every figure is drawn; on a desktop, and on a phone."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: expected one of {', '.join(_BROWSERS)}")
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", _MEASURE))

    def browse(*options: str) -> str:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=120
        ).stdout

    dom = browse("--dump-dom", f"--window-size={width},1000")
    found = re.search(r"<title>MEASURED(\{.*?\})</title>", dom)
    assert found, dom[:500]
    measured = json.loads(found[1])
    assert measured["width"] <= width
    assert measured["hidden"] <= 0, "a table needs to be scrolled sideways"
    assert measured["letters"] >= 11
    assert set(measured["figures"]) >= {"experts-0", "concentration", "overlap", "methods"}
    shot = tmp_path / "page.png"
    browse(f"--screenshot={shot}", f"--window-size={width},{measured['height']}")
    pixels = np.asarray(Image.open(shot).convert("RGB"), np.int16)
    assert pixels.shape[1] == width
    for name, (left, top, right, bottom) in measured["figures"].items():
        assert left >= 0 and right <= width and right - left > 0.7 * min(width, 760), name
        part = pixels[top:bottom, left:right]
        assert (part.min(axis=2) < 250).mean() > 0.02, f"{name} is blank"
        assert (np.ptp(part, axis=2) > 60).any(), f"{name} has no colour"
