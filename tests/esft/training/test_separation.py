"""No document sees another in its row, or the model is refused: tried with every family."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import esft
from esft.data.batches import collate
from esft.data.examples import Example, joined
from esft.evaluation.loss import batch_loss
from esft.training.separation import check_separates
from tests.esft import zoo
from tests.esft.models import FAMILIES, tiny_model

LENGTH = 12
# With inputs of several kinds, or without a head for text: not what is trained here.
OTHERS = ["qwen3_omni_moe:Qwen3OmniMoeTalkerTextExperts"]


def hidden(model, ids: torch.Tensor, documents: int = 2) -> torch.Tensor:
    positions = torch.arange(ids.shape[1] // documents).repeat(documents)[None]
    with torch.no_grad():
        return model.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0]


def leak(model) -> float:
    """How much the second document changes with the first, as a share of its largest value."""
    ids = zoo.tokens(1, 2 * LENGTH)
    other = torch.cat([ids[:, :LENGTH].flip(1), ids[:, LENGTH:]], dim=1)
    one, two = (hidden(model, each)[:, LENGTH:] for each in (ids, other))
    return float((one - two).abs().max() / one.abs().max())


@pytest.mark.parametrize("family", [family for family in zoo.families() if family not in OTHERS])
def test_a_family_is_refused_just_where_a_document_changes_with_the_one_before_it(family: str):
    model = zoo.tiny(family)
    found = leak(model)
    assert found < 1e-5 or found > 1e-2  # rounding, or no doubt
    if found < 1e-5:
        check_separates(model)
        return
    kind = model.config.get_text_config().model_type
    with pytest.raises(esft.InputError, match=f"^packing: the documents .* would see each other in a {kind} model"):
        check_separates(model)


@pytest.mark.parametrize(
    ("family", "settings", "separates"),
    [
        ("olmoe", {}, True),  # every token sees all before it
        ("mixtral", {"sliding_window": 4}, True),  # the last four
        ("mimo_v2_flash", {}, True),  # layers of both kinds
        ("qwen3_next", {}, False),  # linear attention, and full
        ("granitemoehybrid", {}, False),  # a state space, and attention
        ("lfm2_moe", {}, False),  # short convolutions, and attention
    ],
)
def test_what_separates_documents_is_attention(family: str, settings: dict, separates: bool):
    assert (leak(zoo.tiny(family, **settings)) < 1e-5) == separates


def test_the_model_is_left_as_it_was_and_tried_out_once(monkeypatch):
    model, calls = tiny_model(attention_dropout=0.5).train(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        check_separates(model)
    assert len(calls) == 2 and model.training
    check_separates(resting := tiny_model())
    assert not resting.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_takes_no_positions_is_refused(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model.model, "forward", lambda input_ids, use_cache: None)
    with pytest.raises(esft.InputError, match=r"^packing: a deepseek_v2 model takes no positions of documents \("):
        check_separates(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_a_row_have_the_loss_and_the_gradients_that_they_have_each_alone(family: str):
    model = tiny_model(family)
    drawn = [torch.randint(0, 256, (n,)).tolist() for n in (5, 9, 3, 7)]
    examples = [Example(ids, ids) for ids in drawn]
    found = []
    for rows in (examples, [joined(examples[:3]), examples[3]], [joined(examples)]):
        total, count = batch_loss(model, collate(rows, 258))
        total.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((total, count, gradients))
        model.zero_grad()
    for total, count, gradients in found[1:]:
        assert count == found[0][1] == 20
        torch.testing.assert_close(total, found[0][0], rtol=1e-5, atol=1e-5)
        for one, other in zip(gradients, found[0][2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


class Toy(nn.Module):
    """Embeddings, and of the second document the tokens ``seen`` get what lies in the first, without a gradient."""

    def __init__(self, seen: slice, vocabulary: int = 300):
        super().__init__()
        self.embed, self.seen, self.device = nn.Embedding(vocabulary, 8), seen, torch.device("cpu")
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type="toy"))
        self.tried: list[torch.Tensor] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def base_model(self, input_ids, position_ids, use_cache):
        self.tried += [input_ids, position_ids]
        out = self.embed(input_ids)
        with torch.no_grad():
            other = torch.zeros_like(out)
            other[:, LENGTH:][:, self.seen] = out[:, :1] * 10
        return SimpleNamespace(last_hidden_state=out + other)


def test_what_is_seen_without_a_gradient_is_told_by_what_comes_out():
    with pytest.raises(esft.InputError, match="^packing: the documents of a row would see each other in a toy model"):
        check_separates(Toy(slice(None)))


@pytest.mark.parametrize(
    "out_of",
    [lambda embedded: embedded + 1e-4 * embedded[:, :1], lambda embedded: 0 * embedded + embedded.detach()],
    ids=["of one token", "of none, not even its own"],
)
def test_a_gradient_of_one_token_is_enough_and_one_that_is_nowhere_says_nothing(out_of):
    class Other(Toy):
        def base_model(self, input_ids, position_ids, use_cache):
            return SimpleNamespace(last_hidden_state=out_of(self.embed(input_ids)))

    with pytest.raises(esft.InputError, match="^packing: the documents of a row would see each other in a toy model"):
        check_separates(Other(slice(0, 0)))


def test_a_few_tokens_that_come_out_otherwise_are_a_routers_choice():
    for seen in (slice(0, 0), slice(0, 1), slice(3, 8)):
        check_separates(Toy(seen))
    with pytest.raises(esft.InputError, match="would see each other"):
        check_separates(Toy(slice(3, 11)))


def test_a_row_of_two_documents_of_twelve_known_tokens_is_tried():
    for vocabulary in (5, 300):
        toy = Toy(slice(0, 0), vocabulary)
        check_separates(toy)
        first, positions, second, again = toy.tried
        assert positions.tolist() == again.tolist() == [[*range(12), *range(12)]]
        for ids in (first, second):
            assert ids.shape == (1, 24) and ids.min() >= 0 and ids.max() < vocabulary
        assert torch.equal(first[:, 12:], second[:, 12:]) and not torch.equal(first[:, :12], second[:, :12])


def test_it_is_tried_where_the_model_is():
    model, seen = tiny_model().to("meta"), []

    def look(_, args: tuple, given: dict) -> None:
        seen.extend(given[name].device.type for name in ("input_ids", "position_ids"))

    model.model.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(esft.InputError):  # there are no values to look at
        check_separates(model)
    assert seen == ["meta", "meta"]
