"""Hooks of mkdocs: pages for files outside `docs/`, and links that also work in the site.

Links in the pages are relative to their file, so that they work in the repository. The site also has pages for the
examples and for the documents in the root; the hooks translate links to them. The sources of the API reference have
the layout of an installation.
"""

from __future__ import annotations

import posixpath
import re
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Documents in the root, and their pages in the site.
DOCUMENTS = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
SUBPACKAGES = ("cache", "engine", "llama_ffi")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")

_tree = tempfile.TemporaryDirectory(prefix="erllama-docs-")


@event_priority(100)  # before mkdocstrings uses the configuration
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let mkdocstrings find the packages under their installed names."""
    package = Path(_tree.name) / "erllama"
    if not package.exists():
        package.mkdir()
        for source in (*(ROOT / "erllama").iterdir(), *(ROOT / name for name in SUBPACKAGES)):
            (package / source.name).symlink_to(source)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_tree.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in DOCUMENTS.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for example in sorted((ROOT / "examples").glob("*.py")):
        text = f"# {example.name}\n\n```python\n{example.read_text()}```\n"
        place = f"examples/{example.stem}.md"
        files.append(File.generated(config, place, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = {page: name for name, page in DOCUMENTS.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if here.startswith("docs/examples/"):
        return markdown

    def translated(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[1]))
        place = posixpath.relpath(_page_of(target), posixpath.dirname(page.file.src_uri))
        return place + (link[2] or "")

    # Folded parts of a page contain Markdown.
    return LINK.sub(translated, markdown).replace("<details>", '<details markdown="1">')


def _page_of(path: str) -> str:
    """Return the page of a file of the repository. Other paths stay, and mkdocs reports them."""
    if path == "README.md":
        return "index.md"
    if path in DOCUMENTS:
        return DOCUMENTS[path]
    if path == "examples":
        return "examples.md"
    if path.startswith("examples/"):
        return path.removesuffix(".py") + ".md"
    return path.removeprefix("docs/")
