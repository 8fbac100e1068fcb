"""transformers' Trainer with experts that are dealt out: the steps, gradients and adapters of a single process."""

from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

import esft
from esft.errors import InputError
from esft.parallel.join import joined
from esft.parallel.ranks import ALONE, Ranks
from esft.selection import ExpertSelection
from esft.training.dealt_trainer import DealtTrainer
from tests.esft.models import save_tiny, tiny_model
from tests.esft.parallel.jobs import job, refused

# In one of these layers a rank of two trains none, in the other one of them has one more.
EXPERTS = ExpertSelection({1: [6, 2, 7], 2: [3]})
EVERYTHING = ExpertSelection(EXPERTS.experts, shared_experts=True, non_expert_modules=True)
QUIET = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
# Name -> what trains, and the settings. Every step's gradients are clipped to a tenth or so, but for the first case.
CASES = {
    "plain": (EXPERTS, {"max_grad_norm": 0.0}),
    "clipped": (EXPERTS, {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2}),
    "everything": (EVERYTHING, {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2, "weight_decay": 0.1}),
    "lora": (EXPERTS, {"max_grad_norm": 0.1}),
    "checkpointed": (EVERYTHING, {"gradient_checkpointing": True, "max_grad_norm": 0.1}),
}
STEPS = 3


class Kept(TrainerCallback):
    """Every step's gradients, as the optimizer gets them."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        for name, p in model.named_parameters():
            if p.requires_grad and p.numel():
                self.gradients[f"{state.global_step}/{name}"] = p.grad.clone()


def rows(count: int = 24) -> list[dict[str, list[int]]]:
    """Of unlike numbers of tokens that count: no Dataset, as Arrow's threads do not survive a fork."""
    ids = torch.randint(0, 256, (count, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": [-100] * (i % 7) + row[i % 7 :]} for i, row in enumerate(ids)]


def arguments(out: Path, ranks: Ranks, **settings) -> TrainingArguments:
    together = 8 // settings.get("gradient_accumulation_steps", 1)
    return TrainingArguments(
        str(out), max_steps=STEPS, learning_rate=3e-3, per_device_train_batch_size=together // ranks.size,
        per_device_eval_batch_size=8 // ranks.size, **QUIET | settings,
    )  # fmt: skip


def trained(base: Path, name: str, out: Path, ranks: Ranks) -> dict:
    """One of ``CASES`` by this rank."""
    selection, settings = CASES[name]
    model = esft.load(str(base), selection, dtype="float32", ranks=ranks).train()
    whole = model
    if name == "lora":
        torch.manual_seed(ranks.rank)  # other weights of LoRA than the first rank's, before it gives them its own
        lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        whole = get_peft_model(model, lora)
        esft.thaw(model)
    kept = Kept()
    kind = DealtTrainer if ranks.size > 1 else Trainer
    trainer = kind(
        whole, arguments(out, ranks, **settings), train_dataset=rows(), eval_dataset=rows(8), callbacks=[kept]
    )
    trainer.train()
    save_file(kept.gradients, out / f"gradients-{ranks.rank}.safetensors")
    esft.save_adapter(model, out / "adapter")
    if name == "plain":
        trainer.save_model(str(out / "model"))
    log = trainer.state.log_history
    found = {figure: [entry[figure] for entry in log if figure in entry] for figure in ("loss", "grad_norm")}
    return found | {"eval_loss": trainer.evaluate()["eval_loss"]}


def every(base: Path, folder: Path, end: str) -> dict:
    for state in (AcceleratorState, PartialState):  # of a process before this one was forked
        state._reset_state()
    found = {}
    with joined() as ranks:
        for name in CASES:
            (out := folder / f"{name}-{end}").mkdir(exist_ok=True)
            found[name] = trained(base, name, out, ranks)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder, what a single process says of each case, and what both ranks do."""
    folder = tmp_path_factory.mktemp("dealt")
    save_tiny(folder / "base")
    (alone,) = job(folder, 1, partial(every, folder / "base", folder, "alone"))
    ranks = job(folder, 2, partial(every, folder / "base", folder, "dealt"))
    assert [e.status for e in (alone, *ranks)] == [0, 0, 0], (alone, ranks)
    return folder, alone.value, [e.value for e in ranks]


@pytest.mark.parametrize("name", CASES)
def test_loss_norm_and_every_gradient_are_those_of_a_single_process(runs, name: str):
    folder, alone, ranks = runs
    for figure, expected in alone[name].items():
        for found in ranks:
            assert found[name][figure] == pytest.approx(expected, rel=1e-5), figure
    largest = CASES[name][1]["max_grad_norm"]
    assert len(alone[name]["grad_norm"]) == STEPS and min(alone[name]["grad_norm"]) > 2 * largest
    expected = load_file(folder / f"{name}-alone" / "gradients-0.safetensors")
    parts = [load_file(folder / f"{name}-dealt" / f"gradients-{rank}.safetensors") for rank in range(2)]
    assert parts[0].keys() | parts[1].keys() == expected.keys()
    for n, gradient in expected.items():
        here = [part[n] for part in parts if n in part]
        found = torch.cat(here) if ".trained_" in n else here[0]
        assert all(torch.equal(each, found) for each in here) or ".trained_" in n
        rel = 1e-5 if n.startswith("0/") else 1e-3  # later ones are of weights that differ a little
        assert torch.linalg.vector_norm(found - gradient) <= rel * torch.linalg.vector_norm(gradient), n


@pytest.mark.parametrize("name", CASES)
def test_adapters_are_those_of_a_single_process(runs, name: str):
    folder, *_ = runs
    base, alone, dealt = (
        load_file(folder / path) for path in ("base/model.safetensors", *(
            f"{name}-{end}/adapter/adapter.safetensors" for end in ("alone", "dealt")
        ))
    )  # fmt: skip
    for file in ("expert_cfg.json",):
        assert (folder / f"{name}-dealt/adapter" / file).read_bytes() == (
            folder / f"{name}-alone/adapter" / file
        ).read_bytes()
    assert dealt.keys() == alone.keys() and len(dealt) >= 4 * 3
    for n, tensor in alone.items():
        # Where a gradient is nearly zero Adam makes much of a rounding.
        change = torch.linalg.vector_norm(tensor - base[n])
        assert change and torch.linalg.vector_norm(dealt[n] - tensor) <= 0.01 * change, n


def test_the_stock_model_is_saved_by_all_ranks(runs):
    folder, *_ = runs
    adapter = load_file(folder / "plain-dealt/adapter/adapter.safetensors")
    saved = load_file(folder / "plain-dealt/model/model.safetensors")
    assert saved.keys() == load_file(folder / "base/model.safetensors").keys()
    assert all(torch.equal(saved[n], tensor) for n, tensor in adapter.items())


def spread(base: Path, folder: Path) -> dict:
    """Of a model that transformers has spread."""
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    with joined() as ranks:
        how = DistributedConfig(fsdp_size=2, ep_size=2)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, distributed_config=how)
        esft.swap(model.train(), EXPERTS, ranks=ranks)
        kept = Kept()
        options = arguments(folder / "spread", ranks, **CASES["clipped"][1])
        stock = refused(lambda: Trainer(model, options, train_dataset=rows()).train())
        trainer = DealtTrainer(model, options, train_dataset=rows(), callbacks=[kept])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"loss": losses, "grad_norm": norms, "stock": stock}


def test_a_model_that_transformers_has_spread_trains_too(runs):
    folder, alone, _ = runs
    ended = job(folder, 2, partial(spread, folder / "base", folder))
    assert [e.status for e in ended] == [0, 0], ended
    for found in (e.value for e in ended):
        assert found["stock"].startswith("the experts are dealt out over processes, and DistributedDataParallel")
        for figure in ("loss", "grad_norm"):
            assert found[figure] == pytest.approx(alone["clipped"][figure], rel=1e-5)


def refusals(folder: Path) -> dict:
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    found = {}
    with joined() as ranks:
        model = esft.swap(tiny_model(), EVERYTHING, ranks=ranks).train()
        before = [p.detach().clone() for p in model.parameters()]
        plain = arguments(folder, ranks)
        found["trainer"] = refused(lambda: Trainer(model, plain, train_dataset=rows()).train())
        found["accelerate"] = refused(lambda: Accelerator(cpu=True).prepare(model))
        found["ddp"] = refused(lambda: DistributedDataParallel(model))
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        found["stock"] = refused(lambda: DealtTrainer(tiny_model(), plain))
        found["resume"] = refused(lambda: DealtTrainer(model, plain, train_dataset=rows()).train(True))
        for name, asked in {
            "state": {"save_strategy": "steps"},
            "best": {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1,
                     "save_only_model": True, "load_best_model_at_end": True},
        }.items():  # fmt: skip
            options = arguments(folder, ranks, **asked)
            found[name] = refused(lambda options=options: DealtTrainer(model, options, eval_dataset=rows()))
        found["fp16"] = refused(lambda: DealtTrainer(model, arguments(folder, ranks, fp16=True)))
    return found


def test_what_would_train_another_model_is_refused(tmp_path):
    ended = job(tmp_path, 2, partial(refusals, tmp_path))
    assert [e.status for e in ended] == [0, 0], ended
    for found in (e.value for e in ended):
        for name in ("trainer", "accelerate", "ddp"):
            assert found[name].startswith("the experts are dealt out over processes, and DistributedDataParallel")
        assert "transformers' Trainer trains it" in found["stock"]
        assert "esft train --resume does" in found["resume"] and "set save_only_model" in found["state"]
        assert "load_best_model_at_end" in found["best"] and found["fp16"].startswith("fp16 scales")


def test_one_process_holds_all_experts_and_has_no_use_for_it():
    model: nn.Module = esft.swap(tiny_model(), EXPERTS, ranks=ALONE)
    with pytest.raises(InputError, match="not dealt out over processes"):
        DealtTrainer(model, arguments(Path("out"), ALONE))
