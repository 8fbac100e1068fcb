"""With the harness's own base class; where it is not installed, only how the command ends is tried."""

import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import esft
from esft.checkpoint.load import load_tokenizer
from esft.data.encoding import encode_all
from esft.evaluation.loss import mean_loss
from tests.esft.checkpoint.files import rewrite_json
from tests.esft.models import record, save_tiny, tiny_encoder, tiny_model
from tests.esft.small_runs import SELECTION


def tuned_in(folder: Path) -> Path:
    """A base, and beside it an adapter that differs from it."""
    save_tiny(folder / "base")
    model = esft.swap(tiny_model(), SELECTION)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    esft.save_adapter(model, folder / "adapter")
    return folder / "base"


def test_the_harness_finds_it_and_gets_the_likelihoods_of_the_adapted_model(tmp_path):
    pytest.importorskip("lm_eval")
    base = tuned_in(tmp_path)
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from esft.evaluation.lm_harness import EsftLM

    assert get_model("esft") is EsftLM
    request = Instance("loglikelihood", {}, ("say a", " b"), 0, metadata=("t", 0, 1))
    likelihoods = []
    for adapter in ("", f",adapter={tmp_path / 'adapter'}"):
        lm = EsftLM.create_from_arg_string(f"model={base}{adapter},dtype=float32", {"batch_size": 1})
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


HARNESS = ("lm_eval", "lm_eval.__main__", "lm_eval.api.registry", "lm_eval.models.huggingface")


def stand_in(monkeypatch, **harness) -> None:
    """Modules of this content as the harness's; without content they are missing."""
    for name in HARNESS:
        module = ModuleType(name)
        vars(module).update(harness)
        monkeypatch.setitem(sys.modules, name, module if harness else None)
    monkeypatch.delitem(sys.modules, "esft.evaluation.lm_harness", raising=False)


class Base:
    """Keeps what the harness's class is given."""

    def __init__(self, **given):
        self.given = given


CONTENT = {"cli_evaluate": lambda: None, "register_model": lambda name: lambda kind: kind, "HFLM": Base}


def test_the_harness_is_given_the_adapted_model_its_tokenizer_and_what_else_was_asked(monkeypatch, tmp_path):
    base = tuned_in(tmp_path)
    stand_in(monkeypatch, **CONTENT)
    lm = import_module("esft.evaluation.lm_harness").EsftLM
    ids = torch.tensor([[1, 2, 3]])
    logits = []
    for adapter in (None, str(tmp_path / "adapter")):
        given = lm(str(base), adapter, dtype="float32", batch_size=3).given
        assert set(given) == {"pretrained", "tokenizer", "backend", "batch_size"}
        assert (given["backend"], given["batch_size"]) == ("causal", 3)  # or it would guess from the configuration
        assert given["tokenizer"].encode("ab") == load_tokenizer(str(base)).encode("ab")
        logits.append(given["pretrained"](input_ids=ids).logits)
    torch.testing.assert_close(logits[0], tiny_model()(input_ids=ids).logits)
    assert not torch.allclose(*logits, atol=0.01)
    rewrite_json(base / "config.json", lambda config: config.update(auto_map={"AutoConfig": "code.C"}, model_type="c"))
    with pytest.raises(esft.InputError, match="names Python code of its own"):  # unless it is asked for
        lm(str(base))


def command(monkeypatch, capsys, **harness) -> tuple:
    """The exit status of the module as a command, and what it says."""
    stand_in(monkeypatch, **harness)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("esft.evaluation.lm_harness", run_name="__main__")
    return ended.value.code, capsys.readouterr().err


def test_who_imports_it_without_the_harness_sees_what_is_missing(monkeypatch):
    stand_in(monkeypatch)
    with pytest.raises(ModuleNotFoundError, match="lm_eval"):
        import_module("esft.evaluation.lm_harness")


def test_a_library_that_the_harness_lacks_is_not_taken_for_the_harness(monkeypatch):
    stand_in(monkeypatch, **CONTENT)

    class Broken(ModuleType):
        def __getattr__(self, name: str):
            raise ModuleNotFoundError("No module named 'sqlitedict'", name="sqlitedict")

    monkeypatch.setitem(sys.modules, "lm_eval.__main__", Broken("lm_eval.__main__"))
    with pytest.raises(ModuleNotFoundError, match="sqlitedict"):
        runpy.run_module("esft.evaluation.lm_harness", run_name="__main__")


def test_the_command_ends_with_one_line_without_the_harness_and_for_what_it_cannot_load(monkeypatch, capsys):
    needs = "esft: needs lm-evaluation-harness: pip install 'esft[harness]'\n"
    assert command(monkeypatch, capsys) == (2, needs)

    def evaluate() -> None:
        raise esft.InputError("nope\x1b: no such folder")

    assert command(monkeypatch, capsys, **CONTENT | {"cli_evaluate": evaluate}) == (
        2,
        "esft: nope\\x1b: no such folder\n",
    )
