"""The documentation builds as a site without a warning, and its links are valid there and in the repository."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from support.doc_pages import DOCS, NAMES, prose
from support.paths import ROOT

LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def links(page: str) -> list[str]:
    return LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the repository's web view makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(str(page.relative_to(ROOT))), re.MULTILINE):
        kept = (c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN")
        found.add("".join(kept).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", NAMES)
def test_links_between_files_of_the_repository_are_valid(page: str) -> None:
    for link in links(page):
        if re.match(r"\w+:", link):
            assert link.startswith("https://"), link
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.resolve().is_relative_to(ROOT), link
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.resolve()), f"{page}: {link}"


class Linked(HTMLParser):
    """The anchors of a page of the site, its links, and the files that a browser fetches for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.hrefs: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.hrefs.append(given["href"])
        elif tag == "link":
            self.fetched.append(given["href"])
        elif "src" in given:
            self.fetched.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs mkdocs: pip install '.[docs]'")
    place = tmp_path_factory.mktemp("site")
    finished = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", place],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "WARNING" not in finished.stdout + finished.stderr
    return place


@pytest.fixture(scope="module")
def built(site: Path) -> dict[Path, Linked]:
    return {page: Linked(page.read_text()) for page in site.rglob("*.html")}


def test_every_page_and_every_example_is_in_the_site(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS)).with_suffix(".html").exists(), page
    for example in (ROOT / "examples").glob("*.py"):
        assert (site / "examples" / example.name).with_suffix(".html").exists(), example
    assert {"changelog.html", "contributing.html", "security.html"} <= {page.name for page in site.glob("*.html")}


def test_every_page_is_in_the_navigation(built: dict[Path, Linked], site: Path) -> None:
    start = built[site / "index.html"]
    reached = {urlsplit(link).path for link in start.hrefs}
    for page in DOCS.rglob("*.md"):
        name = str(page.relative_to(DOCS).with_suffix(".html"))
        assert name in reached or name == "index.html", f"{page.name} is not in mkdocs.yml's nav"


def test_links_within_the_site_are_valid(built: dict[Path, Linked]) -> None:
    n_checked = 0
    for page, linked in built.items():
        if page.name == "404.html":
            continue  # served for any address, so its links begin at the root
        for link in linked.hrefs + linked.fetched:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path not in ("", ".") else page
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page.name}: {link}"
            if parts.fragment and target in built:
                assert unquote(parts.fragment) in built[target].ids, f"{page.name}: {link}"
            n_checked += 1
    assert n_checked > 1000


def test_the_site_loads_no_external_files(built: dict[Path, Linked], site: Path) -> None:
    for page, linked in built.items():
        for link in linked.fetched:
            assert not urlsplit(link).netloc, f"{page.name}: {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text()), style


def test_figures_support_light_and_dark_themes() -> None:
    figures = list(DOCS.rglob("*.svg"))
    assert len(figures) >= 5
    for figure in figures:
        text = figure.read_text()
        assert "prefers-color-scheme: dark" in text, figure
        assert "<title>" in text, figure
        assert not re.search(r"(?:href|src)=\"https?:|<script", text), figure


def test_the_reference_documents_the_main_names(site: Path) -> None:
    models = (site / "api" / "models.html").read_text()
    for name in ("load_model", "Model.complete", "Model.chat", "Model.load_adapter", "Model.embed", "Model.unload"):
        assert f'id="erllama.{name}"' in models, name
    assert "maximum number of requests that run at once" in models
