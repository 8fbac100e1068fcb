import pytest

from esft.reporting.figures import figure, share, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"), (-5, "-5"), (10**15, "1.000e+15"), (0.0, "0"), (0.15389585, "0.1539"), (1.0, "1"),
        (999.96, "1000"), (2156.4, "2,156"), (1.234e6, "1.23e+06"), (5e-4, "0.0005"), (1.23456e-5, "1.23e-05"),
        (True, "True"), ("a text", "a text"), (None, "None"), ([1, 2], "[1, 2]"), (-0.25, "-0.25"), (-2156.4, "-2,156"),
        (float("inf"), "inf"), (1000.0, "1,000"),
    ],
)  # fmt: skip
def test_a_figure_has_the_digits_that_say_something(value, text: str):
    assert figure(value) == text


def test_a_long_text_and_a_long_list_are_cut():
    assert len(figure("x" * 10_000)) < 100 and figure("x" * 400) == "x" * 400
    assert len(figure(list(range(10_000)))) < 100 and len(figure(10**4000)) < 100


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1, "1 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (4143328, "4.1 MB"), (2.5e9, "2.5 GB"),
     (3e12, "3.0 TB"), (5e15, "5000.0 TB")],
)  # fmt: skip
def test_sizes_are_in_powers_of_1000(count: float, text: str):
    assert size(count) == text


def test_shares_are_in_per_cent():
    assert share(0.1234) == "12.3%" and share(1) == "100.0%"
