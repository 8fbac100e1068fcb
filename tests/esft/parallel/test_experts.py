"""Experts that are dealt out over ranks: the same steps, each with a part of the weights."""

import importlib
import os
import shutil
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import esft
from benchmarks.traffic import Traffic
from esft.errors import InputError, RankError
from esft.evaluation.answers import answer
from esft.experts.moe_layers import dealt_parameters, moe_layers
from esft.parallel.experts import deal_experts
from esft.parallel.join import joined
from esft.parallel.ranks import Ranks
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from esft.swapping.load import load
from esft.training.steps import Steps
from tests.esft import zoo
from tests.esft.experts.test_stock_layout import listed
from tests.esft.models import record, tiny_model, tiny_tokenizer
from tests.esft.parallel.jobs import job
from tests.esft.small_runs import SELECTION, Recorded, base_and_data, column, run, settings

steps_module = importlib.import_module("esft.training.steps")

# In the second layer one rank trains three experts of seven, in the other layer only one of the ranks trains any.
ALL_KINDS = ExpertSelection({1: [6, 2, 7, 5, 0], 2: [3]}, shared_experts=True, non_expert_modules=True)
# Fewer records than ranks: one without any has to go along. Parts of unlike number, and layers that are made again.
CONFIGS = {
    "plain": (settings(steps=3, save_every=2, batch_size=1, eval_every=2, dtype="float32"), SELECTION),
    "all kinds": (settings(steps=2, batch_size=7, micro_batch_size=2, eval_every=2, dtype="float32"), ALL_KINDS),
    "made again": (settings(steps=2, batch_size=5, recompute="layers", frozen="nf4", dtype="float32"), SELECTION),
    "8 bits": (settings(steps=2, batch_size=5, optimizer="adamw_8bit", dtype="float32", save_every=1), SELECTION),
    "half": (settings(steps=1, batch_size=5, recompute="frozen", dtype="bfloat16"), SELECTION),
}


class Many(Ranks):
    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 7), st.data())
def test_every_expert_is_held_once_and_no_rank_has_one_more_but_for_a_remainder(experts, size, turn, data):
    trained = data.draw(st.permutations(range(experts)))[: data.draw(st.integers(0, experts))]
    deals = [deal_experts(trained, experts, Many(rank, size), turn) for rank in range(size)]
    assert [deal.rank for deal in deals] == list(range(size))
    assert all((deal.trained, deal.frozen) == (deals[0].trained, deals[0].frozen) for deal in deals)
    assert [e for part in deals[0].trained for e in part] == list(trained)
    assert sorted(e for deal in deals for e in deal.held) == list(range(experts))
    for counts in ([len(deal.held) for deal in deals], deals[0].sizes):
        assert max(counts) - min(counts) <= 1


def test_what_is_left_over_goes_to_another_rank_in_every_layer():
    assert [deal_experts([4, 1], 5, Many(0, 3), turn).sizes for turn in range(3)] == [(1, 1, 0), (0, 1, 1), (1, 0, 1)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint whose experts' matrices are whole blocks of 8-bit moments, and data beside it."""
    base = base_and_data(tmp_path_factory.mktemp("dealt"))
    tiny_model("deepseek_v2", moe_intermediate_size=24).save_pretrained(base)
    return base


def trainings(base, end: str, shard: str) -> list[int]:
    """Every one of ``CONFIGS``; gradients beside each. Returns how many parameters they train."""
    steps_module.MasterAdamW = Recorded
    counts = []
    for name, (config, selection) in CONFIGS.items():
        Recorded.kept, Recorded.count = {}, 0
        result = run(base, f"{name}-{end}", TrainConfig(**vars(config) | {"shard": shard}), selection)
        counts.append(result.trained_parameters)
        save_file(Recorded.kept, base.parent / f"{name}-{end}-{os.environ.get('RANK', 0)}.safetensors")
    return counts


def one_model(base) -> dict:
    """What a rank holds, sends and finds out of a model that is dealt out."""
    with joined() as ranks:
        model = load(str(base), ALL_KINDS, dtype="float32", ranks=ranks).train()
        assert ranks.lockstep
        experts = [layer.experts for layer in moe_layers(model)]
        found: dict = {"held": [[len(e.trained), e.num_held] for e in experts], "dealt": dealt_parameters(model)}
        found["bytes"] = sum(p.nbytes for e in experts for p in e.parameters())
        steps = Steps(model, 0, settings(batch_size=2, lr=1e-9, dtype="float32"), ranks=ranks)
        rows = [esft.data.examples.Example([*range(5, 13)], [*range(5, 13)])] * 2
        with Traffic() as traffic:
            steps.update(1, rows)
        found["sent"] = dict(traffic.payload)
        esft.save_adapter(model, base.parent / "by-hand")
        for what, call in {"unswap": esft.unswap, "load_adapters": lambda m: esft.load_adapters(m, {"a": "a"})}.items():
            try:
                call(model.eval())
            except InputError as error:
                found[what] = str(error)
        other = load(str(base), ALL_KINDS, dtype="float32", ranks=ranks)
        esft.load_adapter(other, base.parent / "all kinds-2" / "adapter")
        found["answers"] = answer(other, tiny_tokenizer(), [record("count", "x")], 6)
        shared = esft.swap(zoo.tiny("muse_spark").eval(), ExpertSelection({}), ranks=ranks)
        found["logits"] = shared(input_ids=zoo.tokens())[0].square().sum().item()
    try:
        model(input_ids=torch.arange(4)[None])
    except RankError as error:
        found["left"] = str(error)
    return found


@pytest.fixture(scope="module")
def runs(base):
    """``CONFIGS`` by one process and, with experts dealt out, by two and by three; and what ``one_model`` finds."""
    patched = steps_module.MasterAdamW
    counts = trainings(base, "1", "none")
    steps_module.MasterAdamW = patched
    (folder := base.parent / "job").mkdir()
    for size in (2, 3):
        ended = job(folder, size, partial(trainings, base, str(size), "experts"))
        assert [(e.status, e.value) for e in ended] == [(0, counts)] * size, ended
    found = job(folder, 2, partial(one_model, base))
    assert [e.status for e in found] == [0, 0], found
    return [e.value for e in found]


def gradients(base, name: str, size: int) -> dict[str, torch.Tensor]:
    """Of all ranks, those of experts one after the other."""
    parts = [load_file(base.parent / f"{name}-{size}-{rank}.safetensors") for rank in range(size)]
    names = dict.fromkeys(n for part in parts for n in part)
    dealt = {n: torch.cat([part[n] for part in parts if n in part]) for n in names if ".trained_" in n}
    return {n: parts[0][n] for n in names if n not in dealt} | dealt


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [2, 3])
def test_loss_and_every_gradient_are_those_of_a_single_process(base, runs, size: int, name: str):
    alone, several = (base.parent / f"{name}-{n}" for n in (1, size))
    rel = 1e-2 if name == "half" else 2e-6  # bf16: a sum is rounded once for every rank
    for figure in ("loss", "grad_norm", "eval_loss"):
        assert column(several, figure) == pytest.approx(column(alone, figure), rel=5 * rel)
    expected, found = gradients(base, name, 1), gradients(base, name, size)
    assert found.keys() == expected.keys()
    first = {n: g for n, g in expected.items() if n.startswith("1/")}  # later ones are of weights that differ a little
    assert first
    for n, gradient in first.items():
        error = torch.linalg.vector_norm((found[n] - gradient).float())
        assert error <= rel * torch.linalg.vector_norm(gradient.float()), n


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [2, 3])
def test_adapters_and_checkpoints_are_those_of_a_single_process(base, runs, size: int, name: str):
    alone, several = (base.parent / f"{name}-{n}" for n in (1, size))
    for file in ("adapter/expert_cfg.json", "experts.json"):
        assert (several / file).read_bytes() == (alone / file).read_bytes()
    for file in ("adapter/adapter.safetensors", *(f"{p.relative_to(alone)}" for p in alone.glob("checkpoints/*/*s"))):
        expected, found = load_file(alone / file), load_file(several / file)
        assert found.keys() == expected.keys() and len(found) > 3
        for n, tensor in expected.items():
            assert found[n].shape == tensor.shape and found[n].dtype == tensor.dtype
            if n.startswith(("model.", "master", "weight", "step")):
                # At most three steps of 3e-3: where a gradient is nearly zero, Adam makes much of a rounding.
                torch.testing.assert_close(found[n], tensor, rtol=1e-3, atol=6e-3 if name == "half" else 5e-5)


def test_a_rank_holds_its_part_and_sends_no_gradient_of_an_expert(base, runs):
    first, second = runs
    # Eight experts a layer, five and one of them trained; who trains one more takes turns.
    assert [first["held"], second["held"]] == [[[3, 4], [0, 4]], [[2, 4], [1, 4]]]
    assert {tuple(sizes) for sizes in first["dealt"].values()} == {(3, 2), (0, 1)}
    assert first["bytes"] == second["bytes"]
    whole = load(str(base), ALL_KINDS, dtype="float32")
    pools = [p for layer in moe_layers(whole) for p in layer.experts.parameters()]
    assert first["bytes"] == sum(p.nbytes for p in pools) / 2
    others = sum(p.nbytes for p in whole.parameters() if p.requires_grad) - sum(
        p.nbytes for p in pools if p.requires_grad
    )
    for found in runs:
        sent = found["sent"]
        # Once; and a byte for each whether there is one, the norm and the step's figures.
        assert others <= sent["allreduce"] <= others + 1000
        # Of each layer, of 8 tokens: hidden states, ids and weights, and back gradients of the output. Of both
        # ranks' tokens, to be added up: the output, and in the backward gradients of hidden states and weights.
        d, k = 32, whole.config.num_experts_per_tok
        assert sent["allgather_base"] == 2 * 8 * (d * 4 + k * 8 + k * 4 + d * 4)
        assert sent["reduce_scatter_base"] == 2 * 16 * (d * 4 + d * 4 + k * 4)


def test_an_adapter_is_written_and_read_without_a_whole_model(base, runs):
    written = load_file(base.parent / "by-hand" / "adapter.safetensors")
    whole = load(str(base), ALL_KINDS, dtype="float32")
    esft.save_adapter(whole, base.parent / "expected")
    expected = load_file(base.parent / "expected" / "adapter.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():  # one step of 1e-9
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=1e-7)
    esft.load_adapter(whole, base.parent / "all kinds-2" / "adapter")
    assert [f["answers"] for f in runs] == [answer(whole, tiny_tokenizer(), [record("count", "x")], 6)] * 2


def test_experts_that_the_kernels_do_not_compute_are_dealt_out_too(runs):
    alone = esft.swap(zoo.tiny("muse_spark").eval(), ExpertSelection({}))
    expected = alone(input_ids=zoo.tokens())[0].square().sum().item()
    assert [f["logits"] for f in runs] == [pytest.approx(expected, rel=1e-5)] * 2


def test_what_cannot_be_done_with_a_part_of_the_experts_is_refused(runs):
    for found in runs:
        assert "none has the stock model's weights" in found["unswap"]
        assert "no adapters can lie beside them" in found["load_adapters"]
        assert found["left"] == "the experts are dealt out over 2 processes, and this is a job of 1"
    with pytest.raises(InputError, match="are a ModuleList cannot be dealt out"):
        esft.swap(listed(tiny_model()), ExpertSelection({}), ranks=Many(0, 2))
    with pytest.raises(InputError, match="shard experts goes with the method esft, not with full"):
        TrainConfig(method="full", shard="experts")


def goes_on(base, copy: str, steps: int) -> float:
    config = TrainConfig(**vars(CONFIGS["8 bits"][0]) | {"shard": "experts", "steps": steps})
    return run(base, copy, config, resume=True).train_loss


def test_a_checkpoint_of_two_ranks_goes_on_with_any_number(base, runs, tmp_path):
    losses = []
    for size in (1, 3):
        shutil.copytree(base.parent / "8 bits-2", base.parent / f"on-{size}")
        work = partial(goes_on, base, f"on-{size}", 3)
        losses.append(work() if size == 1 else job(tmp_path, size, work)[0].value)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(column(base.parent / "on-3", "loss")) == 3
