"""The Home Assistant task: its splits share nothing, its answers are right, and a seed fixes it all."""

import json

import pytest

pytest.importorskip("hassil", reason="the Home Assistant task needs the optional package hassil")
pytest.importorskip("home_assistant_intents", reason="the Home Assistant task needs home-assistant-intents")

from examples import home_assistant
from examples.home_grammar import Recogniser, load_intents, read_templates
from examples.home_names import Home

SIZES = {"train": 600, "validation": 40, "test": 60}
SMALL = ["--train", "60", "--validation", "10", "--test", "10"]


@pytest.fixture(scope="module")
def built():
    return home_assistant.build(SIZES, seed=0)


@pytest.fixture(scope="module")
def intents():
    return load_intents()


def test_sizes_are_as_asked(built):
    draws, _, _ = built
    assert {split: len(draw.examples) for split, draw in draws.items()} == SIZES


def test_templates_and_wordings_are_disjoint(built):
    draws, given, _ = built
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        keys = [{(template.intent, template.text) for template in given[split]} for split in (a, b)]
        assert not keys[0] & keys[1]
        assert not {e.user for e in draws[a].examples} & {e.user for e in draws[b].examples}
        assert not draws[a].wordings & draws[b].wordings  # skeletons too: not the same words around other names


def test_what_is_held_out_can_be_learned(built):
    draws, given, _ = built
    taught = {template.group for template in draws["train"].templates}
    assert len(given["test"]) > 20
    assert all(template.group in taught for split in ("validation", "test") for template in given[split])


def test_split_is_by_intent_and_about_a_tenth(intents):
    templates = read_templates(intents)
    splits = home_assistant.split_templates(templates, seed=1)
    assert sum(map(len, splits.values())) == len(templates)
    assert 0.08 < len(splits["test"]) / len(templates) < 0.13
    assert {t.intent for t in splits["test"]} <= {t.intent for t in splits["train"]}


def test_answers_are_json_with_the_spoken_values(built, intents):
    for draw in built[0].values():
        for command, text in draw.examples:
            answer = json.loads(text)
            assert set(answer) == {"intent", "slots"} and answer["intent"] in intents.intents
            assert len(command) < home_assistant.MAX_COMMAND
            assert text == json.dumps(answer, sort_keys=True)
            for slot in {"name", "area", "floor", "item", "search_query"} & set(answer["slots"]):
                assert answer["slots"][slot] in command


def test_half_of_the_held_out_names_are_new(built):
    draws, _, _ = built
    train = Home(0).parts["area"]["train"]
    areas = [json.loads(e.assistant)["slots"].get("area") for e in draws["test"].examples]
    new = [area not in train for area in areas if area]
    assert 0.2 < sum(new) / len(new) < 0.8
    shown = [json.loads(e.assistant)["slots"].get("area") for e in draws["train"].examples]
    assert all(area in train for area in shown if area)


@pytest.mark.parametrize(
    ("command", "intent", "slots"),
    [
        ("turn on all the lights in the kitchen", "HassTurnOn", {"area": "kitchen", "domain": "light"}),
        ("oak lantern brightness to 21%", "HassLightSet", {"name": "oak lantern", "brightness": 21}),
        ("volume down 30", "HassSetVolumeRelative", {"volume_step": -30}),
        ("set brightness to thirty percent", "HassLightSet", {"brightness": 30, "domain": "light"}),
        ("close the blinds in the den", "HassTurnOff", {"area": "den", "device_class": "blind", "domain": "cover"}),
    ],
)
def test_recogniser_reads_known_commands(intents, command, intent, slots):
    assert json.loads(Recogniser(intents, Home(0)).answer(command)) == {"intent": intent, "slots": slots}


def test_records_agree_with_a_recogniser_of_their_own(built, intents):
    reader = Recogniser(intents, Home(0))
    for command, answer in built[0]["test"].examples[:40]:
        assert reader.answer(command) == answer


def test_same_seed_same_files(tmp_path, capsys):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        home_assistant.main(["--out", str(tmp_path / name), "--seed", str(seed), *SMALL])
    assert "HassTurnOn" in capsys.readouterr().out
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"]
    assert set(files[0]) == {"train.jsonl", "validation.jsonl", "test.jsonl"}  # and no temporary file
    assert files[0] == files[1] != files[2]
    record = json.loads(files[0]["test.jsonl"].splitlines()[0])
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"]


def test_bad_arguments_are_one_line_and_write_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        home_assistant.main(["--out", str(tmp_path / "x"), "--test", "0"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--test: must be at least 1, got 0")
    assert not (tmp_path / "x").exists()
