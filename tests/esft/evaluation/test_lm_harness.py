"""With the harness's own base class; where it is not installed, only how the command ends is tried."""

import runpy
import sys
from types import ModuleType

import pytest
import torch

import esft
from esft.data.encoding import encode_all
from esft.evaluation.loss import mean_loss
from tests.esft.models import record, save_tiny, tiny_encoder, tiny_model
from tests.esft.small_runs import SELECTION


@pytest.fixture
def tuned(tmp_path):
    """A base, and an adapter that differs from it."""
    pytest.importorskip("lm_eval")
    save_tiny(tmp_path / "base")
    model = esft.swap(tiny_model(), SELECTION)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    esft.save_adapter(model, tmp_path / "adapter")
    return tmp_path


def test_the_harness_finds_it_and_gets_the_likelihoods_of_the_adapted_model(tuned):
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from esft.evaluation.lm_harness import EsftLM

    assert get_model("esft") is EsftLM
    request = Instance("loglikelihood", {}, ("say a", " b"), 0, metadata=("t", 0, 1))
    likelihoods = []
    for adapter in ("", f",adapter={tuned / 'adapter'}"):
        lm = EsftLM.create_from_arg_string(f"model={tuned / 'base'}{adapter},dtype=float32", {"batch_size": 1})
        ((likelihood, _),) = lm.loglikelihood([request], disable_tqdm=True)
        model = lm.model
        ids = lm.tok_encode("say a b")
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(scores[i - 1, ids[i]]) for i in range(len(ids) - 2, len(ids)))
        assert likelihood == pytest.approx(expected, abs=1e-4)
        likelihoods.append(likelihood)
    assert abs(likelihoods[0] - likelihoods[1]) > 1e-3
    examples = encode_all(tiny_encoder(), [record("a", "b")], "here")
    assert mean_loss(model, examples, 258) != mean_loss(tiny_model(), examples, 258)


def command(monkeypatch, capsys, **harness) -> tuple:
    """The exit status of the module as a command, and what it says; with modules of this content as the harness's."""
    for name in ("lm_eval", "lm_eval.__main__", "lm_eval.api.registry", "lm_eval.models.huggingface"):
        module = ModuleType(name)
        vars(module).update(harness)
        monkeypatch.setitem(sys.modules, name, module if harness else None)
    monkeypatch.delitem(sys.modules, "esft.evaluation.lm_harness", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("esft.evaluation.lm_harness", run_name="__main__")
    return ended.value.code, capsys.readouterr().err


def test_the_command_ends_with_one_line_without_the_harness_and_for_what_it_cannot_load(monkeypatch, capsys):
    needs = "esft: needs lm-evaluation-harness: pip install 'esft[harness]'\n"
    assert command(monkeypatch, capsys) == (2, needs)

    def evaluate() -> None:
        raise esft.InputError("nope\x1b: no such folder")

    harness = {"cli_evaluate": evaluate, "register_model": lambda name: lambda kind: kind, "HFLM": object}
    assert command(monkeypatch, capsys, **harness) == (2, "esft: nope\\x1b: no such folder\n")
