import math
import os
import signal

import pytest

import esft
from esft.training import evaluations
from tests.esft.small_runs import column, run, settings


def test_a_loss_on_the_evaluation_data_that_is_not_finite_stops_the_run(base, out, fake, monkeypatch):
    monkeypatch.setattr(evaluations, "mean_loss", lambda *_: math.inf)
    with pytest.raises(esft.DivergenceError, match="step 6: loss inf on the evaluation data; lower the learning rate"):
        run(base, "run", settings())
    assert not (out / "summary.json").exists()


def test_a_signal_in_an_evaluation_stops_the_run_too(base, out, fake, monkeypatch):
    monkeypatch.setattr(evaluations, "mean_loss", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 0.25)
    with pytest.raises(esft.errors.Interrupted, match="stopped after step 7"):
        run(base, "run", settings())
    with pytest.raises(esft.errors.Interrupted, match="stopped after step 12"):
        run(base, "run", settings(), resume=True)
    assert column(out, "eval_loss") == [0.25, 0.25]
    result = run(base, "run", settings(), resume=True)
    assert column(out, "eval_loss") == [0.25, 0.25] and result.eval_loss == 0.25
