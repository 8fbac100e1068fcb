import pytest

from esft.reporting.curves import AROUND, Chart, are_noisy, charts_across, charts_of, is_long, smoothed
from esft.reporting.record import Line


def lines(*names: str) -> dict[str, Line]:
    return {name: Line(name, [1, 2], [float(i), 0.0]) for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("names", "charts"),
    [
        ("loss lr eval_loss", {"loss": ["loss", "eval_loss"], "lr": ["lr"]}),
        ("tokens_per_second", {"tokens per second": ["tokens_per_second"]}),
        ("eval_exact_match test/exact_match", {"exact match": ["eval_exact_match", "test/exact_match"]}),
        ("peak_memory gpu_peak_memory", {"peak memory": ["peak_memory", "gpu_peak_memory"]}),
        ("__", {"__": ["__"]}),
    ],
)
def test_figures_whose_names_end_alike_share_a_chart(names: str, charts: dict[str, list[str]]):
    found = charts_of(lines(*names.split()))
    assert {chart.title: [line.name for line in chart.lines] for chart in found} == charts


def test_across_runs_each_figure_is_a_chart_with_a_line_for_each_run_that_has_it():
    found = charts_across({"a": lines("loss", "lr"), "b": lines("eval_loss", "loss")})
    assert [chart.title for chart in found] == ["loss", "lr", "eval loss"]
    assert [[line.name for line in chart.lines] for chart in found] == [["a", "b"], ["a"], ["b"]]
    assert found[0].lines[1].values == [1.0, 0.0] and found[0].lines[0].values == [0.0, 0.0]


def test_a_charts_table_has_every_span_of_steps_with_the_last_value_of_each_line():
    steps = list(range(1, 51))
    chart = Chart("loss", [Line("loss", steps, [s / 100 for s in steps]), Line("eval", [20, 50], [7.0, 8.0])])
    table = chart.table
    assert len(table) == 17 and table[0] == ["1-3", "0.03", ""]
    assert table[6] == ["19-21", "0.21", "7"] and table[-1] == ["49-50", "0.5", "8"]
    assert Chart("loss", [Line("loss", [5], [1.5])]).table == [["5", "1.5"]]
    assert len(Chart("loss", [Line("l", list(range(24)), [1.0] * 24)]).table) == 24


def test_a_chart_is_told_in_words():
    text = Chart("loss", [Line("loss", [1, 2, 3, 4], [4.0, 1.0, 9.0, 1.0])]).description
    assert text == (
        "Line chart of loss over training steps. loss: 4 at step 1, 1 at step 4; lowest 1 at step 2, "
        "highest 9 at step 3."
    )


def test_lines_are_noisy_of_which_a_long_one_goes_up_and_down_and_not_those_that_go_somewhere():
    def line(values: list[float]) -> Line:
        return Line("x", list(range(len(values))), values)

    rate = line([i / 30 for i in range(30)] + [1 - i / 30 for i in range(30)])  # of a warm-up and a decay
    noisy = line([0.0, 1.0] * 30)
    steep = line([10 * value for value in rate.values])
    assert not are_noisy([rate]) and not are_noisy([steep]) and not are_noisy([]) and not are_noisy([line([2.0] * 100)])
    assert are_noisy([noisy]) and are_noisy([rate, noisy])
    short, long = (line(noisy.values[:count]) for count in (2 * AROUND, 2 * AROUND + 1))
    assert not is_long(short) and is_long(long)
    assert not are_noisy([short]) and are_noisy([long])
    assert Chart("x", [rate]).note == "" and "the mean of 21 around each" in Chart("x", [rate, noisy]).note


def test_a_smoothed_line_has_means_of_as_many_values_before_as_after():
    assert smoothed([1.0, 3.0, 8.0, 100.0], around=1) == [1.0, 4.0, 37.0, 100.0]
    assert smoothed([0.0, 0.0, 10.0, 0.0, 0.0], around=2) == pytest.approx([0, 10 / 3, 2, 10 / 3, 0])
    assert smoothed([5.0, 4.0, 3.0, 2.0, 1.0]) == [5.0, 4.0, 3.0, 2.0, 1.0]  # what falls evenly stays where it is
    assert smoothed([]) == []
