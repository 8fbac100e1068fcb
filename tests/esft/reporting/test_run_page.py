import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import esft
from esft.reporting.page import check_page
from esft.reporting.run_page import Beside, write_run_page
from esft.selection import ExpertSelection
from esft.storage.files import write_json, write_yaml
from tests.esft.reporting.pages import AFTER, SCORES, Element, make_run, read_page, write_evaluation
from tests.esft.small_runs import run, settings

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


def page(run: Path, **beside) -> Element:
    out = run.parent / "page.html"
    write_run_page(run, out, Beside(**beside))
    check_page(out)
    return read_page(out)


def facts(found: Element) -> dict[str, str]:
    cards = found.one("dl", **{"class": "facts"})
    return {dt.text: dd.text for dt, dd in zip(cards.all("dt"), cards.all("dd"), strict=True)}


def section(found: Element, id: str) -> Element:
    return found.one("section", id=id)


def sections(found: Element) -> list[str]:
    return [each.attributes["id"] for each in found.all("section")]


@pytest.fixture
def files(tmp_path):
    """Every file that a page may be given beside the run."""
    SCORES.save(tmp_path / "s.json")
    AFTER.save(tmp_path / "t.json")
    write_evaluation(tmp_path / "b.json", ("one", "1", "2"), ("two", "2", "2"), ("three", "3", "4"), loss=2.0)
    write_evaluation(tmp_path / "a.json", ("one", "1", "1"), ("two", "2", "9"), ("three", "3", "5"), loss=0.5)
    return {
        "scores": tmp_path / "s.json", "scores_after": tmp_path / "t.json", "eval_before": tmp_path / "b.json",
        "eval_after": tmp_path / "a.json",
    }  # fmt: skip


def test_a_page_begins_with_what_a_reader_asks_first(tmp_path, files):
    found = page(make_run(tmp_path / "run"), **files)
    assert found.one("title").text == "Run run"
    assert facts(found) == {
        "method": "esft", "steps": "4 of 4", "loss, last steps": "1.25", "eval loss, last": "2.5",
        "trained parameters": "300", "stored": "600 bytes", "time": "1 min 5 s", "peak memory": "2.5 GB",
        "loss, before \u2192 after": "2 \u2192 0.5", "exact match, before \u2192 after": "0.3333 \u2192 0.3333",
    }  # fmt: skip
    assert sections(found) == ["choice", "course", "load", "answers", "sizes", "settings", "origin"]


def test_what_was_chosen_and_why(tmp_path, files):
    found = section(page(make_run(tmp_path / "run"), scores=files["scores"]), "choice")
    assert "3 of 8 routed experts in 2 layers train, and the shared experts of these layers." in found.text
    assert "esft select gives exactly this selection with:" in found.text
    assert [li.text for li in found.all("li")] == [
        "--by token --top-p P, for P above 0.5 and up to 0.7", "--by token --budget 3",
    ]  # fmt: skip
    assert f"Scores from {files['scores']}." in found.text
    table = found.one("table", **{"class": "sortable"})
    assert table.rows == [
        ["layer", "experts", "of all", "share of rows", "which, best first"],
        ["1", "2", "4", "80.0%", "2, 0"], ["3", "1", "4", "70.0%", "1"],
    ]  # fmt: skip
    assert [float(meter.attributes["value"]) for meter in table.all("meter")] == pytest.approx([0.8, 0.7])
    token, gate = found.all("table", **{"class": "heatmap"})
    assert token.rows == [["layer 1", "2", "0", "1", "3"], ["layer 3", "1", "0", "2", "3"]]
    chosen = [cell.text for cell in token.all("td") if "chosen" in cell.attributes["class"].split()]
    assert chosen == ["2", "0", "1"]
    first = token.all("td")[0].attributes
    assert first == {"class": "heat11 chosen", "data-rank": "1", "title": "layer 1, expert 2: 0.5, trains"}
    assert gate.rows[0] == ["layer 1", "1", "0", "2", "3"]
    assert "0.2346" in found.text  # the largest gate score, as figures are written


def test_a_choice_that_no_rule_gives_is_said_to_be_none(tmp_path, files):
    odd = make_run(tmp_path / "odd", selection=ExpertSelection({1: [3], 3: [0]}))
    text = section(page(odd, scores=files["scores"]), "choice").text
    assert "No single rule of esft select gives this selection" in text and "--by" not in text
    assert "2 of 8 routed experts in 2 layers train." in text


def test_how_the_manifest_says_it_was_chosen(tmp_path):
    made = make_run(tmp_path / "run")
    (made / "adapter").mkdir()
    write_json(made / "adapter" / "manifest.json", {"chosen_by": {"by": HOSTILE, "top_p": 0.2}})
    text = section(page(made), "choice").text
    assert f"as the adapter's manifest says: by {HOSTILE}, top_p 0.2." in text
    assert "No scores were given" in text


def test_every_figure_is_drawn_and_told_as_a_table(tmp_path):
    found = section(page(make_run(tmp_path / "run", more={"peak_memory": 5e9, "grad_norm": 0.5})), "course")
    assert [h3.text for h3 in found.all("h3")] == ["loss", "lr", "tokens per second", "peak memory", "grad norm"]
    assert len(found.all("picture")) == len(found.all("details")) == 5
    assert found.all("table")[0].rows == [
        ["steps", "loss", "eval_loss"], ["1", "3.5", ""], ["2", "3", "2.75"], ["3", "2.5", ""], ["4", "2", "2.5"],
    ]  # fmt: skip
    assert "eval_loss: 2.75 at step 2" in found.all("img")[0].attributes["alt"]


def test_the_overlap_with_other_runs(tmp_path, files):
    made = make_run(tmp_path / "run")
    other = make_run(tmp_path / "other", selection=ExpertSelection({1: [2, 3]}))
    lora = make_run(tmp_path / "lora", method="lora")
    elsewhere = make_run(tmp_path / "elsewhere")
    origin = json.loads((elsewhere / "origin.json").read_text())
    write_json(elsewhere / "origin.json", origin | {"digests": origin["digests"] | {"model": "m2"}})
    found = section(page(made, runs=[other, lora, elsewhere], scores=files["scores"]), "overlap")
    assert [h3.text for h3 in found.all("h3")] == ["other", "lora", "elsewhere"]
    assert "1 experts are chosen by both: of 3 here and 2 there; 1 would be by chance." in found.text
    assert found.all("table")[0].rows == [
        ["layer", "here", "there", "both", "by chance"], ["1", "2", "2", "1", "1"], ["3", "1", "0", "0", "0"],
    ]  # fmt: skip
    assert "method lora selects no experts" in found.text
    assert found.text.count("It was trained from another base") == 1


def test_the_load_before_and_after(tmp_path, files):
    made = make_run(tmp_path / "run")
    found = section(page(made, scores=files["scores"], scores_after=files["scores_after"]), "load")
    assert f"Before: {files['scores']}. After: {files['scores_after']}." in found.text
    assert found.one("table").rows[1:] == [
        ["1", "80.0%", "70.0%", "20.0%", "3 (+20.0 points)", "1 (-10.0 points)"],
        ["3", "70.0%", "80.0%", "10.0%", "1, trained (+10.0 points)", "0 (-10.0 points)"],
    ]
    alone = section(page(made, scores_after=files["scores_after"]), "load")
    assert alone.one("table").rows == [["layer", "on chosen, after"], ["1", "70.0%"], ["3", "80.0%"]]
    assert "Before:" not in alone.text
    same = section(page(made, scores=files["scores"], scores_after=files["scores"]), "load")
    assert same.one("table").rows[1] == ["1", "80.0%", "80.0%", "0.0%", "", ""]


def test_answers_before_and_after(tmp_path, files):
    made = make_run(tmp_path / "run")
    found = section(page(made, eval_before=files["eval_before"], eval_after=files["eval_after"]), "answers")
    assert found.one("table").rows == [
        ["figure", "before", "after"], ["records", "3", "3"], ["loss", "2", "0.5"], ["exact_match", "0.3333", "0.3333"],
    ]  # fmt: skip
    assert [h3.text for h3 in found.all("h3")] == ["right now: 1", "wrong now: 1", "still wrong: 1"]
    assert [li.text for li in found.all("li")] == [
        "prompt one expected 1 before: wrong \u2717 2 after: right \u2713",
        "prompt two expected 2 before: right \u2713 after: wrong \u2717 9",
        "prompt three expected 3 before: wrong \u2717 4 after: wrong \u2717 5",
    ]
    alone = section(page(made, eval_after=files["eval_after"]), "answers")
    assert [h3.text for h3 in alone.all("h3")] == ["wrong: 2", "right: 1"]
    assert alone.one("table").rows[2] == ["loss", "", "0.5"] and "Before:" not in alone.text


def test_of_many_answers_the_first_are_shown(tmp_path):
    write_evaluation(tmp_path / "a.json", *((f"p{i}", "x", "y") for i in range(1234)))
    found = section(page(make_run(tmp_path / "run"), eval_after=tmp_path / "a.json"), "answers")
    assert found.one("h3").text == "wrong: 1,234, the first 5" and len(found.all("li")) == 5


def test_sizes_beside_full_fine_tuning(tmp_path):
    (tmp_path / "base").mkdir()
    save_file({"w": torch.zeros(1000, dtype=torch.bfloat16)}, tmp_path / "base" / "m.safetensors")
    model = str(tmp_path / "base")
    rows = section(page(make_run(tmp_path / "run", model=model)), "sizes").all("table")[0].rows
    assert rows[1:] == [
        ["trained parameters", "300", "1,000", "30.0%"], ["stored", "600 bytes", "2.0 kB", "30.0%"],
        ["AdamW's moments, computed", "2.4 kB", "8.0 kB", "30.0%"],
    ]  # fmt: skip
    light = make_run(tmp_path / "light", model=model, optimizer="adamw_8bit")
    assert section(page(light), "sizes").all("table")[0].rows[3][1:] == ["600 bytes", "2.0 kB", "30.0%"]
    away = section(page(make_run(tmp_path / "away", model="an/id")), "sizes")
    assert "The base an/id is no folder on this machine" in away.text
    assert ["train_loss", "1.25"] in away.one("table").rows


def test_settings_and_what_it_was_begun_with(tmp_path):
    found = page(make_run(tmp_path / "run", lr=3e-4))
    rows = section(found, "settings").one("table").rows
    assert ["lr", "0.0003", "no"] in rows and ["seed", "0", "yes"] in rows and ["steps", "4", "no"] in rows
    usual = section(page(make_run(tmp_path / "usual", method="full")), "settings").one("table").rows
    assert ["lr", "3e-05", "yes"] in usual and ["micro_batch_size", "none", "yes"] in usual
    origin = section(found, "origin").one("table").rows
    assert origin[:3] == [["what", "digest"], ["model", "m1"], ["data", "d1"]] and len(origin) == 5


@pytest.mark.parametrize(("method", "said"), [("full", "All parameters train"), ("lora", "Low-rank additions")])
def test_a_method_without_a_selection(tmp_path, files, method: str, said: str):
    found = page(make_run(tmp_path / "run", method=method), **files, runs=[make_run(tmp_path / "other")])
    assert said in section(found, "choice").text and "load" not in sections(found)
    assert f"so that {files['scores_after']} says nothing here" in section(found, "choice").text
    assert len(section(found, "choice").all("table", **{"class": "heatmap"})) == 2  # of the scores that are given
    assert f"method {method} selects no experts" in section(found, "overlap").text


def test_a_run_without_evaluation_and_one_that_has_not_ended(tmp_path):
    found = page(make_run(tmp_path / "run", evaluated=False))
    assert "eval loss, last" not in facts(found) and sections(found) == [
        "choice", "course", "sizes", "settings", "origin",
    ]  # fmt: skip
    going = page(make_run(tmp_path / "going", steps=3, ended=False))
    assert "This run has not ended: 3 of 4 steps are logged" in going.one("header").text
    assert facts(going)["loss, last step"] == "2.5" and "time" not in facts(going)
    assert "when the run has ended" in section(going, "sizes").text
    none = page(make_run(tmp_path / "none", steps=0, ended=False))
    assert "No step is logged yet." in section(none, "course").text


def test_what_files_say_is_text_and_nothing_else(tmp_path):
    made = make_run(tmp_path / "run", more={HOSTILE: 1.0, "$x_{": 2.0}, model=HOSTILE)
    named = tmp_path / "<b onclick=alert(1)>run"
    shutil.move(made, named)
    origin = json.loads((named / "origin.json").read_text())
    write_json(named / "origin.json", origin | {"data": HOSTILE, "digests": origin["digests"] | {HOSTILE: HOSTILE}})
    summary = json.loads((named / "summary.json").read_text())
    write_json(named / "summary.json", summary | {HOSTILE: {HOSTILE: 3.5}})
    write_evaluation(tmp_path / "e.json", (HOSTILE, HOSTILE, f"{HOSTILE}\ud800\x00"), (HOSTILE * 2, "x", "x"))
    SCORES.save(scores := tmp_path / f"{HOSTILE.replace('/', '')}.json")
    found = page(named, eval_after=tmp_path / "e.json", eval_before=tmp_path / "e.json", scores=scores, runs=[named])
    assert found.one("h1").text == "Run <b onclick=alert(1)>run"
    asked = [dd.text for dd in found.all("dd", **{"class": "asked"})]
    assert asked == [HOSTILE, HOSTILE * 2]
    assert [HOSTILE, HOSTILE] in section(found, "origin").one("table").rows
    assert len(found.all("script")) == 1 and not found.all("b")


def test_files_of_another_model_or_other_records_are_named_and_nothing_is_written(tmp_path, files):
    made = make_run(tmp_path / "run", selection=ExpertSelection({1: [9]}))
    wrong = [
        ({"scores": files["scores"]}, r"s\.json: scores of another model: has no expert 9 of layer 1"),
        ({"scores_after": files["scores_after"]}, r"t\.json: scores of another model"),
        ({"eval_before": files["scores"]}, r"s\.json: not an outcome of esft eval"),
        ({"runs": [tmp_path]}, "not the folder of a run that has begun"),
    ]
    for beside, said in wrong:
        with pytest.raises(esft.InputError, match=said):
            write_run_page(made, tmp_path / "page.html", Beside(**beside))
    write_evaluation(tmp_path / "b.json", ("other", "1", "2"))
    with pytest.raises(esft.InputError, match=r"a\.json: the evaluations before and after are not of the same records"):
        write_run_page(
            made, tmp_path / "page.html", Beside(eval_before=tmp_path / "b.json", eval_after=files["eval_after"])
        )
    assert not (tmp_path / "page.html").exists()


def test_the_page_of_what_a_training_leaves(base, out):
    run(base, "run", settings(steps=3, eval_every=1))
    found = page(out)
    assert facts(found)["steps"] == "3 of 3" and "3 routed experts in 2 layers train" in section(found, "choice").text
    (trained, stored, _) = section(found, "sizes").all("table")[0].rows[1:]
    assert trained[0] == "trained parameters" and 0 < float(trained[3][:-1]) < 100
    assert section(found, "course").all("table")[0].rows[0][:2] == ["steps", "loss"]
    write_yaml(out / "config.yaml", {"method": "esft", "nonsense": 1})
    with pytest.raises(esft.InputError, match=r"config\.yaml: line 2: no setting 'nonsense'"):
        page(out)
