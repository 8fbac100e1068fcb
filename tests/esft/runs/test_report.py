import json

import pytest

import esft
from esft.runs.report import report, scores_table, table


def write_metrics(folder, lines: list[dict]):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_run(folder, steps: int, ended: bool):
    """Steps whose every figure is its own, and losses on the evaluation data after steps 2, 3 and 5."""
    lines = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 4.0 - step / 10, "lr": step * 1e-3, "tokens_per_second": 1000.0 * step})
        if step in (2, 3, 5):
            lines.append({"step": step, "eval_loss": 3 + step / 8})
    write_metrics(folder, lines)
    if ended:
        (folder / "summary.json").write_text('{"stored_bytes": 42, "data": "d.jsonl"}')
    return folder


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n\n")[0].splitlines()]


def test_a_report_gives_each_part_its_mean_loss_and_speed_and_its_last_rate_and_evaluation(tmp_path):
    names, _, *rows = cells(report(write_run(tmp_path / "run", 9, ended=True), rows=3))
    assert names == ["steps", "loss", "eval loss", "lr", "tokens/s"]
    assert rows == [
        ["1-3", "3.800", "3.375", "3.00e-03", "2,000"],  # evaluated after 2 and 3: the later
        ["4-6", "3.500", "3.625", "6.00e-03", "5,000"],
        ["7-9", "3.200", "", "9.00e-03", "8,000"],
    ]


@pytest.mark.parametrize(
    ("steps", "rows", "spans"),
    [
        (7, 3, ["1-3", "4-6", "7-7"]),
        (6, 3, ["1-2", "3-4", "5-6"]),
        (2, 3, ["1-1", "2-2"]),
        (4, 1, ["1-4"]),
    ],
)
def test_a_report_has_at_most_so_many_rows_and_every_step_once(tmp_path, steps: int, rows: int, spans: list[str]):
    shown = cells(report(write_run(tmp_path / "run", steps, ended=False), rows))[2:]
    assert [row[0] for row in shown] == spans


def test_a_report_of_a_run_that_goes_on_passes_over_a_line_that_a_kill_has_torn(tmp_path):
    run = write_run(tmp_path / "run", 3, ended=False)
    whole = report(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert report(run) == whole


def test_a_report_has_up_to_twelve_rows_unless_told_otherwise(tmp_path):
    for steps, shown in ((12, 12), (13, 7), (24, 12)):
        assert len(cells(report(write_run(tmp_path / "run", steps, ended=False)))) == 2 + shown


def test_a_report_is_the_table_and_then_the_summary_of_a_run_that_has_ended(tmp_path):
    ended = report(write_run(tmp_path / "ended", 9, ended=True))
    running = report(write_run(tmp_path / "running", 9, ended=False))
    assert ended == running + "\n\nstored_bytes: 42\ndata: d.jsonl"


def test_the_last_of_two_evaluations_of_one_step_counts_and_one_without_its_step_is_not_shown(tmp_path):
    step = {"step": 1, "loss": 1.0, "lr": 1e-3, "tokens_per_second": 5.0}
    twice = [step, {"step": 1, "eval_loss": 2.0}, {"step": 1, "eval_loss": 3.0}, {"step": 2, "eval_loss": 4.0}]
    assert cells(report(write_metrics(tmp_path, twice)))[2:] == [["1-1", "1.000", "3.000", "1.00e-03", "5"]]


def test_a_run_without_steps_and_a_folder_without_a_run(tmp_path):
    assert report(write_metrics(tmp_path, [])) == f"{tmp_path}: no step done yet"
    assert "no step done yet" in report(write_metrics(tmp_path, [{"step": 1, "eval_loss": 1.0}]))
    with pytest.raises(esft.InputError, match=r"absent: not a run folder \(no metrics.jsonl\)"):
        report(tmp_path / "absent")
    write_run(tmp_path / "run", 3, ended=True)
    (tmp_path / "run" / "summary.json").write_text("[]")
    with pytest.raises(esft.InputError, match="run/summary.json: not a run's summary"):
        report(tmp_path / "run")


def test_a_table_lines_up():
    assert table([{"a": 1234, "bb": 0.5}, {"bb": "x", "a": None}]).splitlines() == [
        "| a     | bb    |",
        "|-------|-------|",
        "| 1,234 | 0.500 |",
        "| None  | x     |",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss", "x"), ("loss", None), ("lr", [1]), ("tokens_per_second", True), ("eval_loss", {}), ("loss", 10**301)],
)
def test_a_figure_that_is_no_number_is_named_with_its_line(tmp_path, name: str, value: object):
    step = {"step": 1, "loss": 1.0, "lr": 1e-3, "tokens_per_second": 5.0}
    write_metrics(tmp_path, [step, step | {name: value}])
    with pytest.raises(esft.InputError, match=rf"metrics\.jsonl: line 2: {name} is .*, no number$"):
        report(tmp_path)


def test_a_summary_is_shown_in_short(tmp_path):
    write_run(tmp_path / "run", 1, ended=False)
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"data": "d" * 200, "deep": [[[[[[[[1]]]]]]]], "n": 1.5}))
    last = report(tmp_path / "run").splitlines()[-3:]
    assert last[0] == "data: " + "d" * 200 and len(last[1]) < 100 and last[2] == "n: 1.5"


def test_what_a_summary_holds_takes_no_line_of_its_own(tmp_path):
    write_run(tmp_path, 1, ended=False)
    scores = {"eval_loss\nsteps: 9": 1.0, "eval_\x1b[2J": 2.0}
    values = {"data": "d\nsteps: 9", "mo\ndel": "m\x1b[2J", "before": scores, "after": scores}
    (tmp_path / "summary.json").write_text(json.dumps(values))
    text = report(tmp_path)
    assert all(line.isprintable() for line in text.splitlines())
    assert not any(line.startswith(("steps: 9", "del")) for line in text.splitlines())
    assert text.splitlines()[-2:] == [r"data: 'd\nsteps: 9'", r"'mo\ndel': 'm\x1b[2J'"]


def test_every_figure_of_evaluation_data_has_its_column_and_what_came_before_the_first_step_has_no_row(tmp_path):
    step = {"loss": 1.0, "lr": 1e-3, "tokens_per_second": 5.0}
    lines = [
        {"step": 0, "eval_a_loss": 9.0, "eval_b_chrf": 1.0},
        {"step": 1} | step,
        {"step": 1, "eval_a_loss": 2.0, "eval_b_chrf": 50.0},
        {"step": 2} | step,
    ]
    names, _, *rows = cells(report(write_metrics(tmp_path, lines)))
    assert names == ["steps", "loss", "eval a_loss", "eval b_chrf", "lr", "tokens/s"]
    assert rows == [["1-1", "1.000", "2.000", "50.000", "1.00e-03", "5"], ["2-2", "1.000", "", "", "1.00e-03", "5"]]
    write_metrics(tmp_path, lines[1::2])
    assert cells(report(tmp_path))[0] == ["steps", "loss", "lr", "tokens/s"]


def test_the_scores_of_a_run_that_has_ended_are_told_before_and_after(tmp_path):
    write_run(tmp_path, 1, ended=False)
    scores = {"before": {"eval_loss": 3.5}, "after": {"eval_loss": 0.25, "eval_chrf": 90.0}}
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 1} | scores))
    _, table, rest = report(tmp_path).split("\n\n")
    assert table == scores_table(scores["before"], scores["after"])
    assert cells(table) == [["score", "before", "after"], ["-" * 11, "-" * 8, "-" * 8]] + [
        ["eval loss", "3.500", "0.250"],
        ["eval chrf", "", "90.000"],
    ]
    assert rest == "steps: 1"
    (tmp_path / "summary.json").write_text(json.dumps({"before": {}, "after": [1], "n": 1}))
    assert report(tmp_path).endswith("\n\nbefore: {}\nafter: [1]\nn: 1")
