"""What the loop computes, logs and stores, step by step; whole runs are in test_runs."""

import importlib
import itertools
import json
import math
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import esft
from esft.checkpoint.load import load_model
from esft.data.batches import collate, epoch_batches
from esft.data.encoding import encode_all
from esft.data.examples import IGNORE, Example, Examples
from esft.data.sources import read_records
from esft.memory import peak_rss
from esft.runs.checkpoints import State
from esft.selection import ExpertSelection
from esft.training import run_data
from esft.training.auxiliary_losses import balance_losses
from esft.training.schedule import learning_rate
from tests.esft.checkpoint.files import rewrite
from tests.esft.models import chat, save_tiny, tiny_encoder, tiny_model, tiny_tokenizer, write_records
from tests.esft.small_runs import SELECTION, breaks, column, metrics, run, settings

train_module = importlib.import_module("esft.training.loop")  # ``esft.train`` is the function
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


def test_what_a_model_draws_while_it_is_made_depends_on_the_seed(base, fake, monkeypatch):
    seeds, real = [], train_module.METHODS["esft"].prepare
    prepare = staticmethod(lambda *how: seeds.append(torch.initial_seed()) or real(*how))
    monkeypatch.setattr(train_module.METHODS["esft"], "prepare", prepare)
    for name, seed in (("a", 5), ("b", 6)):
        run(base, name, settings(steps=1, seed=seed), eval_data=None)
    assert seeds == [5, 6]


def test_a_state_after_the_last_step_has_to_have_its_loss():
    model = esft.swap(tiny_model(), SELECTION)
    loop = train_module._Loop(model, tiny_tokenizer(), settings(steps=3), False)
    for step, losses in ((2, []), (3, [1.5])):
        loop.load(State(step, losses, loop.optimizer.state()))
        assert loop.losses == losses
    with pytest.raises(esft.InputError, match="^step 3 is the last one, and its loss is not kept: ask for more steps$"):
        loop.load(State(3, [], loop.optimizer.state()))


def test_the_loss_of_a_run_is_the_mean_of_its_last_twenty_steps(base, fake):
    result = run(base, "run", settings(steps=23, save_every=99), eval_data=None)
    assert result.train_loss == pytest.approx(sum(10 - call for call in range(4, 24)) / 20)
    assert result.eval_loss is None
    assert column(base.parent / "run", "eval_loss") == []


def test_a_resumed_run_has_the_weights_and_moments_of_the_broken_one(base, out, monkeypatch):
    config = settings(steps=4, save_every=2, dtype="bfloat16")
    run(base, "whole", config)
    real, count = train_module.batch_loss, breaks(4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "batch_loss", lambda *args: count() or real(*args))
        run(base, "run", config)
    run(base, "run", None, None, resume=True)  # with the settings and the selection that it was begun with
    one, other = (load_file(base.parent / r / "adapter" / "adapter.safetensors") for r in ("whole", "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert column(out, "loss") == column(base.parent / "whole", "loss")


def test_a_run_that_has_ended_goes_on_for_more_steps_and_not_for_fewer(base, out, fake):
    run(base, "run", settings(steps=4, save_every=2), eval_data=None)
    assert run(base, "run", settings(steps=5, save_every=2), resume=True, eval_data=None).steps == 5
    assert column(out, "step") == [1, 2, 3, 4, 5]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for few in (1, 4):
        with pytest.raises(esft.InputError, match=f"^cannot resume with steps {few}: .*/run has done 5$"):
            run(base, "run", settings(steps=few, save_every=2), resume=True, eval_data=None)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_layers_are_made_again_in_the_backward_of_every_micro_batch(base, monkeypatch):
    calls, passes = [], []
    real = train_module.batch_loss

    def watched(model, batch):
        calls.append(any(getattr(m, "gradient_checkpointing", False) for m in model.modules()))
        if len(calls) == 1:
            model.get_submodule("model.layers.2.mlp").register_forward_pre_hook(lambda *_: passes.append(1))
        return real(model, batch)

    monkeypatch.setattr(train_module, "batch_loss", watched)
    run(base, "layers", settings(steps=1, micro_batch_size=3, recompute="layers"), eval_data=None)
    assert calls == [True] * 3
    assert len(passes) == 2 * 3


def test_bad_input_leaves_nothing_behind(base):
    folder = base.parent
    bad, long, inside = folder / "bad.jsonl", folder / "long.jsonl", folder / "other" / "inside.jsonl"
    bad.write_text("{\n")
    long.write_text(json.dumps({"messages": chat("x" * 50, "y")}) + "\n")
    save_tiny(folder / "other")
    write_records(inside)
    (folder / "file").write_text("")
    for name, held in (("half", "config.yaml"), ("rest", "origin.json")):
        (folder / name).mkdir()
        (folder / name / held).write_text("{}")
    there = sorted(folder.rglob("*"))
    usual = {"model_path": str(base), "data": folder / "d.jsonl", "out": "x", "config": settings()}
    cases = [
        ({"selection": None, "config": None}, "method esft needs expert selection"),
        ({"config": settings(method="full")}, "method full takes no expert selection"),
        ({"config": settings(method="lora")}, "method lora takes no expert selection"),
        ({"selection": ExpertSelection({9: [0]})}, "names layer 9"),
        ({"selection": ExpertSelection({1: []})}, "selection is empty"),
        ({"model_path": str(folder / "no")}, "no: no such folder"),
        ({"data": bad}, "bad.jsonl: line 1"),
        ({"eval_data": bad}, "bad.jsonl: line 1"),
        ({"data": long, "config": settings(max_length=30)}, "long.jsonl: no record has its answer within 30 tokens"),
        ({"eval_data": long, "config": settings(max_length=30)}, "long.jsonl: no record has its answer within 30"),
        ({"resume": True}, "x: holds no run to resume"),
        ({"resume": True, "out": "half"}, "half: holds no run to resume"),
        ({"resume": True, "out": "rest"}, "rest: holds no run to resume"),
        ({"resume": True, "overwrite": True}, "`resume=True` and `overwrite=True` exclude each other"),
        ({"out": "other"}, "other: holds something already"),
        ({"out": "file", "overwrite": True}, "file: is a file"),
        ({"out": "other", "overwrite": True}, r"other: holds no run \(no esft_run.json\), and is not overwritten"),
        ({"out": "base", "overwrite": True}, "would replace .*base, which is read"),
        ({"out": "d.jsonl"}, "would replace .*d.jsonl, which is read"),
        ({"out": "other", "overwrite": True, "data": inside}, "would replace .*inside.jsonl, which is read"),
        ({"out": "other", "overwrite": True, "eval_data": inside}, "would replace .*inside.jsonl, which is read"),
    ]
    for change, message in cases:
        given = {**usual, "selection": SELECTION, **change}
        with pytest.raises(esft.InputError, match=message):
            esft.train(**{**given, "out": folder / given["out"]})
        assert sorted(folder.rglob("*")) == there


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

    monkeypatch.setattr(train_module, "batch_loss", loss)
    with pytest.raises(esft.DivergenceError, match=message):
        run(base, "run", settings(), eval_data=None)
    assert column(out, "step") == [1]
    assert not (out / "adapter").exists()


@pytest.mark.parametrize("aux_loss", [0.0, 1.0])
def test_a_router_that_decides_by_what_is_no_number_stops_the_run_like_any_other(base, out, aux_loss: float):
    rewrite(base, lambda tensors: tensors["model.embed_tokens.weight"].fill_(math.nan))
    with pytest.raises(esft.DivergenceError, match="step 1: loss nan, .*gradient norm nan; lower"):
        run(base, "run", settings(aux_loss=aux_loss), eval_data=None)


def test_an_auxiliary_loss_that_is_not_finite_stops_the_run(base, out, monkeypatch):
    monkeypatch.setattr(train_module._Loop, "_gradients", lambda self, records: (1.0, {"aux_loss": math.inf}))
    with pytest.raises(esft.DivergenceError, match="step 1: loss 1.0, aux_loss inf, gradient norm 0.0; lower"):
        run(base, "run", settings(), eval_data=None)


def test_a_loss_on_the_evaluation_data_that_is_not_finite_stops_the_run(base, out, fake, monkeypatch):
    monkeypatch.setattr(train_module, "mean_loss", lambda *_: math.inf)
    with pytest.raises(esft.DivergenceError, match="step 6: loss inf on the evaluation data; lower the learning rate"):
        run(base, "run", settings())
    assert not (out / "summary.json").exists()


def tree(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Stopped(Exception):
    """Ends a run in a test."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 5, 7, 12])
def test_a_signal_stops_the_run_after_the_step_and_the_resumed_one_is_the_unbroken_one(
    base, out, fake, at: int, number: int
):
    whole = run(base, "whole", settings())
    lines = {name: column(base.parent / "whole", name) for name in ("step", "loss", "eval_loss")}
    fake.batches.clear()
    fake.before = lambda: len(fake.batches) == at - 1 and os.kill(os.getpid(), number)
    with pytest.raises(esft.errors.Interrupted, match=f"^{out}: stopped after step {at}, which is saved$") as raised:
        run(base, "run", settings())
    assert (raised.value.signal, raised.value.resumable) == (number, True)
    assert isinstance(raised.value, KeyboardInterrupt)
    assert column(out, "step")[-1] == len(fake.batches) == at
    assert json.loads((out / "checkpoints" / f"step-{at:06d}" / "state.json").read_text())["step"] == at
    assert not (out / ".esft.lock").exists() and not (out / "adapter").exists()
    fake.before = lambda: None
    resumed = run(base, "run", settings(), resume=True)
    assert {name: column(out, name) for name in lines} == lines
    assert (resumed.train_loss, resumed.eval_loss) == (whole.train_loss, whole.eval_loss)
    for name in ("adapter/adapter.safetensors", "adapter/manifest.json", "config.yaml", "experts.json", "origin.json"):
        assert (out / name).read_bytes() == (base.parent / "whole" / name).read_bytes()


def test_a_signal_in_an_evaluation_stops_the_run_too(base, out, fake, monkeypatch):
    monkeypatch.setattr(train_module, "mean_loss", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 0.25)
    with pytest.raises(esft.errors.Interrupted, match="stopped after step 7"):
        run(base, "run", settings())
    with pytest.raises(esft.errors.Interrupted, match="stopped after step 12"):
        run(base, "run", settings(), resume=True)
    assert column(out, "eval_loss") == [0.25, 0.25]
    result = run(base, "run", settings(), resume=True)
    assert column(out, "eval_loss") == [0.25, 0.25] and result.eval_loss == 0.25


def test_a_run_in_a_thread_ends_as_elsewhere(base, out, fake):
    thread = threading.Thread(target=lambda: run(base, "run", settings(steps=2)))
    thread.start()
    thread.join()
    assert json.loads((out / "summary.json").read_text())["steps"] == 2


def test_a_diverged_or_broken_run_takes_nothing_from_the_one_that_it_was_to_replace(base, out, fake, monkeypatch):
    run(base, "run", settings(steps=3, save_every=2), eval_data=None)
    before = tree(out)

    def fails(at: int, error):
        def before_step():
            if len(fake.batches) == at:
                raise error

        fake.batches.clear()
        fake.before = before_step

    for error in (esft.DivergenceError("step 4: loss nan"), Stopped()):
        fails(3, error)
        with pytest.raises(type(error)):
            run(base, "run", settings(steps=8, save_every=2, lr=0.5), overwrite=True, eval_data=None)
        assert {name: b for name, b in tree(out).items() if not name.startswith("overwriting/")} == before
    assert column(out / "overwriting", "step") == [1, 2, 3]
    fake.before = lambda: None
    run(base, "run", settings(steps=8, save_every=2, lr=0.5), resume=True, eval_data=None)
    assert column(out, "step") == list(range(1, 9)) and not (out / "overwriting").exists()
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("at", [3, 5])
def test_weights_that_are_no_numbers_are_not_stored(base, out, fake, monkeypatch, at: int):
    """After the last step no gradient is left to show it; before, a checkpoint would hold them."""
    monkeypatch.setattr(
        train_module.MasterAdamW, "overflowed", lambda self: "some.weight" if len(fake.batches) == at else None
    )
    with pytest.raises(
        esft.DivergenceError, match=f"^step {at}: some.weight holds what is no finite number; lower the"
    ):
        run(base, "run", settings(steps=5, save_every=3), eval_data=None)
    assert not (out / "adapter").exists()
    assert [p.name for p in (out / "checkpoints").glob("*")] == ([] if at == 3 else ["step-000003"])


def test_two_trainings_in_one_folder_are_refused_and_the_first_goes_on(base, out, fake):
    refused = []

    def another() -> None:
        if len(fake.batches) != 2:
            return
        for more in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(esft.InputError) as raised:
                run(base, "run", settings(lr=0.5), **more)
            refused.append(str(raised.value))

    fake.before = another
    run(base, "run", settings(), eval_data=None)
    assert len(refused) == 3 and all(f"{out}: in use by process {os.getpid()} on " in line for line in refused)
    assert column(out, "step") == list(range(1, 13)) and not list(out.rglob(".*"))


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_where_it_is_wanted(base, fake, capfd, progress: bool):
    run(base, "run", settings(steps=4, save_every=2), eval_data=None, progress=progress)
    run(base, "run", settings(steps=5, save_every=2), eval_data=None, progress=progress, resume=True)
    shown = capfd.readouterr().err.replace("\r", "\n").splitlines()
    bars = [line for line in shown if line.startswith("esft")]
    assert bool(bars) == progress
    if progress:
        assert "0/4" in bars[0] and any("4/4" in bar and "loss=7.500" in bar for bar in bars)
        assert any("2/5" in bar for bar in bars) and "5/5" in bars[-1]


def test_the_metrics_hold_every_step_and_every_evaluation(base, out, fake, steps, monkeypatch):
    asked, clock = [], itertools.count()
    monkeypatch.setattr(train_module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))  # 1 s a look
    monkeypatch.setattr(train_module, "peak_memory", lambda: 123)

    def evaluate(model, examples, pad: int, batch_size: int) -> float:
        asked.append((len(examples), pad, batch_size))
        model.eval()
        return 0.5 + len(asked)

    monkeypatch.setattr(train_module, "mean_loss", evaluate)
    write_records(base.parent / "e.jsonl", 5)
    config = settings(steps=5, eval_every=2, micro_batch_size=4, warmup_steps=2, decay=0.4)
    result = run(base, "run", config, eval_data=base.parent / "e.jsonl")

    examples = encode_all(tiny_encoder(), read_records(base.parent / "d.jsonl"), "d")
    batches = [b for epoch in range(2) for b in epoch_batches(examples, 8, 0, epoch)][:5]
    counts = [sum(len(examples[i].ids) for i in batch) for batch in batches]
    expected = []
    for step, evaluated in zip(range(5), (None, 1.5, None, 2.5, 3.5), strict=True):
        # Two parts of alike size a step: calls 1 and 2 have losses 9 and 8, and so on.
        loss = pytest.approx(8.5 - 2 * step)
        speed = counts[step] / 1.0
        line = {"loss": loss, "lr": learning_rate(config, step), "grad_norm": 0.0, "tokens_per_second": speed}
        expected += [{"step": step + 1, **line}]
        expected += [{"step": step + 1, "eval_loss": evaluated}] if evaluated else []
    assert metrics(out) == expected
    assert asked == [(5, PAD, 4)] * 3
    assert fake.training == [True] * 10
    assert [rate for rate, _ in steps] == [learning_rate(config, step) for step in range(5)]

    assert (result.steps, result.eval_loss, result.peak_gpu_memory) == (5, 3.5, 123)
    assert result.trained_parameters == 3 * 3 * 20 * 32  # three experts of three matrices
    assert result.seconds == 11.0  # the loop looks at the clock twice a step, and before and after
    assert result.tokens_per_second == sum(counts) / 11.0
    assert 2**20 < result.peak_rss <= peak_rss()
    stored = (out / "adapter" / "adapter.safetensors").stat().st_size
    assert result.stored_bytes == stored > 4 * result.trained_parameters
    origin = {"model": str(base), "data": str(base.parent / "d.jsonl")}
    assert json.loads((out / "summary.json").read_text()) == {"method": "esft", **origin, **vars(result)}

    board = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "eval_loss"):
        logged = [(line["step"], line[name]) for line in metrics(out) if name in line]
        assert [(e.step, e.value) for e in board.Scalars(name)] == [(s, pytest.approx(v)) for s, v in logged]


def test_a_run_is_kept_unless_overwritten_and_then_goes_whole(base, out, fake):
    run(base, "run", settings(steps=3, save_every=2), eval_data=None)
    before = sorted(out.rglob("*"))
    with pytest.raises(esft.InputError, match="holds something already"):
        run(base, "run", settings(steps=1))
    (base.parent / "bad.jsonl").write_text("{\n")
    with pytest.raises(esft.InputError, match="line 1"):
        run(base, "run", settings(steps=1), overwrite=True, eval_data=base.parent / "bad.jsonl")
    assert sorted(out.rglob("*")) == before
    run(base, "run", settings(steps=2), overwrite=True, eval_data=None)
    assert column(out, "step") == [1, 2]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        "adapter config.yaml esft_run.json experts.json metrics.jsonl origin.json summary.json tensorboard".split()
    )


@pytest.mark.parametrize("there", [True, False])
def test_overwriting_takes_an_empty_folder_and_none(base, out, fake, there: bool):
    if there:
        out.mkdir()
    run(base, "run", settings(steps=1), overwrite=True, eval_data=None)
    assert column(out, "step") == [1]


def test_where_a_run_writes_may_be_a_folder_below_others_that_are_not_there(base, fake):
    run(base, "new/below/run", settings(steps=1), eval_data=None)
    assert column(base.parent / "new" / "below" / "run", "step") == [1]
