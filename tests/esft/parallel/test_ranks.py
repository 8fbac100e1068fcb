"""What ranks tell one another, in jobs of real processes."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from esft.errors import RankError
from esft.parallel.join import current, joined
from esft.parallel.ranks import Group, Ranks
from tests.esft.parallel.jobs import job


def test_a_single_process_keeps_what_it_has():
    ranks, p = Ranks(), nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, 2.0])
    ranks.add_up([p])
    assert p.grad.tolist() == [1, 2]
    assert ranks.main and ranks.share(["a", "bb"], len) == ["a", "bb"]
    assert ranks.totals(1.5, 2) == [1.5, 2] and ranks.largest(3) == 3 and ranks.told(lambda: {"a": 1}) == {"a": 1}
    assert ranks.sum(torch.ones(1)).item() == 1 and ranks.gathered("x") == ["x"]
    tensors = {"t": torch.ones(1)}
    assert ranks.spread(tensors) == tensors and ranks.collected(tensors) == {"t": [tensors["t"]]}
    assert ranks.gather(tensors["t"]) is ranks.scatter_sum(tensors["t"]) is tensors["t"]
    ranks.check_alike({"data": 1})
    ranks.wait()
    with ranks.main_first(), joined() as same:
        assert same.size == 1 and current().size == 1


def exchanges() -> dict:
    found: dict = {}
    with joined() as ranks:
        assert current() is ranks
        with joined() as inner:
            assert inner is ranks
        r = ranks.rank
        found |= {"rank": r, "size": ranks.size, "main": ranks.main}
        found["totals"] = ranks.totals(r, 0.1)
        found["sum"] = ranks.sum(torch.tensor([[r, 1]])).tolist()
        found["largest"] = ranks.largest([7, 15, 2][r])
        found["told"] = ranks.told(lambda: {"from": r, "text": "ä"})
        found["gathered"] = ranks.gathered("x" * r)
        mine = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16), "none": torch.zeros(0)}
        spread = ranks.spread(mine if ranks.main else None)
        found["spread"] = {name: [str(t.dtype), t.tolist()] for name, t in spread.items()}
        found["share"] = ranks.share(["aaaa", "b", "cc", "d"], len)
        p = nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([1.0, r])
        ranks.add_up([p])
        found["gradient"] = p.grad.tolist()
        found["rows"] = ranks.gather(torch.tensor([[r, 9]])).tolist()
        parts = ranks.scatter_sum(torch.arange(6.0).view(6, 1) + 10 * r)
        found["parts"] = ranks.gather(parts).tolist()
        last = {"last": mine["b"], "scale": torch.ones(2).to(torch.float8_e8m0fnu)} if r == 2 else {}
        own = {"all": torch.full((r, 2), r), "number": torch.tensor(0.5)} | last
        found["collected"] = {
            name: [[str(t.dtype), t.float().tolist()] for t in each] for name, each in ranks.collected(own).items()
        }
        try:
            ranks.check_alike({"seed": 3, "data": "one" if r < 2 else "two" * 10**6})
        except RankError as error:
            found["unlike"] = str(error)
        with ranks.main_first():
            entered = time.monotonic()
            time.sleep(0.1 * ranks.main)
            left = time.monotonic()
        found["turns"] = ranks.gathered([entered, left])
        time.sleep(0.1 * r)
        came = time.monotonic()
        ranks.meet()
        found["meeting"] = ranks.gathered([came, time.monotonic()])
        ranks.wait()
    assert current().size == 1
    return found


def test_every_rank_gets_the_same_of_every_exchange(tmp_path):
    ended = job(tmp_path, 3, exchanges)
    assert [(e.status, e.said) for e in ended] == [(0, "")] * 3
    found = [e.value for e in ended]
    assert [f.pop("rank") for f in found] == [0, 1, 2]
    assert [f.pop("main") for f in found] == [True, False, False]
    assert [f.pop("share") for f in found] == [["aaaa"], ["cc"], ["b", "d"]]
    collected, *others = [f.pop("collected") for f in found]
    assert others == [{}, {}]  # for the first one alone
    assert collected == {
        "all": [["torch.int64", []], ["torch.int64", [[1, 1]]], ["torch.int64", [[2, 2], [2, 2]]]],
        "number": [["torch.float32", 0.5]] * 3,
        "last": [["torch.bfloat16", [1, 1]]],
        "scale": [["torch.float8_e8m0fnu", [1, 1]]],  # a dtype that gloo does not know
    }
    assert found[0] == found[1] == found[2]
    same = found[0]
    assert same["totals"] == [3, pytest.approx(0.3)] and same["sum"] == [[3, 3]]
    assert same["largest"] == 15 and same["size"] == 3
    assert same["told"] == {"from": 0, "text": "ä"} and same["gathered"] == ["", "x", "xx"]
    assert same["spread"] == {
        "a": ["torch.float32", [[0, 3], [1, 4], [2, 5]]],
        "b": ["torch.bfloat16", [1, 1]],
        "none": ["torch.float32", []],
    }
    assert same["rows"] == [[0, 9], [1, 9], [2, 9]]
    assert same["parts"] == [[30 + 3.0 * i] for i in range(6)]
    assert same["unlike"] == f"rank 2 has other data than rank 0: {('two' * 134)[:400]}, not one"
    assert same["gradient"] == [3, 3]
    (_, first_left), *others = same["turns"]
    assert all(first_left <= entered for entered, _ in others)
    came, left = zip(*same["meeting"], strict=True)
    assert max(came) <= min(left)


def test_progress_is_told_to_who_watches():
    told = []
    watch = SimpleNamespace(rank=1, size=2, progress=lambda: told.append("progress"))
    Group(None, watch).progress()
    assert told == ["progress"]
