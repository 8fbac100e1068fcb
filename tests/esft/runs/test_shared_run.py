"""A run's folder, as every rank of a job has it."""

import os
from dataclasses import replace

import pytest
import torch

from esft.errors import InputError
from esft.parallel.join import joined
from esft.parallel.ranks import ALONE, Ranks
from esft.runs.checkpoints import Best, State
from esft.runs.config import TrainConfig
from esft.runs.run_folder import RunFolder
from esft.runs.shared_run import SharedRun, shared_run
from esft.selection import ExpertSelection
from tests.esft.parallel.jobs import job

CONFIG = TrainConfig(steps=7, lr=3e-3, clip=float("inf"))
SELECTION = ExpertSelection({10: [3, 1], 2: [0]}, shared_experts=True)
ORIGIN = {"model": "m", "data": "d", "digests": {"model": "1", "data": "2"}}
BEST = Best(1, 0.25, 2, 1)
TENSORS = {"a": torch.tensor([1.0, float("-0.0")]), "b": torch.tensor([[3]], dtype=torch.uint8), "c": torch.tensor(2.5)}
BEGUN = {"model": "m", "data": "d"}
OF_FIRST = "begun_with check_origin checkpoints begin log holds metrics last_step stored_bytes write_summary".split()


def begin(out, ranks=ALONE) -> None:
    with shared_run(ranks, out, resume=False, overwrite=False) as run:
        run.begin(CONFIG, ORIGIN, SELECTION)
        with run.log(0) as log:
            log(1, loss=2.0, lr=0.1, tokens_per_second=3.0)
        run.save(State(1, [2.0], TENSORS, BEST))


def go_on(out) -> list:
    with joined() as ranks, shared_run(ranks, out, resume=True, overwrite=False) as run:
        for name in () if ranks.main else OF_FIRST:
            setattr(run.folder, name, lambda *_: 1 / 0)
        config, selection = run.begun_with(None, None)
        run.check_origin(ORIGIN["digests"], {}, BEGUN)
        taken = []
        state = run.restore(taken.append)
        assert state is not None and [taken[0].step, taken[0].losses] == [state.step, state.losses] == [1, [2.0]]
        assert all(torch.equal(taken[0].tensors[name], t) for name, t in TENSORS.items())
        again = run.read(1)
        assert state.best == again.best == taken[0].best == BEST and again.losses == [2.0]
        assert all(torch.equal(again.tensors[name], t) for name, t in TENSORS.items())
        assert (run.last_step(), run.metrics()[0]["loss"]) == (1, 2.0)
        with run.log(1) as log:
            log(2, loss=1.0, lr=0.1, tokens_per_second=3.0)
        run.save(State(2, [2.0, 1.0], TENSORS))
        stored = run.leave(lambda folder: (folder.path / "adapter").mkdir() if folder is not None else None)
        assert (out / "adapter").is_dir()
        same = [config == CONFIG, selection == SELECTION, list((selection or SELECTION).experts) == [10, 2]]
        return [*same, stored, sorted(os.listdir(out / "checkpoints"))]


def test_every_rank_is_told_what_the_first_one_reads_and_only_that_one_writes(tmp_path):
    begin(tmp_path / "run")
    ended = job(tmp_path, 3, lambda: go_on(tmp_path / "run"))
    expected = [True, True, True, 0, ["step-000001", "step-000002"]]
    assert [(e.status, e.value, e.said) for e in ended] == [(0, expected, "")] * 3
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


def test_a_line_of_metrics_that_a_kill_has_torn_is_none(tmp_path):
    begin(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    with shared_run(ALONE, tmp_path / "run", resume=True, overwrite=False) as run:
        assert [line["step"] for line in run.metrics()] == [1]


def test_one_process_writes_and_reads_the_run_itself(tmp_path):
    begin(tmp_path / "run")
    assert go_on(tmp_path / "run")[:3] == [True] * 3
    with (
        pytest.raises(InputError, match="^cannot resume with data d: the run was begun with another$"),
        shared_run(ALONE, tmp_path / "run", resume=True, overwrite=False) as run,
    ):
        run.check_origin(ORIGIN["digests"] | {"data": "3"}, {}, BEGUN)
    with (
        pytest.raises(InputError, match="holds something already"),
        shared_run(ALONE, tmp_path / "run", resume=False, overwrite=False),
    ):
        pass


class Asked(Ranks):
    """Two ranks, as far as this one is asked: what it would have the other one agree to."""

    size = 2

    def __init__(self) -> None:
        self.facts: list = []

    def check_alike(self, facts) -> None:
        self.facts.append(dict(facts))


def test_states_are_alike_where_losses_names_and_every_value_are_and_the_ranks_own_parts_do_not_count(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("esft.runs.shared_run.CHUNK", 2)
    long, ranks = torch.arange(5.0), Asked()
    run = SharedRun(ranks, RunFolder(tmp_path))
    state = State(3, [1.0, 2.0], {"a": long, "b": TENSORS["b"]})
    last = torch.cat([long[:4], torch.tensor([9.0])])
    others = (
        replace(state, losses=[1.0, 2.5]), replace(state, tensors={"a": last, "b": TENSORS["b"]}),
        replace(state, tensors={"a": long, "c": TENSORS["b"]}),
    )  # fmt: skip
    own = replace(state, tensors=state.tensors | {"mine": long}, parts=frozenset({"mine"}))
    turned = replace(state, tensors=dict(reversed(state.tensors.items())), best=BEST)
    for each in (state, own, turned, *others):
        run.check_alike(each)
    first, *more = (facts["state after step 3"] for facts in ranks.facts)
    assert more[:2] == [first, first] and len({first, *more[2:]}) == 1 + len(others)


def differ() -> None:
    with joined() as ranks, shared_run(ranks, "run", resume=False, overwrite=False) as run:
        run.check_alike(State(3, [1.0], TENSORS))
        run.check_alike(State(4, [1.0], TENSORS | {"a": TENSORS["a"].abs() if ranks.rank else TENSORS["a"]}))


def test_states_that_differ_in_a_bit_are_found_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = job(tmp_path, 2, differ)
    assert "rank 1 has other state after step 4 than rank 0" in "".join(e.said for e in ended)
    assert sorted(e.status for e in ended) == [1, 2]
