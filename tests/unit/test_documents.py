"""Guards the documents: what a reader meets there can be read at one go, and leads somewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from documented import ROOT

PAGES = [
    *("README.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md"),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
LONGEST_SENTENCE = 30
"""Words."""

_NOT_PROSE = {"table_open": "table_close", "heading_open": "heading_close"}
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')*_]*\s+")


@cache
def tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text())


def prose(page: str) -> Iterator[str]:
    """Paragraphs and points of lists, without their marks. What is code is one word."""
    until = ""
    for token in tokens(page):
        if until:
            until = "" if token.type == until else until
        elif token.type in _NOT_PROSE:
            until = _NOT_PROSE[token.type]
        elif token.type == "inline":
            yield "".join(map(_text, token.children or ()))


def _text(token: Token) -> str:
    match token.type:
        case "text":
            return token.content
        case "code_inline":
            return "CODE"
        case "softbreak" | "hardbreak":
            return " "
        case _:
            return ""


def sentences(page: str) -> Iterator[str]:
    for paragraph in prose(page):
        yield from _SENTENCE_END.split(paragraph.strip())


def words(sentence: str) -> int:
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


@cache
def anchors(page: str) -> frozenset[str]:
    """What GitHub calls the headings of a page."""
    parsed = tokens(page)
    names: Counter[str] = Counter()
    found = set()
    for opening, inline in pairwise(parsed):
        if opening.type == "heading_open":
            shown = "".join(
                child.content if child.type == "code_inline" else _text(child)
                for child in inline.children or ()
            )
            name = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
            found.add(f"{name}-{names[name]}" if names[name] else name)
            names[name] += 1
    return frozenset(found)


def links(page: str) -> Iterator[str]:
    """Where a page leads, pictures included; not what is on other machines."""
    for token in tokens(page):
        for child in token.children or ():
            target = child.attrs.get("href", child.attrs.get("src"))
            if isinstance(target, str) and "://" not in target:
                yield target


@pytest.mark.parametrize("page", PAGES)
def test_no_sentence_is_too_long(page: str) -> None:
    long = [each for each in sentences(page) if words(each) > LONGEST_SENTENCE]
    assert not long, "\n".join(f"{words(each)} words: {each}" for each in long)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    first = next(paragraph for paragraph in text.split("\n\n")[1:])
    assert "not yet run on a GPU" in first


def table_below(page: str, heading: str) -> list[str]:
    """The rows of the first table below a heading."""
    text = (ROOT / page).read_text().split(f"\n## {heading}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert rows is not None
    return rows[0].splitlines()


def test_figures_are_the_same_everywhere() -> None:
    """One table, with date, commit and machine: no page says what another one does not."""
    assert table_below("README.md", "How fast") == table_below("docs/performance.md", "Figures")


def test_words_are_explained_once() -> None:
    """A word has one entry in the glossary, and entries are in the order in which people look."""
    rows = table_below("docs/glossary.md", "Words")[2:]
    entries = [row.split("|")[1].strip(" *").lower() for row in rows]
    assert entries == sorted(set(entries))
    assert len(entries) > 20
