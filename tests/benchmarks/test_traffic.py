"""What is counted of the operations by which processes talk."""

import torch
import torch.distributed as dist

from benchmarks.traffic import Traffic
from esft.training.steps import Steps
from tests.esft.models import tiny_model
from tests.esft.parallel.jobs import job


def talk() -> list:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    with Traffic() as traffic:
        dist.all_reduce(torch.ones(3))
        dist.broadcast(torch.ones(2, dtype=torch.float64), 0)
        dist.all_gather([torch.empty(5) for _ in range(size)], torch.ones(5))
        dist.all_gather_into_tensor(torch.empty(size * 1000), torch.ones(1000))
        dist.all_gather_into_tensor(torch.empty(size * 2000), torch.ones(2000))
        dist.barrier()
    dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()
    return [rank, dict(traffic.calls), dict(traffic.payload), traffic.small]


def test_the_bytes_that_a_rank_gives_are_counted_by_operation(tmp_path):
    calls = {"allreduce": 1, "broadcast": 1, "allgather": 1, "allgather_base": 2, "barrier": 1}
    payload = {"allreduce": 12, "broadcast": 16, "allgather": 20, "allgather_base": 12_000, "barrier": 0}
    for rank, ended in enumerate(job(tmp_path, 2, talk)):
        assert ended.value == [rank, calls, payload, 12 + 16 + 20 + 4000]


def step(method: str) -> list:
    """Bytes of the gradients, and what a step sends."""
    import esft
    from esft.data.examples import Example
    from esft.parallel.join import joined
    from esft.runs.config import TrainConfig

    with joined() as ranks:
        model = tiny_model()
        if method == "esft":
            esft.swap(model, esft.ExpertSelection({1: [2, 7], 2: [0]}))
        steps = Steps(model.train(), 0, TrainConfig(method=method, batch_size=4, steps=3), ranks=ranks)
        rows = [Example(list(range(5, 13)), list(range(5, 13))) for _ in range(4)]
        with Traffic() as traffic:
            steps.update(1, rows)
        gradients = sum(p.nbytes for p in steps.optimizer.params.values())
    return [gradients, sum(traffic.payload.values()), traffic.small]


def test_a_step_sends_the_gradients_of_what_trains_once_and_nothing_else_of_size(tmp_path):
    sizes = {}
    for method in ("esft", "full"):
        for ended in job(tmp_path, 2, lambda method=method: step(method)):
            assert ended.status == 0, ended
            gradients, sent, small = ended.value
            assert gradients <= sent <= gradients + 200 and sent - small in (gradients, 0)
            sizes[method] = gradients
    assert sizes["esft"] < 0.1 * sizes["full"]
