import json

import pytest
import torch

import esft
from esft.experts.model_state import model_state
from esft.selection import ExpertSelection
from tests.esft.models import tiny_model


@pytest.mark.parametrize(("shared", "others"), [(False, False), (True, False), (False, True)])
def test_selection_files_have_the_published_layout_and_round_trip(tmp_path, shared: bool, others: bool):
    selection = ExpertSelection({10: [4, 2], 3: []}, shared, others, {"by": "token"})
    selection.save(tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text()) == {
        "experts": {"10": [4, 2], "3": []}, "shared_experts": shared, "non_expert_modules": others,
    }  # fmt: skip
    again = ExpertSelection.load(tmp_path / "e.json")
    assert again == selection  # how it was chosen is no part of it
    assert again.chosen_by == {}
    assert list(again.experts) == [10, 3]


def test_what_a_file_does_not_name_does_not_train(tmp_path):
    (tmp_path / "e.json").write_text('{"experts": {"0": [7, 0]}}')
    assert ExpertSelection.load(tmp_path / "e.json") == ExpertSelection({0: [7, 0]}, False, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not JSON"),
        ("[]", "not an expert selection"),
        ("{}", "not an expert selection"),
        ('{"experts": [1]}', "not an expert selection"),
        ('{"experts": {"x": [1]}}', "'x' is not a layer's number"),
        ('{"experts": {"-1": [1]}}', "'-1' is not a layer's number"),
        ('{"experts": {"01": [2]}}', "'01' is not a layer's number"),
        ('{"experts": {"1": [0]}, "shared_expert": true}', r"'shared_expert' \(is 'shared_experts' meant\?\)"),
        ('{"experts": {"1": [0]}, "q": true}', "part 'q'; there are experts, shared_experts, non_expert_modules"),
        ('{"experts": {"1": [0], "1": [1]}}', "has the key '1' twice"),
        ('{"experts": {"10000": [0]}}', "'10000' is not a layer's number"),
        ('{"experts": {"1%s": [0]}}' % ("0" * 5000), "is not a layer's number"),
        ('{"experts": {"1": [2, -3]}}', "layer 1 names an expert -3"),
        ('{"experts": {"1": [65536]}}', "layer 1 names an expert 65536"),
        ('{"experts": {"5": [], "1": [3, 2, 3]}}', r"layer 1 names an expert twice: \[3, 2, 3\]"),
        ('{"experts": {"5": [], "1": "27"}}', "the experts of layer 1 must be a list of whole numbers, got '27'"),
        ('{"experts": {"1": {}}}', "the experts of layer 1 must be a list of whole numbers, got {}"),
        ('{"experts": {"1": [2, 1.0]}}', r"the experts of layer 1 must be a list of whole numbers, got \[2, 1.0\]"),
        ('{"experts": {"1": [true]}}', r"the experts of layer 1 must be a list of whole numbers, got \[True\]"),
        ('{"experts": {}, "shared_experts": "false"}', "shared_experts must be true or false, got 'false'"),
        ('{"experts": {}, "non_expert_modules": 1}', "non_expert_modules must be true or false, got 1"),
        ('{"experts": {}, "non_expert_modules": null}', "non_expert_modules must be true or false, got None"),
    ],
)
def test_a_file_that_holds_no_selection_is_refused_by_name(tmp_path, text: str, message: str):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(esft.InputError, match=f"e.json: .*{message}"):
        ExpertSelection.load(tmp_path / "e.json")


@pytest.mark.parametrize("experts", [{}, {1: []}, {1: [0, 7], 2: [0]}, {2: (3, 1, 2, 0)}])
def test_a_selection_of_experts_that_exist_fits(experts):
    ExpertSelection(experts).check({1: 8, 2: 4}, shared_experts=False)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({0: [1]}, r"selection names layer 0; the model's MoE layers are \[1, 2\]"),
        ({1: [7], 3: []}, r"selection names layer 3; the model's MoE layers are \[1, 2\]"),
        ({1: [1], 2: [3, 1, 3]}, r"selection names an expert of layer 2 twice: \[3, 1, 3\]"),
        ({2: [3, 4, 0, 7]}, r"selection names experts \[4, 7\] of layer 2, which has 4 experts"),
        ({1: [0, -1]}, r"selection names experts \[-1\] of layer 1, which has 8 experts"),
        ({1: {5}}, r"selected experts of layer 1 must be a list of whole numbers, got \{5\}"),
    ],
)
def test_a_selection_of_experts_that_do_not_exist_is_refused(experts, message: str):
    with pytest.raises(esft.InputError, match=message):
        ExpertSelection(experts).check({2: 4, 1: 8}, shared_experts=True)


def test_a_selection_is_empty_only_where_nothing_trains():
    assert ExpertSelection({}).is_empty and ExpertSelection({1: [], 2: []}).is_empty
    assert not ExpertSelection({1: [], 2: [0]}).is_empty
    assert not ExpertSelection({}, shared_experts=True).is_empty
    assert not ExpertSelection({}, non_expert_modules=True).is_empty


def test_a_selection_counts_its_experts_and_shows_them_as_json():
    selection = ExpertSelection({1: [5, 2], 3: [], 2: [0]})
    assert selection.num_experts == 3
    assert str(selection) == '{"1": [5, 2], "3": [], "2": [0]}'


@pytest.mark.parametrize(
    ("experts", "value"),
    [
        ({1: [5.0]}, r"\[5.0\]"),
        ({1: [True]}, r"\[True\]"),
        ({1: 2}, "got 2"),
        ({1: "5"}, "got '5'"),
        ({1: ["a"]}, r"\['a'\]"),
        ({1: torch.tensor([5])}, r"tensor\(\[5\]\)"),
        ({1: [torch.tensor(5)]}, r"tensor\(5\)"),
        ({1.0: [5]}, "layers must be whole numbers, got 1.0"),
        ({True: [5]}, "layers must be whole numbers, got True"),
        ([5], r"got \[5\]"),
    ],
)
def test_a_selection_of_anything_but_whole_numbers_is_refused_with_the_model_untouched(experts, value: str):
    model = tiny_model()
    with pytest.raises(esft.InputError, match=value):
        esft.swap(model, ExpertSelection(experts))
    assert model_state(model).swapped is None
    assert all(p.requires_grad for p in model.parameters())


def test_shared_experts_are_there_or_are_not_selected():
    both = ExpertSelection({}, shared_experts=True)
    both.check({1: 8}, shared_experts=True)
    ExpertSelection({}).check({1: 8}, shared_experts=False)
    with pytest.raises(esft.InputError, match="^selection names shared experts; the model has none$"):
        both.check({1: 8}, shared_experts=False)
