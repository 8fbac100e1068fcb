"""Compiled layers compute what the plain ones compute, and are compiled for all lengths once."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import esft
from esft.errors import InputError
from esft.training import compiled_layers
from esft.training.compiled_layers import compile_layers
from tests.esft import zoo
from tests.esft.models import tiny_model
from tests.esft.small_runs import column, run, settings


@pytest.fixture
def graphs(monkeypatch):
    """A stand-in for the compiler that runs what was traced, and counts how often it is asked to compile."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiled_layers, "BACKEND", counter)
    yield counter
    torch._dynamo.reset()


def step(model: nn.Module, length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of some tokens, and every gradient."""
    ids = zoo.tokens(2, length)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def both(model: nn.Module, length: int, plain) -> None:
    loss, gradients = step(model, length)
    torch.testing.assert_close(loss, plain[0], rtol=1e-5, atol=1e-6)
    assert gradients.keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "remade"), [("deepseek_v2", False), ("olmoe", False), ("qwen3_moe", False), ("deepseek_v2", True)]
)
def test_loss_and_gradients_are_those_of_the_plain_layers_at_all_lengths(family: str, remade: bool, graphs):
    model = esft.swap(tiny_model(family), esft.ExpertSelection({1: [0, 2]})).train()
    if remade:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    names = list(model.state_dict())
    lengths = (7, 9, 12, 5)
    plain = {length: step(model, length) for length in lengths}
    compile_layers(model)
    assert list(model.state_dict()) == names
    asked = []
    for length in lengths:
        both(model, length, plain[length])
        asked.append(graphs.frame_count)
    assert asked[0] > 1 and asked[1] == asked[2] == asked[3]  # one is the trial whether anything can be compiled


def test_many_layers_are_compiled_as_few_graphs(graphs):
    found = []
    for layers in (3, 5):
        torch._dynamo.reset()
        graphs.frame_count = 0
        model = esft.swap(tiny_model("deepseek_v2", num_hidden_layers=layers), esft.ExpertSelection({1: [0, 2]}))
        plain = step(model.train(), 7)
        compile_layers(model)
        both(model, 7, plain)
        found.append(graphs.frame_count)
    assert found[0] == found[1] > 1


@pytest.mark.parametrize("how", [{"frozen": "int8"}, {"recompute": "frozen"}])
def test_experts_in_few_bits_or_made_again_are_left_as_they_are(how: dict, graphs):
    model = esft.swap(tiny_model("olmoe", num_hidden_layers=2), esft.ExpertSelection({1: [0, 2]}), **how).train()
    plain = step(model, 9)
    compile_layers(model)
    both(model, 9, plain)


def test_the_compilers_own_code_computes_the_same():
    model = esft.swap(tiny_model("olmoe", num_hidden_layers=1), esft.ExpertSelection({0: [1]})).train()
    plain = step(model, 9)
    compile_layers(model)
    both(model, 9, plain)


def test_a_training_is_compiled_and_its_evaluations_are_not(base, graphs):
    run(base, "plain", settings(steps=3))
    run(base, "compiled", settings(steps=3, compile=True))
    with_evaluation = graphs.frame_count
    losses = [column(base.parent / out, "loss") for out in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch._dynamo.reset()
    run(base, "alone", settings(steps=3, compile=True), eval_data=None)
    assert graphs.frame_count == 2 * with_evaluation > 2


def test_what_cannot_be_compiled_is_told_in_one_line(monkeypatch):
    model = tiny_model("olmoe")

    def refuses(graph, inputs):
        raise ValueError("no compiler was found")

    torch._dynamo.reset()
    monkeypatch.setattr(compiled_layers, "BACKEND", refuses)
    with pytest.raises(InputError, match="^compile: torch.compile does not work here: .*no compiler was found$"):
        compile_layers(model)
    with pytest.raises(InputError, match="^compile: Linear has no layers"):
        compile_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(("said", "told"), [("", r"RuntimeError\(\)"), ("first\nsecond", "first")])
def test_a_compiler_that_says_little_is_told_too(monkeypatch, said: str, told: str):
    def refuses(*_, **__):
        raise RuntimeError(said) if said else RuntimeError()

    monkeypatch.setattr(torch, "compile", refuses)
    with pytest.raises(InputError, match=f"^compile: torch.compile does not work here: {told}$"):
        compile_layers(tiny_model("olmoe"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"aux_loss": 0.1}, "compile and aux_loss 0.1 do not go together"),
        ({"shard": "frozen"}, "compile and shard frozen do not go together"),
        ({"method": "lora"}, "compile goes with the methods esft and full, not with lora"),
    ],
)
def test_what_does_not_go_together_is_refused(other: dict, message: str):
    with pytest.raises(InputError, match=f"^{message}$"):
        settings(compile=True, **other)
