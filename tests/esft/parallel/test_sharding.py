"""Frozen weights that are cut up over ranks: the same steps, in less memory."""

import os
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from benchmarks.traffic import Traffic
from esft.errors import InputError
from esft.parallel.join import joined
from esft.parallel.ranks import ALONE, Ranks
from esft.parallel.sharding import shard_frozen
from esft.runs.config import TrainConfig
from esft.swapping.load import load
from tests.esft.models import tiny_model
from tests.esft.parallel.jobs import job
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
        for shard in ("none", "frozen"):
            run(base, f"{name}-{shard}", TrainConfig(**vars(config) | {"shard": shard}))


def test_a_run_with_sharded_weights_leaves_the_bits_of_one_without(base, tmp_path):
    assert [e.status for e in job(tmp_path, 3, partial(trainings, base))] == [0, 0, 0]
    for name in CONFIGS:
        plain, sharded = (base.parent / f"{name}-{shard}" for shard in ("none", "frozen"))
        for figure in ("loss", "grad_norm", "eval_loss"):
            assert column(sharded, figure) == column(plain, figure)
        expected = load_file(plain / "adapter" / "adapter.safetensors")
        found = load_file(sharded / "adapter" / "adapter.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], tensor) for n, tensor in expected.items())


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
    for whole, kept, gathered, calls in (e.value for e in ended):
        assert kept <= 0.6 * whole
        # Three layers forward; those from the lowest that trains (the second) on again in the backward.
        assert calls == 5 and kept < gathered <= 2.2 * kept


class Two(Ranks):
    size = 2


def test_what_is_not_cut_up_goes_to_the_device_too(monkeypatch):
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda *_, **__: None)
    model = tiny_model()
    shard_frozen(model, Two(), torch.device("meta"))  # in the place of a GPU
    assert all(p.is_meta for p in model.parameters())


def test_one_process_keeps_all_and_a_model_without_layers_is_refused():
    linear = torch.nn.Linear(2, 2)
    shard_frozen(linear, ALONE, torch.device("cpu"))
    assert not ALONE.lockstep and not any(isinstance(p, DTensor) for p in linear.parameters())

    with pytest.raises(InputError, match="layers are not told"):
        shard_frozen(linear, Two(), torch.device("cpu"))
    with pytest.raises(InputError, match="shard frozen goes with the method esft, not with full"):
        TrainConfig(method="full", shard="frozen")
