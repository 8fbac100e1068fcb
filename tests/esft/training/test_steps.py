"""What a step computes and what stops it."""

import itertools
import json
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import esft
from esft.checkpoint.load import load_model
from esft.data.batches import Packing, collate, epoch_batches
from esft.data.batches import steps as steps_of
from esft.data.encoding import encode_all
from esft.data.examples import IGNORE, Example, Examples
from esft.data.sources import read_records
from esft.parallel.ranks import Ranks
from esft.runs.checkpoints import State
from esft.training import run_data
from esft.training import steps as module
from esft.training.auxiliary_losses import balance_losses
from tests.esft.checkpoint.files import rewrite
from tests.esft.models import chat, tiny_encoder, tiny_model, tiny_tokenizer, write_records
from tests.esft.small_runs import SELECTION, column, metrics, run, settings

PAD = 258


@pytest.mark.parametrize("aux_loss", [0.0, 2.0])
@pytest.mark.parametrize("together", [None, 3])
def test_a_step_has_the_gradient_of_the_mean_over_the_batchs_tokens_and_of_the_weighted_balance(
    base, out, monkeypatch, steps, together: int | None, aux_loss: float
):
    draw = torch.Generator().manual_seed(0)
    examples = []
    for length in (3, 5, 8, 9, 12, 17, 20, 31):  # long ones last: the parts have very unlike numbers of tokens
        ids = torch.randint(0, 256, (length,), generator=draw).tolist()
        learnt = torch.rand(length, generator=draw) < 0.6
        examples.append(Example(ids, [t if yes else IGNORE for t, yes in zip(ids, learnt.tolist(), strict=True)]))
    examples[0].labels[0] = examples[0].ids[0]  # nothing comes before a first token: it cannot be learnt
    monkeypatch.setattr(run_data, "encoded", lambda *_: Examples.of(examples, 8, 0))
    config = settings(method="full", steps=1, micro_batch_size=together, aux_loss=aux_loss, dtype="float32")
    run(base, "run", config, None, eval_data=None)

    model = load_model(str(base), "float32")
    (order,) = epoch_batches(examples, 8, config.seed, 0)
    total, balance = torch.zeros(()), torch.zeros(())
    for start in range(0, 8, together or 8):
        part = [examples[i] for i in order[start : start + (together or 8)]]
        batch = collate(part, PAD)
        with balance_losses(model, batch["attention_mask"]) as found:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:].flatten()
        total = total + F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum")
        balance = balance + len(part) / 8 * sum(found)
    loss = total / sum(label != IGNORE for example in examples for label in example.labels[1:])
    (loss + aux_loss * balance).backward()

    ((_, gradients),) = steps
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    alike = gradients.keys() & expected.keys()  # all but the experts, which are in pools
    assert {"model.layers.1.mlp.gate.weight", "model.embed_tokens.weight", "lm_head.weight"} <= alike
    for name in alike:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-6)
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    (line,) = metrics(out)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert line.get("aux_loss") == (pytest.approx(balance.item(), rel=1e-5) if aux_loss else None)


@pytest.mark.parametrize("together", [None, 2])
def test_batches_are_those_of_epoch_after_epoch_in_parts(base, fake, together: int | None):
    write_records(base.parent / "d.jsonl", 7)
    run(base, "run", settings(steps=8, batch_size=3, micro_batch_size=together, seed=5), eval_data=None)
    examples = encode_all(tiny_encoder(), read_records(base.parent / "d.jsonl"), "d")
    batches = [batch for epoch in range(3) for batch in epoch_batches(examples, 3, 5, epoch)][:8]
    parts = [batch[i : i + (together or 3)] for batch in batches for i in range(0, len(batch), together or 3)]
    assert fake.batches == [collate([examples[i] for i in part], PAD)["input_ids"].tolist() for part in parts]


def test_what_a_step_draws_depends_on_the_seed_and_the_step_alone(base, fake):
    for name, seed, count in (("a", 0, 4), ("b", 0, 2), ("c", 1, 2)):
        run(base, name, settings(steps=count, seed=seed), eval_data=None)
    a, b, c = fake.drawn[:4], fake.drawn[4:6], fake.drawn[6:]
    assert a[:2] == b
    assert len({*a, *c}) == 6


def test_ranks_draw_unlike_numbers():
    drawn = []
    for rank in (0, 1):
        ranks = Ranks()
        ranks.rank = rank
        module.Steps(tiny_model(), PAD, settings(), ranks=ranks)._seed(3)
        drawn.append(torch.rand(()).item())
    module.Steps(tiny_model(), PAD, settings())._seed(3)
    assert drawn[0] == torch.rand(()).item() != drawn[1]


def test_a_rank_without_rows_goes_along_where_a_forward_pass_takes_all():
    ranks, passes = Ranks(), []
    ranks.lockstep, ranks.rounds = True, lambda *_: [([], 1)]
    loop = module.Steps(esft.swap(tiny_model(), SELECTION).train(), PAD, settings(), ranks=ranks)
    loop.model.model.register_forward_hook(lambda *_: passes.append(1))
    found = loop.update(1, [Example([1, 2, 3], [1, 2, 3])])
    assert (found["loss"], found["grad_norm"], passes) == (0.0, 0.0, [1])


def test_what_is_mixed_in_is_held_to_the_base():
    config = settings(kl_weight=0.5, lr=1e-2)
    loop = module.Steps(esft.swap(tiny_model(), SELECTION).train(), PAD, config)
    mixed, task = (Example([1, 2, 3, 4], [1, 2, 3, 4], mixed=mixed) for mixed in ((0,), ()))
    first, second = (loop.update(step, [mixed, task]) for step in (1, 2))
    assert first["kl"] == pytest.approx(0.0, abs=1e-6) and second["kl"] > 1e-5
    assert "kl" not in loop.update(3, [task])


def test_what_is_held_to_the_base_counts_token_by_token_however_the_batch_is_cut():
    """Of lengths that are unlike, so that a mean of means would be another."""
    rows = [Example([1, 2, 3], [1, 2, 3])]
    rows += [Example(ids := [7 + n, *range(20, 20 + n)], ids, mixed=(0,)) for n in (1, 4, 9)]
    lines = []
    for together in (4, 2, 1):
        loop = module.Steps(
            esft.swap(tiny_model(), SELECTION).train(), PAD, settings(kl_weight=50.0, micro_batch_size=together)
        )
        with torch.no_grad():
            for parameter in loop.optimizer.params.values():
                parameter.mul_(8.0)  # away from the base
        lines.append(loop.update(1, rows))
    assert lines[0]["kl"] > 1e-3
    for line in lines[1:]:
        for name in ("loss", "kl", "grad_norm"):
            assert line[name] == pytest.approx(lines[0][name], rel=1e-3)


@pytest.mark.parametrize("setting", ["packing", "padding_free", "eval_packing"])
def test_where_documents_share_rows_the_model_has_to_keep_them_apart(monkeypatch, setting: str):
    monkeypatch.setattr(module, "check_separates", lambda model: 1 / 0)
    module.Steps(tiny_model(), PAD, settings())
    with pytest.raises(ZeroDivisionError):
        module.Steps(tiny_model(), PAD, settings(**{setting: True}, max_length=40))


def test_a_state_after_the_last_step_has_to_have_its_loss():
    model = esft.swap(tiny_model(), SELECTION)
    loop = module.Steps(model, PAD, settings(steps=3))
    for step, losses in ((2, []), (3, [1.5])):
        loop.load(State(step, losses, loop.optimizer.state()))
        assert loop.losses == losses
    with pytest.raises(esft.InputError, match="^step 3 is the last one, and its loss is not kept: ask for more steps$"):
        loop.load(State(3, [], loop.optimizer.state()))


def test_layers_are_made_again_in_the_backward_of_every_micro_batch(base, monkeypatch):
    calls, passes = [], []
    real = module.batch_loss

    def watched(model, batch):
        calls.append(any(getattr(m, "gradient_checkpointing", False) for m in model.modules()))
        if len(calls) == 1:
            model.get_submodule("model.layers.2.mlp").register_forward_pre_hook(lambda *_: passes.append(1))
        return real(model, batch)

    monkeypatch.setattr(module, "batch_loss", watched)
    run(base, "layers", settings(steps=1, micro_batch_size=3, recompute="layers"), eval_data=None)
    assert calls == [True] * 3
    assert len(passes) == 2 * 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda p: p.sum() * math.nan, "step 2: loss nan, gradient norm nan; lower the learning rate"),
        (lambda p: p.sum() * 0 + math.inf, "step 2: loss inf, gradient norm 0.0;"),
        (lambda p: (p * 0).abs().sum().sqrt(), "step 2: loss 0.0, gradient norm nan;"),
    ],
)
def test_a_loss_or_a_gradient_that_is_not_finite_stops_the_run(base, out, monkeypatch, bad, message: str):
    calls = itertools.count(1)

    def loss(model, _):
        trained = next(p for p in model.parameters() if p.requires_grad and p.numel())
        return (bad(trained) if next(calls) == 2 else trained.sum() * 0), 1

    monkeypatch.setattr(module, "batch_loss", loss)
    with pytest.raises(esft.DivergenceError, match=message) as raised:
        run(base, "run", settings(), eval_data=None)
    whole = "The batch held " if "loss 0.0" in message else "Micro batch 1 of 1 held "  # it comes only once
    assert f"; lower the learning rate. {whole}{base.parent / 'd.jsonl'}: line " in str(raised.value)
    assert column(out, "step") == [1]
    assert not (out / "adapter").exists()


@pytest.mark.parametrize("aux_loss", [0.0, 1.0])
def test_a_router_that_decides_by_what_is_no_number_stops_the_run_like_any_other(base, out, aux_loss: float):
    rewrite(base, lambda tensors: tensors["model.embed_tokens.weight"].fill_(math.nan))
    with pytest.raises(esft.DivergenceError, match="step 1: loss nan, .*gradient norm nan; lower"):
        run(base, "run", settings(aux_loss=aux_loss), eval_data=None)


def test_an_auxiliary_loss_that_is_not_finite_stops_the_run(base, out, monkeypatch):
    monkeypatch.setattr(module.Steps, "_gradients", lambda *_, **__: (torch.tensor([1.0]), math.inf, 0.0, 0))
    with pytest.raises(esft.DivergenceError, match="step 1: loss 1.0, aux_loss inf, gradient norm 0.0; lower"):
        run(base, "run", settings(aux_loss=1.0), eval_data=None)


@pytest.mark.parametrize("at", [3, 5])
def test_weights_that_are_no_numbers_are_not_stored(base, out, fake, monkeypatch, at: int):
    """After the last step no gradient is left to show it; before, a checkpoint would hold them."""
    monkeypatch.setattr(
        module.MasterAdamW, "overflowed", lambda self: "some.weight" if len(fake.batches) == at else None
    )
    with pytest.raises(
        esft.DivergenceError, match=f"^step {at}: some.weight holds what is no finite number; lower the"
    ):
        run(base, "run", settings(steps=5, save_every=3), eval_data=None)
    assert not (out / "adapter").exists()
    assert [p.name for p in (out / "checkpoints").glob("*")] == ([] if at == 3 else ["step-000003"])


class NoNumber(torch.autograd.Function):
    """A loss as it is, whose gradient is none."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * math.nan


def poison(monkeypatch, letter: str, how) -> int:
    """Let ``how`` change the loss of a micro batch that holds a letter. Returns its token."""
    (token,), real = tiny_tokenizer()(letter)["input_ids"], module.batch_loss

    def loss(model, batch):
        total, count = real(model, batch)
        return (how(total) if bool((batch["input_ids"] == token).any()) else total), count

    monkeypatch.setattr(module, "batch_loss", loss)
    return token


@pytest.mark.parametrize("packing", [None, Packing(40, "bfd")])
@pytest.mark.parametrize("how", [lambda total: total * math.nan, NoNumber.apply], ids=["loss", "gradient"])
def test_a_step_that_is_no_number_names_its_micro_batch_and_the_records_in_it(base, out, monkeypatch, how, packing):
    """The record with a "Q", in line 11, is the bad one; nothing is saved of the step."""
    data, token = base.parent / "d.jsonl", poison(monkeypatch, "Q", how)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:10], lines[10].replace("say", "say Q"), *lines[11:]]) + "\n")
    rows_of = {"packing": True, "max_length": 40} if packing else {}
    config = settings(steps=12, batch_size=4, micro_batch_size=2, save_every=1, **rows_of)
    with pytest.raises(esft.DivergenceError) as raised:
        run(base, "run", config, eval_data=None)

    examples = encode_all(tiny_encoder(), read_records(data), "d")
    for step, rows in enumerate(steps_of(examples, 4, config.seed, 0, packing), 1):  # noqa: B007
        broken = [i for i, row in enumerate(rows) if token in row.ids]
        if broken:
            break
    held = rows[broken[0] // 2 * 2 :][:2]
    documents = {tuple(row.ids[a:b]) for row in held for a, b in pairwise((*row.starts, None))}
    said, _, places = str(raised.value).partition(f"Micro batch {broken[0] // 2 + 1} of {-(-len(rows) // 2)} held ")
    assert said.startswith(f"step {step}: loss ") and said.endswith("gradient norm nan; lower the learning rate. ")
    assert f"{data}: line 11" in places.split(", ") and len(places.split(", ")) == len(documents)
    assert column(out, "step") == list(range(1, step))
    assert max((int(path.name[5:]) for path in (out / "checkpoints").glob("*")), default=0) == step - 1


def test_a_step_that_is_computed_again_draws_what_it_drew(monkeypatch):
    """The gradient of the second micro batch is none because of what is drawn for it."""
    drawn = []

    def loss(model, batch):
        drawn.append(torch.rand(()).item())
        total = torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum()
        return (NoNumber.apply(total) if drawn[1:] and drawn[-1] == drawn[1] else total), 1

    monkeypatch.setattr(module, "batch_loss", loss)
    steps = module.Steps(esft.swap(tiny_model(), SELECTION), PAD, settings(micro_batch_size=1))
    with pytest.raises(esft.DivergenceError, match=r"Micro batch 2 of 3$"):
        steps.update(1, [Example([1, 2, 3], [1, 2, 3])] * 3)
    assert len(drawn) == 5 and drawn[3:] == drawn[:2]


def test_a_list_of_more_than_16_records_is_cut(base, monkeypatch):
    poison(monkeypatch, "s", lambda total: total * math.inf)
    unlike = (json.dumps({"messages": chat(f"say {n}", "b")}) for n in range(20))
    (base.parent / "d.jsonl").write_text("\n".join(unlike))
    with pytest.raises(esft.DivergenceError, match=r"Micro batch 1 of 1 held ([^,]+: line \d+, ){15}[^,]+ and 4 more$"):
        run(base, "run", settings(steps=1, batch_size=20), eval_data=None)


def test_a_step_whose_gradient_is_no_number_changes_nothing(monkeypatch):
    poison(monkeypatch, "a", NoNumber.apply)
    model = esft.swap(tiny_model(), SELECTION)
    steps = module.Steps(model, PAD, settings(steps=3, aux_loss=0.1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(esft.DivergenceError, match=r"^step 1: .*gradient norm nan; .* Micro batch 1 of 1$"):
        steps.update(1, [Example(tiny_tokenizer()("a b")["input_ids"], [1, 2, 3])])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not steps.losses


def test_of_several_ranks_the_one_whose_loss_is_no_number_says_what_it_held(monkeypatch):
    poison(monkeypatch, "a", lambda total: total * math.nan)
    ranks = Ranks()
    ranks.gathered = lambda own: ["The batch", own]
    steps = module.Steps(esft.swap(tiny_model(), SELECTION), PAD, settings(), ranks=ranks)
    with pytest.raises(esft.DivergenceError, match=r"; lower the learning rate\. Micro batch 1 of 1$"):
        steps.update(1, [Example(tiny_tokenizer()("a b")["input_ids"], [1, 2, 3])])


def test_tokens_are_counted_without_their_padding_and_so_is_the_share_that_is_learnt():
    steps = module.Steps(esft.swap(tiny_model(), SELECTION).train(), PAD, settings())
    rows = [Example([1, 2, 3], [1, 2, 3]), Example([1] * 9, [IGNORE] * 7 + [1] * 2)]
    for step in (1, 2):
        steps.update(step, rows)
        assert (steps.supervised, steps.tokens) == (4 / 12, 12 * step)


def test_a_row_without_anything_to_learn_is_a_step_without_a_loss():
    """A piece of a long prompt, where rows are filled to the last token."""
    steps = module.Steps(esft.swap(tiny_model(), SELECTION).train(), PAD, settings(weight_decay=0.0, batch_size=1))
    before = {name: p.detach().clone() for name, p in steps.model.named_parameters()}
    found = steps.update(1, [Example([1, 2, 3], [IGNORE] * 3)])
    assert (found["loss"], found["grad_norm"], steps.supervised, steps.tokens) == (0.0, 0.0, 0.0, 3)
    assert all(torch.equal(p, before[name]) for name, p in steps.model.named_parameters())
