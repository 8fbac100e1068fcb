import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from esft.data.batches import collate
from esft.data.encoding import encode_all
from esft.data.examples import IGNORE, Example
from esft.evaluation.loss import batch_loss, has_plain_head, mean_loss, predictions
from esft.experts.model_state import model_state
from tests.esft import zoo
from tests.esft.models import record, tiny_encoder, tiny_model

PAD = 258
IDS = torch.tensor([[256, 4, 5]])


def examples():
    return encode_all(tiny_encoder(), [record("x" * n, "y" * (n + 1)) for n in range(1, 8)], "here")


def loss_of_logits(model, batch) -> tuple[torch.Tensor, int]:
    """From all logits at once, with the mask."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    per_token = F.cross_entropy(logits.float().transpose(1, 2), labels.clamp(min=0), reduction="none")
    return per_token[labels != IGNORE].sum(), int((labels != IGNORE).sum())


@torch.no_grad()
def test_mean_loss_equals_transformers_own_loss():
    model = tiny_model()
    losses = [loss_of_logits(model, collate([example], PAD)) for example in examples()]
    total, count = sum(float(loss) for loss, _ in losses), sum(count for _, count in losses)
    for batch_size in (1, 3, 100):
        assert mean_loss(model, examples(), PAD, batch_size) == pytest.approx(total / count, rel=1e-5)


def test_mean_loss_is_measured_and_left_in_evaluation_mode():
    """The dropout would change the loss in training mode."""
    model = tiny_model(attention_dropout=0.5)
    expected = mean_loss(tiny_model(), examples(), PAD)
    assert mean_loss(model.train(), examples(), PAD) == pytest.approx(expected, rel=1e-6)
    assert not any(module.training for module in model.modules())


def test_mean_loss_keeps_no_graph_and_nothing_has_no_loss():
    model, graphs = tiny_model(), []
    model.model.register_forward_hook(lambda module, args, out: graphs.append(out.last_hidden_state.requires_grad))
    mean_loss(model, examples(), PAD)
    assert graphs and not any(graphs)
    assert mean_loss(model, [], PAD) == 0.0


def test_mean_loss_takes_32_examples_at_a_time_unless_told(monkeypatch):
    rows = []
    counted = lambda model, batch: (rows.append(len(batch["labels"])) or torch.zeros(()), 1)  # noqa: E731
    monkeypatch.setattr("esft.evaluation.loss.batch_loss", counted)
    mean_loss(tiny_model(), [examples()[0]] * 70, PAD)
    assert rows == [32, 32, 6]


@pytest.mark.parametrize("plain", [True, False])
def test_a_batchs_loss_and_gradient_are_those_of_the_masked_logits(plain: bool):
    """Padding on the left is seen by the tokens after it unless it is masked."""
    model = tiny_model()
    if not plain:
        model.lm_head.register_forward_hook(lambda module, args, out: 0.5 * out)
    batch = collate(examples(), PAD, left=True)
    wanted, number = loss_of_logits(model, batch)
    (wanted_grad,) = torch.autograd.grad(wanted, model.lm_head.weight)
    loss, count = batch_loss(model, batch)
    (grad,) = torch.autograd.grad(loss, model.lm_head.weight)
    assert has_plain_head(model) is plain
    assert predictions(model, batch).vocabulary == 300
    assert count == number == sum(n + 2 for n in range(1, 8))  # n + 1 letters and the end marker
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plain", [True, False])
def test_a_batch_without_supervised_tokens_has_no_loss(plain: bool):
    model = tiny_model()
    model_state(model).found["_has_plain_head"] = plain
    loss, count = batch_loss(model, collate([Example([256, 4, 5], [IGNORE] * 3)], PAD))
    assert (float(loss), count) == (0.0, 0)


def test_a_plain_head_is_not_run_and_no_cache_is_kept():
    """What the head would make is logits of every position."""
    model, caches = tiny_model(), []
    model.model.register_forward_hook(lambda module, args, out: caches.append(out.past_key_values))
    assert has_plain_head(model)
    handle = model.lm_head.register_forward_hook(lambda *args: 1 / 0)
    batch = collate(examples(), PAD)
    batch_loss(model, batch)
    handle.remove()
    model_state(model).found["_has_plain_head"] = False
    batch_loss(model, batch)
    assert caches == [None] * 3


def test_a_head_is_tried_out_where_the_model_is():
    model = tiny_model().to("meta")
    model.model.register_forward_pre_hook(lambda _, __, given: 1 / given["input_ids"].is_cpu, with_kwargs=True)
    with pytest.raises(ZeroDivisionError):
        has_plain_head(model)


@pytest.mark.parametrize("plain", [True, False])
def test_a_batch_goes_where_the_model_is(monkeypatch, plain: bool):
    """The meta device stands for a GPU: it has no values, but what lies there and what does not is told apart."""
    places = []

    def note(*tensors, **_) -> torch.Tensor:
        places.extend(tensor.device.type for tensor in tensors)
        return torch.zeros(())

    def forward(input_ids, attention_mask, **_):
        note(input_ids, attention_mask)
        return MoeModelOutputWithPast(torch.empty(*input_ids.shape, 32, device="meta"))

    model = tiny_model().to("meta")
    model_state(model).found["_has_plain_head"] = plain
    model.model.forward = forward
    monkeypatch.setattr(f"esft.evaluation.loss.{'linear_cross_entropy' if plain else 'F.cross_entropy'}", note)
    batch_loss(model, collate(examples(), PAD))
    assert len(places) >= 4
    assert set(places) == {"meta"}


def test_logits_and_hidden_states_may_lie_elsewhere_than_the_inputs(monkeypatch):
    model, batch = tiny_model(), collate(examples(), PAD)
    expected, _ = loss_of_logits(model, batch)
    rows = model.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1][batch["labels"][:, 1:] != IGNORE]

    class Elsewhere:
        device = torch.device("meta")

        def __getitem__(self, places):
            assert {place.device.type for place in places} == {"meta"}
            return self

        def to(self, device):
            return rows.to(device)

    model_state(model).found["_has_plain_head"] = True
    hook = model.model.register_forward_hook(lambda module, args, out: setattr(out, "last_hidden_state", Elsewhere()))
    torch.testing.assert_close(batch_loss(model, batch)[0], expected, rtol=1e-5, atol=0)
    hook.remove()
    model_state(model).found["_has_plain_head"] = False
    model.lm_head.register_forward_hook(lambda module, args, out: out.to("meta"))
    monkeypatch.setattr(
        "esft.evaluation.loss.F.cross_entropy", lambda logits, labels, **_: (logits.device, labels.device)
    )
    assert [device.type for device in batch_loss(model, batch)[0]] == ["meta", "meta"]


def capped(cap: float | None):
    model = zoo.tiny("gemma4", final_logit_softcapping=cap).bfloat16()
    model.set_experts_implementation("eager")  # the default cannot take rows this short in bfloat16
    return model


@pytest.mark.parametrize("cap", [None, 30.0])
def test_in_bfloat16_a_cap_is_seen_though_the_logits_at_hand_are_far_below_it(cap: float | None):
    assert has_plain_head(capped(cap)) == (cap is None)


@pytest.mark.parametrize("cap", [None, 30.0])
def test_in_bfloat16_the_loss_is_that_of_the_models_own_logits(cap: float | None):
    model, ids = capped(cap), zoo.tokens()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        batch_loss(model, batch)  # what the model is taken for is settled now, before its logits grow
        model.get_output_embeddings().weight.mul_(50)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss, _ = batch_loss(model, batch)
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert loss == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        (lambda out: out + 1, False),
        (lambda out: out - 1, False),
        (lambda out: out * (1 + 4 * 2.0**-23), True),  # four units in the last place: rounding
        (lambda out: out * (1 + 32 * 2.0**-23), False),
        (lambda out: out[..., :-1], False),
    ],
    ids=["raised", "lowered", "rounded otherwise", "scaled", "cut"],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_that_are_more_than_products_are_seen(change, plain: bool, sign: int):
    """Logits below zero everywhere are as large as ones above."""
    model = tiny_model()
    with torch.no_grad():
        hidden = model.model(input_ids=torch.arange(2)[None]).last_hidden_state[0]
        shares = F.normalize(hidden, dim=-1).sum(0)  # has a positive product with either
        model.lm_head.weight.copy_(sign * torch.linspace(0.5, 1, 300)[:, None] * shares)
        logits = model(input_ids=torch.arange(2)[None]).logits
    assert bool((sign * logits > 0).all())
    model.lm_head.register_forward_hook(lambda module, args, out: change(out))
    assert has_plain_head(model) is plain


def test_a_head_with_a_bias_is_not_plain_and_no_hook_stays():
    model = tiny_model()
    model.lm_head.bias = nn.Parameter(torch.full((300,), 1e-6))  # less than rounding does to the logits tried out
    assert not has_plain_head(model)
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        has_plain_head(model)
    assert not model.model._forward_hooks


@pytest.mark.parametrize("bent", [False, True])
def test_whether_a_head_is_plain_is_found_once_and_without_a_graph(bent: bool):
    model, graphs = tiny_model(), []
    model.model.register_forward_hook(lambda module, args, out: graphs.append(out.last_hidden_state.requires_grad))
    if bent:
        model.lm_head.register_forward_hook(lambda module, args, out: out + 1)
    assert [has_plain_head(model), has_plain_head(model)] == [not bent] * 2
    assert graphs == [False]


def test_of_a_peft_model_the_model_inside_is_looked_at_and_a_changed_head_is_not_plain():
    peft = pytest.importorskip("peft")
    for target, plain in (("o_proj", True), ("lm_head", False)):
        inner = tiny_model()
        model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=[target]))
        assert has_plain_head(model) is plain
        assert model_state(inner).found["_has_plain_head"] is plain  # a wrapper would look as if it had it too
        assert mean_loss(model, examples(), PAD) == pytest.approx(mean_loss(tiny_model(), examples(), PAD), rel=1e-5)
