import sys

import pytest
from jinja2 import ChoiceLoader, DictLoader, UndefinedError

import esft
from esft.reporting import page
from esft.reporting.page import check_page, write_page
from tests.esft.reporting.pages import read_page

CONTENT = """{% extends "page.html.jinja" %}{% block content %}
<section id="one" aria-labelledby="h"><h2 id="h">One</h2><p title="{{ said }}">{{ said }}</p></section>{% endblock %}"""


@pytest.fixture
def template(monkeypatch):
    """A template "t" beside those of the package."""
    environment = page._environment()
    monkeypatch.setattr(environment, "loader", ChoiceLoader([DictLoader({"t": CONTENT}), environment.loader]))
    return "t"


def write(path, template: str, said: str, title: str = "A title"):
    write_page(path, template, title=title, sections=[("one", "One")], said=said)
    return read_page(path)


def test_a_page_is_whole_and_safe_and_its_own(tmp_path, template):
    found = write(tmp_path / "p.html", template, "words")
    assert found.one("title").text == found.one("h1").text == "A title"
    assert found.one("p", title="words").text == "words"
    assert [heat for heat in range(17) if f".heat{heat}{{" in (tmp_path / "p.html").read_text()] == list(range(16))
    check_page(tmp_path / "p.html")


@pytest.mark.parametrize(
    "text",
    [
        "</p><script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "' onmouseover='alert(1)", "{{ 7 * 7 }}",
        "<!--", "]]>", "&lt;b&gt;", "</title></style></script>", "javascript:alert(1)",
    ],
)  # fmt: skip
def test_texts_of_others_stay_texts(tmp_path, template, text: str):
    found = write(tmp_path / "p.html", template, text, title=text)
    p = found.one("section").one("p")
    assert p.text == p.attributes["title"] == found.one("h1").text == text
    assert {element.tag for element in found.all()} <= set(
        "html head meta title link style body header h1 nav ul li a main section h2 p footer code script".split()
    )


def test_what_is_no_character_is_shown_as_an_escape_and_lines_stay_lines(tmp_path, template):
    write(tmp_path / "p.html", template, "a\nb\x00\x1b[2J\ud800\u202eg")
    assert "a\nb\\x00\\x1b[2J\\ud800\\u202eg" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_a_value_that_a_template_needs_and_does_not_get_is_an_error_and_writes_nothing(tmp_path, template):
    with pytest.raises(UndefinedError):
        write_page(tmp_path / "p.html", template, title="x", sections=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "<!doctype html>", "x" * 600 + page.MARKER, "thesis"])
def test_what_is_no_page_of_ours_is_told(tmp_path, content: str):
    (tmp_path / "p.html").write_text(content)
    with pytest.raises(esft.InputError, match="not a page that esft has written"):
        check_page(tmp_path / "p.html")


def test_a_page_without_matplotlib_says_what_to_install(tmp_path, template, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(esft.InputError, match=r"pip install 'esft\[plot\]'"):
        write(tmp_path / "p.html", template, "x")
    assert not list(tmp_path.iterdir())
