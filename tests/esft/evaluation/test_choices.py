import math
import random
from dataclasses import replace

import pytest
import torch

import esft
from esft.data.records import Record
from esft.evaluation import choices
from esft.evaluation.choices import candidates, choose
from tests.esft.models import chat, tiny_encoder, tiny_model, tiny_tokenizer

CHOICES = ["yes", "not", "may"]


def asked(prompt: str, expected: str = "not") -> Record:
    return Record([*chat("before", "it"), *chat(prompt, expected)], choices=CHOICES, place="line 7")


@torch.no_grad()
def likelihood(model, prompt: str, answer: str) -> float:
    """Of an answer with its end marker, token by token."""
    ids = [256]
    for role, text in ((259, "before"), (260, "it"), (259, prompt)):
        ids += [role, *tiny_tokenizer()(text)["input_ids"], 257]
    ids.append(260)
    total = 0.0
    for token in [*tiny_tokenizer()(answer)["input_ids"], 257]:
        total += float(model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
        ids.append(token)
    return total


def test_the_likeliest_choice_is_chosen_whatever_is_expected():
    model, draw = tiny_model(), random.Random(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    words = [["".join(draw.choices("abcdefgh", k=3)) for _ in range(3)] for _ in range(6)]
    records = [replace(asked(f"what {i}", choices[0]), choices=choices) for i, choices in enumerate(words)]
    expected = [
        max(choices, key=lambda choice, i=i: likelihood(model, f"what {i}", choice)) for i, choices in enumerate(words)
    ]
    assert len({choices.index(best) for choices, best in zip(words, expected, strict=True)}) > 1
    assert choose(model.train(), tiny_encoder(), records) == expected
    assert not model.training


def test_of_choices_of_unlike_lengths_that_one_is_chosen_whose_whole_text_is_likeliest():
    """Not whose tokens are, in the mean: that would favour long ones."""
    model, draw = tiny_model(), random.Random(0)
    words = [["".join(draw.choices("abcdefgh", k=length)) for length in (2, 9)] for _ in range(6)]
    whole = [{choice: likelihood(model, f"what {i}", choice) for choice in each} for i, each in enumerate(words)]
    best = [max(each, key=lambda choice, each=each: each[choice]) for each in whole]
    a_token = [max(each, key=lambda choice, each=each: each[choice] / (len(choice) + 1)) for each in whole]
    records = [replace(asked(f"what {i}", choices[0]), choices=choices) for i, choices in enumerate(words)]
    assert choose(model, tiny_encoder(), records) == best != a_token


def test_of_a_text_the_choices_go_on_with_its_prompt():
    record = Record(text="is it? no", prompt=7, choices=["yes", "no"])
    assert [(each.text, each.prompt) for each in candidates(record)] == [("is it? yes", 7), ("is it? no", 7)]
    assert choose(tiny_model(), tiny_encoder(), [record])[0] in ("yes", "no")


def test_a_bar_is_shown_where_it_is_asked_for(capsys):
    choose(tiny_model(), tiny_encoder(), [asked("a")])
    assert not capsys.readouterr().err
    choose(tiny_model(), tiny_encoder(), [asked("a")], progress=True)
    assert "choose: 100%" in capsys.readouterr().err


def test_a_record_without_choices_or_whose_answer_is_none_of_them_is_named():
    for record, message in (
        (Record(chat("a", "b"), place="line 2"), "line 2: has no choices"),
        (asked("a", "maybe"), "line 7: the expected answer is none of the choices"),
    ):
        with pytest.raises(esft.InputError, match=f"^{message}"):
            candidates(record)


def test_likelihoods_that_are_no_numbers_are_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(esft.InputError, match="^line 7: the likelihoods are no numbers"):
        choose(model, tiny_encoder(), [asked("a")])


def test_one_likelihood_that_is_no_number_is_enough(monkeypatch):
    losses = iter([1.0, math.nan, 2.0])
    monkeypatch.setattr(choices, "batch_loss", lambda *_: (torch.tensor(next(losses)), 1))
    with pytest.raises(esft.InputError, match="^line 7: the likelihoods are no numbers"):
        choose(tiny_model(), tiny_encoder(), [asked("a")])
