"""The libraries that train with several processes, each used for real on a swapped model."""

import os

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import esft
from tests.esft.models import tiny_model, token_batch
from tests.esft.parallel.jobs import job


def halves() -> list[dict[str, torch.Tensor]]:
    """Two unlike halves of a batch: what is in the second one is a single token, again and again."""
    batch = token_batch()
    length = batch["input_ids"].shape[1]
    return [{"input_ids": batch["input_ids"][:1]}, {"input_ids": torch.full((1, length), 7)}]


def only_of_the_first() -> esft.ExpertSelection:
    """Experts of each layer that tokens of the first half choose, and none of the second does."""
    first, second = (esft.score_experts(tiny_model(), [half]).token_scores for half in halves())
    chosen = {layer: [e for e, s in first[layer].items() if s > 0 and not second[layer][e]] for layer in first}
    assert all(chosen.values())
    return esft.ExpertSelection({layer: ids[:2] for layer, ids in chosen.items()})


def gradients(model) -> dict[str, torch.Tensor]:
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.requires_grad and p.numel()}


def squares(model, half: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**half, use_cache=False).logits.float().square().mean()


def by_ddp() -> float:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    model = esft.swap(tiny_model(), only_of_the_first()).train()
    wrapped = DistributedDataParallel(model)  # which waits for a gradient of everything that trains
    for _ in range(2):
        model.zero_grad()
        squares(wrapped, halves()[rank]).backward()
    found = gradients(wrapped)
    if rank == 0:
        save_file(found, "ddp.safetensors")
    dist.barrier()
    same = [torch.equal(found[n], gradient) for n, gradient in load_file("ddp.safetensors").items()]
    dist.destroy_process_group()
    return min(same)


def test_ddp_adds_zeros_of_a_rank_whose_tokens_no_trained_expert_gets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = job(tmp_path, 2, by_ddp)
    assert [(e.status, e.value) for e in ended] == [(0, True)] * 2, ended
    model = esft.swap(tiny_model(), only_of_the_first()).train()
    first, second = halves()
    ((squares(model, first) + squares(model, second)) / 2).backward()
    expected, found = gradients(model), load_file("ddp.safetensors")
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert gradient.count_nonzero()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def by_trainer(size: int) -> None:
    for state in (AcceleratorState, PartialState):  # of a process before this one was forked
        state._reset_state()
    model = esft.swap(tiny_model(), esft.ExpertSelection({1: [5, 2], 2: [0]})).train()
    ids = torch.randint(0, 256, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = TrainingArguments(
        f"out-{size}", max_steps=2, learning_rate=1.0, optim="sgd", per_device_train_batch_size=8 // size,
        ddp_backend="gloo" if size > 1 else None, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        max_grad_norm=0.0,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]  # no Dataset: Arrow's threads do not survive a fork
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    if os.environ.get("RANK", "0") == "0":
        save_file({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, f"{size}.safetensors")
    if dist.is_initialized():
        dist.barrier()  # the first one holds the store
        dist.destroy_process_group()


def test_transformers_trainer_by_two_processes_trains_what_one_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (alone,) = job(tmp_path, 1, lambda: by_trainer(1))
    several = job(tmp_path, 2, lambda: by_trainer(2))
    assert [alone.status, *(e.status for e in several)] == [0, 0, 0], (alone, several)
    start = esft.swap(tiny_model(), esft.ExpertSelection({1: [5, 2], 2: [0]}))
    expected = load_file("1.safetensors")
    for name, tensor in load_file("2.safetensors").items():
        moved = expected[name] - start.get_parameter(name).detach()
        assert moved.norm() > 1e-3
        assert (tensor - expected[name]).norm() <= 1e-4 * moved.norm()
