import base64
import builtins
import sys
import warnings
import xml.etree.ElementTree as ElementTree

import pytest

import esft
from esft.reporting import pictures
from esft.reporting.curves import Chart
from esft.reporting.experts import LEVELS, loads
from esft.reporting.pictures import draw, draw_all, draw_loads, heat_colours
from esft.reporting.record import Line
from tests.esft.reporting.pages import AFTER, SCORES, SELECTION

SVG = "{http://www.w3.org/2000/svg}"


def svg(address: str) -> ElementTree.Element:
    return ElementTree.fromstring(base64.b64decode(address.removeprefix("data:image/svg+xml;base64,")))


def texts(address: str) -> list[str]:
    return [element.text or "" for element in svg(address).iter(f"{SVG}text")]


def strokes(address: str) -> set[tuple[str, str]]:
    """Colour and dashes of each line that is drawn."""
    styles = [
        dict(rule.strip().split(": ") for rule in path.attrib["style"].split(";"))
        for path in svg(address).iter(f"{SVG}path")
        if "stroke:" in path.attrib.get("style", "")
    ]
    return {(style["stroke"].lower(), style.get("stroke-dasharray", "")) for style in styles}


def line(name: str, count: int = 3) -> Line:
    return Line(name, list(range(1, count + 1)), [float(i % 5) for i in range(count)])


def test_a_chart_is_drawn_for_light_and_for_dark_surroundings():
    chart = Chart("loss", [line("loss"), line("eval_loss")])
    picture = draw(chart)
    assert picture.text == chart.description
    for address, ink, others in ((picture.light, "#1b1b1b", "#e6e6e6"), (picture.dark, "#e6e6e6", "#1b1b1b")):
        assert {"step", "loss", "eval_loss"} <= set(texts(address))
        content = base64.b64decode(address.partition(",")[2]).decode()
        assert ink in content and others not in content and "#ffffff" not in content


def test_the_same_lines_give_the_same_bytes():
    assert draw(Chart("loss", [line("a")])) == draw(Chart("loss", [line("a")]))
    assert draw(Chart("loss", [line("a")])) != draw(Chart("loss", [line("a", 4)]))


def test_lines_differ_in_dashes_and_not_in_colours_alone():
    names = "abcdef"
    for address in (draw(chart := Chart("x", [line(name) for name in names])).light, draw(chart).dark):
        lines = {(colour, dashes) for colour, dashes in strokes(address) if colour not in _GREYS}
        assert len({colour for colour, _ in lines}) == len(names)
        assert len({dashes for _, dashes in lines}) == len(names)


@pytest.mark.parametrize(("values", "markers"), [(12, 12), (13, 13), (96, 8), (100, 9)])
def test_a_short_line_has_a_marker_at_every_value_and_a_long_one_at_about_eight(values: int, markers: int):
    steps = list(range(values))
    drawn = svg(draw(Chart("x", [Line("loss", steps, [float(step) for step in steps])])).light)
    styles = [use.attrib.get("style", "").lower() for use in drawn.iter(f"{SVG}use")]
    assert sum("#0072b2" in style for style in styles) == markers


@pytest.mark.parametrize(("names", "columns"), [("ab", 1), ("abc", 1), ("abcd", 2)])
def test_a_legend_of_many_names_has_two_columns(names: str, columns: int):
    drawn = svg(draw(Chart("x", [line(name) for name in names])).light)
    places = {text.text: text.attrib["x"] for text in drawn.iter(f"{SVG}text")}
    assert len({places[name] for name in names}) == columns


_GREYS = {"#1b1b1b", "#d0d0d0", "#e6e6e6", "#484848", "none"}


@pytest.mark.parametrize(
    "name",
    [
        "</text></svg><script>alert(1)</script>", "$\\frac{1}", "$x^", "$x^$", "$a_b$", "a\x00\x1b[2J\ud800\n\u202e",
        "&amp;", "_hidden", "", "x" * 5000, "\u4e2d\u6587 \U0001f600",
    ],
)  # fmt: skip
def test_a_name_is_a_text_whatever_it_is(name: str):
    drawn = texts(draw(Chart("x", [line(name), line("other")])).light)
    assert "other" in drawn and not any(len(text) > 60 for text in drawn)
    if name.isprintable() and 0 < len(name) < 30 and name[0] != "_":
        assert name in drawn


def test_noisy_lines_are_drawn_as_means_over_pale_values():
    for values, pale in (([0.0, 1.0] * 30, 1), ([i / 2 for i in range(60)], 0)):
        drawn = svg(draw(Chart("x", [Line("loss", list(range(60)), values)])).light)
        styles = [path.attrib.get("style", "") for path in drawn.iter(f"{SVG}path")]
        assert sum("stroke-opacity: 0.4" in style for style in styles) == pale


def test_loads_are_drawn_layer_by_layer_in_per_cent():
    picture = draw_loads(loads(SELECTION, SCORES, AFTER))
    assert picture.text == (
        "Line chart of the share of rows on the chosen experts, layer by layer. before: 70.0% to 80.0%. "
        "after: 70.0% to 80.0%."
    )
    assert {"layer", "%", "before", "after"} <= set(texts(picture.light))
    assert "before" not in draw_loads(loads(SELECTION, None, AFTER)).text


def test_colours_of_a_heatmap_grow_lighter_and_their_letters_can_be_read():
    def luminance(colour: str) -> float:
        full = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    colours = heat_colours()
    assert len(colours) == LEVELS
    backs = [luminance(back) for back, _ in colours]
    assert backs == sorted(backs) and backs[-1] > 5 * backs[0]
    for back, ink in colours:
        light, dark = sorted((luminance(back), luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (back, ink)  # AA of WCAG 2


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(esft.InputError, match="charts need matplotlib: pip install 'esft\\[plot\\]'"):
        draw(Chart("x", [line("a")]))


def test_a_backend_that_matplotlib_does_not_have_is_named(monkeypatch):
    real = builtins.__import__

    def imported(name: str, *more):
        if name == "matplotlib":
            raise ValueError("'junk' is not a valid value for backend")
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", imported)
    with pytest.raises(esft.InputError, match="^matplotlib cannot be used \\('junk' is not a valid value for backend"):
        draw(Chart("x", [line("a")]))


def test_of_more_figures_than_a_page_shows_the_first_are_drawn(monkeypatch):
    monkeypatch.setattr(pictures, "MOST_CHARTS", 2)
    monkeypatch.setattr(pictures, "MOST_LINES", 3)
    names = ["a", "b", "c", "d"]
    for charts, count, shown in (
        ([Chart("x", [line(name)]) for name in names], 2, names[:1]),
        ([Chart("x", [line(name) for name in names])], 1, names[:3]),
    ):
        with pytest.warns(UserWarning, match="^run: has more figures than a page shows; the first 2 charts"):
            drawn = draw_all(charts, "run")
        assert len(drawn) == count and [each.name for each in drawn[0][0].lines] == shown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = Chart("x", [line(name) for name in names[:3]])
        assert draw_all([whole] * 2, "run") == [(whole, draw(whole))] * 2
