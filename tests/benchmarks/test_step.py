import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import step
from esft.training import compiled_layers
from esft.training.methods import Source
from tests.esft.models import _SIZES, FAMILIES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("model")
    sizes = (
        _SIZES | FAMILIES["deepseek_v2"][0] | {"moe_intermediate_size": 24}
    )  # grouped_mm wants multiples of 16 bytes
    AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v2", **sizes)).save_pretrained(folder)
    return str(folder)


def test_every_peer_is_timed_beside_ours(checkpoint, monkeypatch):
    monkeypatch.setattr(compiled_layers, "BACKEND", "eager")  # a compiler would take most of the time
    rows = step.run(checkpoint, records=4, length=16, rounds=2)
    assert [row["peer"] for row in rows] == [*step.peers_of(checkpoint), step.DENSE]
    assert all(row["peer tokens/s"] > 0 and row["esft tokens/s"] > 0 and row["peer / esft time"] > 0 for row in rows)


def test_labels_stand_at_the_end_of_every_record():
    labels = step.make_batch(300, 3, 20)["labels"]
    assert ((labels != step.IGNORE).sum(dim=1) == round(20 * step.SUPERVISED)).all()
    assert (labels[:, :13] == step.IGNORE).all()


def test_a_peer_of_another_loss_is_not_timed(checkpoint, monkeypatch):
    real = step.stock

    def wrong(*args, **kwargs):
        trainer = real(*args, **kwargs)
        return step.Trainer(trainer.model, lambda batch: trainer.loss(batch) * 1.1, trainer.update)

    monkeypatch.setattr(step, "stock", wrong)
    with pytest.raises(RuntimeError, match="transformers eager, full: loss .* not timed"):
        step.run(checkpoint, 4, 16, 2, {"transformers eager, full"})


def test_a_step_trains(checkpoint, monkeypatch):
    monkeypatch.setattr(step, "RATE", 1e-2)
    batch = step.make_batch(300, 2, 16)
    trainer = step.ours(Source(checkpoint), step.settings())
    before = trainer.loss(batch).item()
    for _ in range(3):
        trainer.step(batch)
    assert trainer.loss(batch).item() < before
