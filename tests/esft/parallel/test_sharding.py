"""Frozen weights that are cut up over ranks: the same steps, in less memory."""

import os
from functools import partial
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from benchmarks.traffic import Traffic
from esft.errors import InputError
from esft.experts.moe_layers import dealt_pools, is_apart, is_dealt
from esft.parallel.join import joined
from esft.parallel.ranks import ALONE
from esft.parallel.sharding import is_cut_up, shard_frozen, whole
from esft.runs.config import SHARDS, TrainConfig
from esft.selection import ExpertSelection
from esft.swapping.load import load
from tests.esft.models import tiny_model, tiny_tokenizer
from tests.esft.parallel.jobs import FirstOfTwo, job
from tests.esft.small_runs import SELECTION, base_and_data, column, run, settings

# Fewer records than ranks: one without any has to go along. And parts of unlike number.
CONFIGS = {
    "plain": settings(steps=3, save_every=2, batch_size=2, aux_loss=1.0, eval_every=2, dtype="float32"),
    "parts": settings(steps=2, batch_size=7, micro_batch_size=2, eval_every=2, dtype="float32", frozen="nf4"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_and_data(tmp_path_factory.mktemp("sharded"))


def trainings(base) -> None:
    for name, config in CONFIGS.items():
        for shard in SHARDS:
            run(base, f"{name}-{shard}", TrainConfig(**vars(config) | {"shard": shard}))


def test_a_run_with_sharded_weights_leaves_the_bits_of_one_without(base, tmp_path):
    assert [e.status for e in job(tmp_path, 3, partial(trainings, base))] == [0, 0, 0]
    for name, shards in product(CONFIGS, (("none", "frozen"), ("experts", "all"))):
        plain, sharded = (base.parent / f"{name}-{shard}" for shard in shards)
        for figure in ("loss", "grad_norm", "eval_loss"):
            assert column(sharded, figure) == column(plain, figure)
        expected = load_file(plain / "adapter" / "adapter.safetensors")
        found = load_file(sharded / "adapter" / "adapter.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], tensor) for n, tensor in expected.items())


FEW = ExpertSelection({0: [2], 2: [0, 1]})


def begins(base) -> list[int]:
    """Two steps of a model some of whose frozen tensors have fewer rows than there are ranks. Returns those here."""
    for shard in ("none", "frozen"):
        run(base, f"few-{shard}", settings(steps=2, save_every=2, shard=shard, dtype="float32"), FEW)
    with joined() as ranks:
        model = load(str(base), FEW, dtype="float32")
        shard_frozen(model, ranks, torch.device("cpu"))
        return sorted({len(p) for p in model.parameters() if is_cut_up(p) and not p.to_local().numel()})


def goes_on(base) -> None:
    for shard in ("none", "frozen"):
        config = settings(steps=4, save_every=2, shard=shard, dtype="float32")
        run(base, f"few-{shard}", config, FEW, resume=True)


def test_ranks_without_a_row_of_a_tensor_leave_a_checkpoint_that_fewer_go_on_from_with_the_same_bytes(base, tmp_path):
    few = base.parent / "few"
    # A row for the gate of the shared expert, three for the router.
    tiny_model("qwen2_moe", num_experts=3, num_experts_per_tok=2).save_pretrained(few)
    tiny_tokenizer().save_pretrained(few)
    ended = job(tmp_path, 4, partial(begins, few))
    assert [e.status for e in ended] == [0] * 4, ended
    assert [rows for rows in ended[3].value if rows != 2] == [1, 3] and ended[0].value == []
    assert [e.status for e in job(tmp_path, 2, partial(goes_on, few))] == [0, 0]
    plain, sharded = (base.parent / f"few-{shard}" for shard in ("none", "frozen"))
    files = [f"{path.relative_to(plain)}" for path in plain.glob("checkpoints/*/*s")] + ["adapter/adapter.safetensors"]
    assert len(files) > 1 and column(sharded, "loss") == column(plain, "loss")
    for file in files:
        assert (sharded / file).read_bytes() == (plain / file).read_bytes(), file


def memory(base) -> list:
    """Bytes that a rank keeps of the layers' frozen weights, and what a forward and a backward gather."""
    with joined() as ranks:
        model = load(str(base), SELECTION, dtype="float32").train()
        layers = model.model.layers
        whole = sum(p.nbytes for p in layers.parameters() if not p.requires_grad)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        shard_frozen(model, ranks, torch.device("cpu"))
        assert ranks.lockstep and all(model.get_parameter(n) is p for n, p in trained.items())
        kept = sum(
            (p.to_local() if isinstance(p, DTensor) else p).nbytes for p in layers.parameters() if not p.requires_grad
        )
        with Traffic() as traffic:
            ids = torch.arange(8)[None] + int(os.environ["RANK"])
            model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        return [whole, kept, traffic.payload["allgather_base"], traffic.calls["allgather_base"]]


def test_a_rank_keeps_its_part_and_gathers_the_rest_in_both_directions(base, tmp_path):
    ended = job(tmp_path, 2, partial(memory, base))
    assert [e.status for e in ended] == [0, 0], ended
    for all_of_it, kept, gathered, calls in (e.value for e in ended):
        assert kept <= 0.6 * all_of_it
        # Three layers forward; those from the lowest that trains (the second) on again in the backward.
        assert calls == 5 and kept < gathered <= 2.2 * kept


def apart(base) -> list[list[str]]:
    """Of a model whose experts are dealt out, the frozen weights of layers that are cut up, and those that are not."""
    with joined() as ranks:
        model = load(str(base), SELECTION, dtype="float32", ranks=ranks)
        shard_frozen(model, ranks, torch.device("cpu"), dealt_pools(model))
        assert is_dealt(model) and is_apart(model)
        frozen = {n: p for n, p in model.model.layers.named_parameters() if not p.requires_grad}
        return [[n for n, p in frozen.items() if is_cut_up(p) is cut] for cut in (True, False)]


def test_of_dealt_experts_nothing_is_cut_up_and_all_else_that_is_frozen_is(base, tmp_path):
    ended = job(tmp_path, 2, partial(apart, base))
    assert [e.status for e in ended] == [0, 0], ended
    for cut, kept in (e.value for e in ended):
        assert len(kept) > 3 and all(".frozen_" in name for name in kept)
        assert len(cut) > 9 and not any(".frozen_" in name for name in cut)


def test_what_is_not_cut_up_goes_to_the_device_too(monkeypatch):
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda *_, **__: None)
    model = tiny_model()
    shard_frozen(model, FirstOfTwo(), torch.device("meta"))  # in the place of a GPU
    assert all(p.is_meta for p in model.parameters())


def test_one_process_keeps_all_and_a_model_without_layers_is_refused():
    linear = torch.nn.Linear(2, 2)
    shard_frozen(linear, ALONE, torch.device("cpu"))
    assert not ALONE.lockstep and not any(isinstance(p, DTensor) for p in linear.parameters())

    with pytest.raises(InputError, match="layers are not told"):
        shard_frozen(linear, FirstOfTwo(), torch.device("cpu"))
    with pytest.raises(InputError, match="shard frozen goes with the method esft, not with full"):
        TrainConfig(method="full", shard="frozen")


def look_at_parts() -> None:
    with joined() as ranks:
        mesh = init_device_mesh("cpu", (ranks.size,))
        for rows in (1, 3, 4):  # fewer than there are ranks, whose parts some of them lack
            tensor = torch.arange(rows * 2.0).view(rows, 2)
            cut = distribute_tensor(tensor, mesh, [Shard(0)])
            assert is_cut_up(cut) and not is_cut_up(tensor)
            assert len(cut.to_local()) == (1 if ranks.rank < rows else 0)
            assert torch.equal(whole(cut), tensor) and not is_cut_up(whole(cut))
            assert whole(tensor).data_ptr() == tensor.data_ptr()
            assert not whole(tensor.requires_grad_()).requires_grad


def test_a_tensor_is_whole_again_from_the_parts_that_ranks_have_of_it(tmp_path):
    assert [(e.status, e.said) for e in job(tmp_path, 4, look_at_parts)] == [(0, "")] * 4
