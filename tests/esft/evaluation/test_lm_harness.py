"""With the harness's own base class; where it is not installed there is nothing to try."""

import pytest
import torch

import esft
from esft.data.encoding import encode_all
from esft.evaluation.loss import mean_loss
from tests.esft.models import record, save_tiny, tiny_encoder, tiny_model
from tests.esft.small_runs import SELECTION

pytest.importorskip("lm_eval")


@pytest.fixture
def tuned(tmp_path):
    """A base, and an adapter that differs from it."""
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
