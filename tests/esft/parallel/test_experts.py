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
from esft.adapters.folder import WEIGHTS
from esft.errors import InputError, RankError
from esft.evaluation.answers import answer
from esft.experts.moe_layers import dealt_parameters, moe_layers
from esft.optimizer.moments import decode, signed, unsigned
from esft.parallel.experts import deal_experts
from esft.parallel.join import joined
from esft.parallel.ranks import Ranks
from esft.runs.config import TrainConfig
from esft.scoring.gradients import gradient_scores
from esft.scoring.score import score_experts
from esft.selection import ExpertSelection
from esft.swapping.load import load
from esft.training.steps import Steps
from tests.esft import zoo
from tests.esft.experts.test_stock_layout import listed
from tests.esft.models import record, tiny_model, tiny_tokenizer
from tests.esft.parallel.jobs import job, refused
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
        found: dict = {"rank": ranks.rank, "dealt": dealt_parameters(model)}
        found["held"] = [[len(e.trained), e.num_held] for e in experts]
        found["bytes"] = sum(p.nbytes for e in experts for p in e.parameters())
        steps = Steps(model, 0, settings(batch_size=2, lr=1e-9, dtype="float32"), ranks=ranks)
        rows = [esft.data.examples.Example([*range(5, 13)], [*range(5, 13)])] * 2
        with Traffic() as traffic:
            steps.update(1, rows)
        found["sent"] = dict(traffic.payload)
        esft.save_adapter(model, base.parent / "by-hand")
        found["unswap"] = refused(lambda: esft.unswap(model.eval()))
        found["load_adapters"] = refused(lambda: esft.load_adapters(model.eval(), {"a": "a"}))
        other = load(str(base), ALL_KINDS, dtype="float32", ranks=ranks)
        esft.load_adapter(other, base.parent / "all kinds-2" / "adapter")
        found["answers"] = answer(other, tiny_tokenizer(), [record("count", "x")], 6)
        # One rank ends its answer at once, the other goes on.
        nudge = torch.zeros(other.lm_head.out_features)
        nudge[tiny_tokenizer().eos_token_id] = 1e6 * ranks.rank
        other.lm_head.register_forward_hook(lambda module, args, logits: logits + nudge)
        found["nudged"] = answer(other, tiny_tokenizer(), [record("count", "x")], 6)
        found["score"] = refused(lambda: score_experts(other, []))
        found["gradients"] = refused(lambda: gradient_scores(other, [], lambda model, batch: (torch.zeros(()), 0)))
        found["plain"] = plain_layout(ranks)
    by_hand = base.parent / f"left-{found['rank']}"
    calls = {
        "runs": lambda: model(input_ids=torch.arange(4)[None]),
        "save_adapter": lambda: esft.save_adapter(model, by_hand),
        "save_pretrained": lambda: model.save_pretrained(by_hand),
    }
    found["left"] = [refused(call, RankError) for call in calls.values()] + [by_hand.exists()]
    return found


def plain_layout(ranks: Ranks) -> dict:
    """Of experts that the kernels do not compute, one of which trains: the logits, and the gradient of what is here."""
    found: dict = {"logits": [], "gradient": 0.0}
    model = zoo.tiny("muse_spark").eval().double()  # its gradient is mostly noise in float32
    esft.swap(model, ExpertSelection({0: [3]}), ranks=ranks)
    for tokens in (zoo.tokens(), zoo.tokens()[:, :1]):  # the second time a rank may have no rows
        total = model(input_ids=tokens)[0].square().sum()
        total.backward()
        found["logits"].append(total.item())
    pools = [p for layer in moe_layers(model) for p in layer.trained_parameters([3]) if p.requires_grad]
    assert all(p.grad is not None for p in pools)
    return found | {"gradient": sum(p.grad.square().sum().item() for p in pools if p.grad is not None)}


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
    half = name == "half"
    # Where a gradient is nearly zero Adam makes much of a rounding, and in bf16 its sign may be another.
    check_changes(base, several, alone, rel=0.2 if half else 0.01)
    for file in (f"{p.relative_to(alone)}" for p in alone.glob("checkpoints/*/*s")):
        expected, found = load_file(alone / file), load_file(several / file)
        assert found.keys() == expected.keys() and len(found) > 3
        for n, tensor in expected.items():
            assert found[n].shape == tensor.shape and found[n].dtype == tensor.dtype
            if n.startswith("step") or n.startswith(("master", "weight")) and not half:
                torch.testing.assert_close(found[n], tensor, rtol=1e-3, atol=5e-5)
        check_moments(found, expected, rel=0.03 if half else 0.01)


def check_changes(base, found, expected, rel: float) -> None:
    """That an adapter's difference from its base is another run's, but for a part of its norm."""
    stock = load_file(base / "model.safetensors")
    both = [load_file(each / "adapter" / WEIGHTS) for each in (found, expected)]
    assert both[0].keys() == both[1].keys()
    changed = 0
    for n in both[0]:
        ours, theirs = (each[n].float() - stock[n].float() for each in both)
        assert torch.linalg.vector_norm(ours - theirs) <= rel * torch.linalg.vector_norm(theirs), n
        changed += bool(theirs.any())
    assert changed > 3


def check_moments(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rel: float) -> None:
    ours, theirs = moments(found), moments(expected)
    # An expert that got no token yet has zeros.
    assert ours.keys() == theirs.keys() and sum(bool(values.any()) for values in theirs.values()) > 3
    for n, values in theirs.items():
        assert torch.linalg.vector_norm(ours[n] - values) <= rel * torch.linalg.vector_norm(values), n


def moments(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's, as numbers."""
    found = {n: t for n, t in tensors.items() if n.startswith(("exp_avg/", "exp_avg_sq/"))}
    for kind, code in ("exp_avg", signed()), ("exp_avg_sq", unsigned()):
        for name in (n.partition("/")[2] for n in tensors if n.startswith(f"{kind}_codes/")):
            codes, absmax = (tensors[f"{kind}_{part}/{name}"] for part in ("codes", "absmax"))
            found[f"{kind}/{name}"] = decode(codes, absmax, code)
    return found


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
    alone, (first, second) = plain_layout(Ranks()), (f["plain"] for f in runs)
    assert first["logits"] == second["logits"] == pytest.approx(alone["logits"], rel=1e-9)
    # One rank holds what trains, and both send it the same tokens.
    assert second["gradient"] == 0 < first["gradient"] == pytest.approx(4 * alone["gradient"], rel=1e-6)


def test_a_rank_whose_answer_has_ended_goes_along_until_all_have(runs):
    for found in runs:
        assert found["nudged"] == found["answers"]


def test_what_cannot_be_done_with_a_part_of_the_experts_is_refused(runs):
    for found in runs:
        assert "none has the stock model's weights" in found["unswap"]
        assert "no adapters can lie beside them" in found["load_adapters"]
        spread = "not scored of a model whose weights are spread over processes"
        assert [found["score"], found["gradients"]] == [f"experts are {spread}", f"gradients are {spread}"]
        assert found["left"] == ["the weights are spread over 2 processes, and this is a job of 1"] * 3 + [False]
    with pytest.raises(InputError, match="are a ModuleList cannot be dealt out"):
        esft.swap(listed(tiny_model()), ExpertSelection({}), ranks=Many(0, 2))
    with pytest.raises(InputError, match="shard experts goes with the method esft, not with full"):
        TrainConfig(method="full", shard="experts")


def unlike(what: str) -> str:
    """What a rank is told whose second one deals out something else."""
    other = os.environ["RANK"] == "1" and what
    with joined() as ranks:
        model = tiny_model(seed=1 if other == "model" else 0)
        selection = ExpertSelection({1: [2, 6], 2: [0]}) if other == "selection" else SELECTION
        return refused(
            lambda: esft.swap(model, selection, frozen="int8" if other == "frozen" else "bf16", ranks=ranks), RankError
        )


@pytest.mark.parametrize("what", ["model", "selection", "frozen"])
def test_ranks_that_would_deal_out_unlike_experts_are_found_out(tmp_path, what: str):
    for found in job(tmp_path, 2, partial(unlike, what)):
        assert found.value.startswith(f"rank 1 has other {what} than rank 0: "), found


def goes_on(base, out: str, resume: bool = True) -> None:
    config = TrainConfig(**vars(CONFIGS["8 bits"][0]) | {"shard": "experts", "steps": 4})
    run(base, out, config, resume=resume)


def test_a_checkpoint_of_two_ranks_goes_on_with_any_number_as_if_nothing_had_been(base, runs, tmp_path):
    goes_on(base, "unbroken", resume=False)
    unbroken = base.parent / "unbroken"
    for size in (1, 3):
        on = base.parent / f"on-{size}"
        shutil.copytree(base.parent / "8 bits-2", on)
        work = partial(goes_on, base, on.name)
        assert size == 1 or [e.status for e in job(tmp_path, size, work)] == [0] * size
        if size == 1:
            work()
        assert len(column(on, "loss")) == 4
        check_changes(base, on, unbroken, rel=0.03)
        last = sorted(f"{p.relative_to(on)}" for p in on.glob("checkpoints/*/*s"))[-1]
        check_moments(*(load_file(each / last) for each in (on, unbroken)), rel=0.03)
