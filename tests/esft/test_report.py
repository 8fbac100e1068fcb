import json

import pytest
from esft.report import plot_scores, read_metrics, report, table

import esft


def write_run(folder, steps: int, ended: bool):
    folder.mkdir()
    lines = [{"step": i + 1, "loss": 4.0 - i / 10, "lr": 1e-3, "tokens_per_second": 100.0} for i in range(steps)]
    lines.insert(2, {"step": 2, "eval_loss": 3.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ended:
        (folder / "summary.json").write_text('{"stored_bytes": 42}')
    return folder


def test_a_report_shows_every_step_once_and_the_summary(tmp_path):
    text = report(write_run(tmp_path / "run", 9, ended=True), rows=3)
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:5]] == ["1-3", "4-6", "7-9"]
    assert "3.900" in text and "3.500" in text
    assert "stored_bytes: 42" in text
    assert "stored_bytes" not in report(write_run(tmp_path / "other", 9, ended=False))


def test_a_run_without_steps_and_a_folder_without_a_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no step done yet" in report(tmp_path)
    with pytest.raises(esft.InputError, match="not a run folder"):
        report(tmp_path / "absent")
    for bad, message in (("{", "not JSON"), ("{}", "names no step"), ('{"step": 2, "loss": 1.0}', "without lr")):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + bad)
        with pytest.raises(esft.InputError, match=f"metrics.jsonl: line 2: .*{message}"):
            read_metrics(tmp_path)
    write_run(tmp_path / "run", 3, ended=True)
    (tmp_path / "run" / "summary.json").write_text("[]")
    with pytest.raises(esft.InputError, match="not a run's summary"):
        report(tmp_path / "run")


def test_a_table_lines_up():
    assert table([{"a": 1234, "bb": 0.5}, {"a": 1, "bb": "x"}]).splitlines() == [
        "| a     | bb    |",
        "|-------|-------|",
        "| 1,234 | 0.500 |",
        "| 1     | x     |",
    ]


def test_the_picture_is_a_png_that_marks_what_is_chosen(tmp_path):
    pytest.importorskip("matplotlib")
    scores = esft.ExpertScores({1: {0: 0.7, 1: 0.3}, 2: {0: 0.1, 1: 0.9}}, {})
    nothing, chosen = esft.ExpertSelection({}), esft.select_experts(scores, top_p=0.5)
    plain = plot_scores(scores, nothing, tmp_path / "a.png", "t").read_bytes()
    marked = plot_scores(scores, chosen, tmp_path / "b.png", "t").read_bytes()
    assert plain.startswith(b"\x89PNG") and marked.startswith(b"\x89PNG")
    assert plain != marked
