"""What the pages say is there: commands that parse, options, make targets, modules, files, and links."""

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from esft.cli.parser import _parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@cache
def tokens(page: Path) -> list:
    blocks = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [token for block in blocks for token in (block, *(block.children or ()))]


def lines(page: Path) -> Iterator[tuple[str, bool]]:
    """Lines of code of a page, and whether it is by itself and not within a sentence."""
    for token in tokens(page):
        if token.type in ("code_block", "fence"):
            yield from ((line, True) for line in re.sub(r" *\\?\n +", " ", token.content).splitlines())
        elif token.type == "code_inline":
            yield token.content.strip(), False


def spelled(line: str) -> Iterator[str]:
    """A line of usage with the first of its [choices | among | some] and this|or|that; with the second; and so on."""
    choices = re.compile(r"\[([^]]*)\]|(?<= )(\w+(?:\|\w+)+)")
    for i in range(1 + line.count("|")):

        def choice(found: re.Match, i: int = i) -> str:
            each = re.split(r" \| " if found[1] else r"\|", found[1] or found[2])
            return choices.sub(choice, each[min(i, len(each) - 1)])

        yield choices.sub(choice, line)


def commands(page: Path, program: str) -> Iterator[tuple[list[str], bool]]:
    """The words behind ``program`` where a page has it, and whether nothing of the command is left out."""
    for line, alone in lines(page):
        if line.startswith(f"{program} "):
            for each in spelled(line) if alone else [line]:
                first = re.split(r" (?:&&|[|>&])(?: |$)", each)[0]
                said = re.sub(r" \.\.\.(?= |$)", "", first)  # "and other options"
                yield shlex.split(said, comments=True)[len(program.split()) :], alone and said == first


def stages(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction)).choices


@cache
def parser(whole: bool) -> argparse.ArgumentParser:
    """That of the command; or one for parts of its lines, in which nothing is required."""
    made = _parser()
    for stage in () if whole else stages(made).values():
        for needed in (*stage._actions, *stage._mutually_exclusive_groups):
            needed.required = False
    return made


@pages
def test_every_command_parses(page: Path):
    for words, whole in commands(page, "esft"):
        try:
            parser(whole).parse_args(words)
        except SystemExit as ended:  # as --help does with 0, and a complaint with 2
            assert ended.code == 0, shlex.join(words)


@pages
def test_every_option_that_a_sentence_names_is_one(page: Path):
    every = stages(parser(True)).values()
    known = {name: action for stage in every for action in stage._actions for name in action.option_strings}
    for line, alone in lines(page):
        if line.startswith("--") and not alone:
            name, *values = line.split()
            assert name in known, name
            choices = known[name].choices
            assert not choices or set(values) <= set(choices), line


@pages
def test_every_make_target_and_module_is_there(page: Path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, value in re.findall(r"^(\w+) := (.+)$", makefile, re.MULTILINE):
        makefile = makefile.replace(f"$({name})", value)
    targets = set(re.findall(r"^([\w./-]+):(?!=)", makefile, re.MULTILINE))
    for words, _ in commands(page, "make"):
        assert words[0] in targets, words[0]
    for words, _ in commands(page, "python -m"):
        assert importlib.util.find_spec(words[0]) is not None, words[0]


@pages
def test_every_file_of_the_repository_that_is_named_is_there(page: Path):
    for line, _ in lines(page):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|yaml|md|ipynb)", line):
            assert any((ROOT / folder / line).is_file() for folder in ("", "esft", "esft_kernels", "docs")), line


def anchors(page: Path) -> set[str]:
    """What a link may name of a page: its headings, as hosts of repositories write them."""
    all_tokens = tokens(page)
    texts = [all_tokens[i + 1].content for i, token in enumerate(all_tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in texts}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The files that a page links to, and the place in each."""
    for token in tokens(page):
        href = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if href and not re.match(r"[a-z]+:", href):
            path, _, place = href.partition("#")
            yield (page.parent / path).resolve() if path else page, place


@pages
def test_every_link_leads_somewhere(page: Path):
    for target, place in links(page):
        assert target.exists() and target.is_relative_to(ROOT), target
        assert not place or place in anchors(target), f"{target}#{place}"


def test_the_readme_leads_to_every_page():
    assert {target for target, _ in links(PAGES[0])} >= set(PAGES[1:])
