"""Pages in a real browser: nothing is loaded or complained about, they fit a phone, and their buttons sort."""

import pytest

from esft.reporting.comparison import read_runs, write_comparison_page
from esft.reporting.run_page import Beside, write_run_page
from tests.esft.reporting.browser import CHROMIUM, browser
from tests.esft.reporting.pages import AFTER, SCORES, make_run, write_evaluation
from tests.esft.reporting.test_run_page import HOSTILE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

# What stands in the first heatmap's rows, and at the beginning of the rows of the first table.
CELLS = """[...document.querySelector('.heatmap').rows].map(
  row => [...row.querySelectorAll('td')].map(cell => cell.textContent).join(' '))"""
FIRST_COLUMN = "[...document.querySelectorAll('#choice .sortable tbody th')].map(cell => cell.textContent).join(' ')"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of a run with everything that it may have, hostile texts among it, and one of two runs."""
    folder = tmp_path_factory.mktemp("pages")
    run = make_run(folder / "<img src=x onerror=alert(1)>", more={HOSTILE: 1.0, "n" * 200: 2.0}, model="m" * 300)
    other = make_run(folder / "other")
    SCORES.save(folder / "s.json")
    AFTER.save(folder / "t.json")
    answers = [(HOSTILE, "x" * 500, "y"), ("two", "2", "2")]
    evaluation = write_evaluation(folder / "e.json", *answers)
    beside = Beside([other], folder / "s.json", folder / "t.json", evaluation, evaluation)
    write_run_page(run, folder / "run.html", beside)
    write_comparison_page(read_runs([run, other]), folder / "compare.html")
    return {"run": folder / "run.html", "compare": folder / "compare.html"}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["run", "compare"])
def test_a_page_is_shown_without_a_word_on_the_console_and_fits_its_window(tab, pages, name, dark, width):
    tab.said.clear(), tab.asked.clear()
    tab.open(pages[name], width, dark)
    assert tab.value("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    shown = tab.value("document.images[0].currentSrc === document.images[0].previousElementSibling.srcset")
    assert shown == dark
    ground = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") != dark
    assert tab.said == []
    assert [address for address in tab.asked if not address.startswith("data:")] == [pages[name].as_uri()]


def test_buttons_sort_a_heatmap_and_a_table(tab, pages):
    tab.open(pages["run"])
    assert tab.value(CELLS) == ["2 0 1 3", "1 0 2 3"]
    tab.value("document.querySelector('.by-number').click()")
    assert tab.value(CELLS) == ["0 1 2 3", "0 1 2 3"]
    tab.value("document.querySelector('.heatmap tr th button').click()")
    assert tab.value(CELLS) == ["2 0 1 3", "2 0 1 3"]
    assert tab.value("document.querySelector('.heat output').textContent") == "Every layer by the scores of layer 1."
    tab.value("document.querySelector('.by-score').click()")
    assert tab.value(CELLS) == ["2 0 1 3", "1 0 2 3"]

    share = "document.querySelectorAll('#choice table.sortable thead th')[3]"
    assert tab.value(FIRST_COLUMN) == "1 3"
    for order, rows in (("descending", "1 3"), ("ascending", "3 1"), ("descending", "1 3")):
        tab.value(f"{share}.querySelector('button').click()")
        assert tab.value(f"{share}.getAttribute('aria-sort')") == order
        assert tab.value(FIRST_COLUMN) == rows


def test_the_policy_stops_what_is_not_the_pages_own(tab, pages):
    """What the other tests rest on: a page that did run or load something would say so."""
    tab.open(pages["run"])
    tab.said.clear()
    tab.value("document.body.insertAdjacentHTML('beforeend', '<img src=https://example.org/x.png onerror=alert(1)>')")
    tab.value("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))")
    assert tab.value("window.ran") is None
    assert sum("Content Security Policy" in said for said in tab.said) >= 2
