"""What the documentation site has beside ``docs/*.md``: pages of the repository's root.

The pages are written to be read where they lie, so their links lead to files. On the site a link to
a page of the root leads to its page there. A link to any other file outside ``docs`` becomes text,
because the site has no such file. One to a file that does not exist fails the build.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.plugins.site_pages")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Pages of the root, and what they are called on the site."""

_FENCED = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
_IMAGE = re.compile(r"(!\[[^\]]*\]\()docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files into links to pages."""
    source = {new: old for old, new in PAGES.items()}.get(page.file.src_uri)
    if source is not None:
        markdown = _IMAGE.sub(r"\1", markdown)
    folder = DOCS if source is None else ROOT
    parts = _FENCED.split(markdown)
    parts[::2] = [_LINK.sub(lambda link: _on_site(link, folder, page), text) for text in parts[::2]]
    return "".join(parts)


def _on_site(link: re.Match[str], folder: Path, page: Page) -> str:
    """A link as the site has it."""
    target = (folder / link["path"]).resolve()
    if target.is_relative_to(DOCS):
        path = target.relative_to(DOCS).as_posix()
    elif target.is_relative_to(ROOT):
        name = target.relative_to(ROOT).as_posix()
        if not target.exists():
            log.warning("%s: there is no file %s", page.file.src_uri, name)
        if name not in PAGES:
            return link["text"]
        path = PAGES[name]
    else:
        log.warning("%s: %s leads out of the repository", page.file.src_uri, link["path"])
        return link["text"]
    return f"[{link['text']}]({path}{link['anchor'] or ''})"
