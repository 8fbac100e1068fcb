"""What a run resumes from: the last state that is as it was written."""

import json
import shutil
import warnings
from dataclasses import replace
from unittest.mock import ANY

import pytest
import torch
from safetensors.torch import save_file

from esft.errors import InputError
from esft.runs.checkpoints import Best, Checkpoints, State, digests_of
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from esft.storage.files import file_digest, value_digest

RUN = {"model": "1", "data": "2", "settings": "3", "selection": "4"}


def state(step: int) -> State:
    return State(step, [float(i) / 3 for i in range(step)], {"master/a": torch.full((2, 3), float(step))})


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of the steps 2 and 4."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", RUN)
    for step in (2, 4):
        checkpoints.save(state(step))
    return checkpoints


def restored(checkpoints: Checkpoints) -> State | None:
    loaded = []
    found = checkpoints.restore(loaded.append)
    assert loaded == ([] if found is None else [found])
    return found


def same(one: State | None, other: State) -> bool:
    return (
        one is not None
        and (one.step, one.losses) == (other.step, other.losses)
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(one.tensors[name], other.tensors[name]) for name in other.tensors)
    )


def test_a_state_is_restored_as_it_was_saved(tmp_path, saved):
    assert same(restored(saved), state(4))
    assert saved.last_step() == 4
    assert restored(Checkpoints(tmp_path / "none", RUN)) is None
    assert Checkpoints(tmp_path / "none", RUN).last_step() == 0


@pytest.mark.parametrize("other", [{}, {"tokenizer": "6"}])
def test_a_checkpoint_of_before_a_run_had_digests_of_its_tokenizer_is_the_runs(saved, other: dict):
    later = Checkpoints(saved.folder, RUN | {"tokenizer": "5", "chat template": "6"})
    assert same(restored(later), state(4))
    Checkpoints(saved.folder, later.run | other).save(state(6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the last one, where it is of another tokenizer
        assert same(restored(later), state(4 if other else 6))


def test_the_last_two_are_kept_and_what_others_put_beside_them(tmp_path, saved):
    folder = tmp_path / "checkpoints"
    (folder / "step-zzz").mkdir()
    (folder / "step-7").mkdir()
    (folder / "step-000002" / "mine").write_text("mine")
    saved.save(state(6))
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == [
        "step-000002/mine",
        *(f"step-00000{step}/state.{kind}" for step in (4, 6) for kind in ("json", "safetensors")),
    ]
    assert same(restored(saved), state(6))
    assert (folder / "step-zzz").is_dir() and (folder / "step-7").is_dir()


def test_a_step_is_saved_anew_in_the_place_of_what_is_there_of_it(saved):
    saved.save(State(4, [1.0], {"master/a": torch.zeros(1)}))
    assert same(restored(saved), State(4, [1.0], {"master/a": torch.zeros(1)}))


def rewritten(change):
    """A change of ``state.json``."""

    def damage(folder):
        values = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(change(values)))

    return damage


def flip(folder):
    content = bytearray((folder / "state.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "state.safetensors").write_bytes(content)


def truncate(name: str, keep: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def signed(values: dict) -> dict:
    """With a digest that is right."""
    values = {name: value for name, value in values.items() if name != "digest"}
    return values | {"digest": value_digest(values)}


def other_tensors(folder):
    save_file({"master/a": torch.zeros(1)}, folder / "state.safetensors")


DAMAGE = {
    "no state": (lambda folder: (folder / "state.json").unlink(), "No such file"),
    "no tensors": (lambda folder: (folder / "state.safetensors").unlink(), r"safetensors: is not as it was written"),
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], "No such file"),
    "empty state": (truncate("state.json", 0), "not JSON"),
    "half a state": (truncate("state.json", 40), "not JSON"),
    "empty tensors": (truncate("state.safetensors", 0), "is not as it was written"),
    "half the tensors": (truncate("state.safetensors", 50), "is not as it was written"),
    "a flipped bit": (flip, "is not as it was written"),
    "other tensors": (other_tensors, "is not as it was written"),
    "another step": (rewritten(lambda v: v | {"step": 3}), "is not the state after step 4"),
    "a negative step": (rewritten(lambda v: v | {"step": -5}), "is not the state after step 4"),
    "a signed step": (rewritten(lambda v: signed(v | {"step": 999999})), "is not the state after step 4"),
    "a step that is none": (rewritten(lambda v: v | {"step": 4.0}), "is not the state after step 4"),
    "another loss": (
        rewritten(lambda v: v | {"losses": [9.0] * 4}),
        r"state.json: is not as it was written \(digest\)",
    ),
    "no digest": (rewritten(lambda v: {n: x for n, x in v.items() if n != "digest"}), "is not as it was written"),
    "a loss that is none": (rewritten(lambda v: signed(v | {"losses": ["a"]})), "losses must be a list of numbers"),
    "losses that sum to none": (rewritten(lambda v: signed(v | {"losses": [1e308] * 4})), "losses must be a list of"),
    "losses that are none": (rewritten(lambda v: signed(v | {"losses": 1})), "losses must be a list of numbers"),
    "another run": (rewritten(lambda v: signed(v | {"run": RUN | {"settings": "5"}})), "is of another run"),
    "a list": (rewritten(lambda v: [v]), "is not the state after step 4"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, saved, kind: str):
    damage, message = DAMAGE[kind]
    damage(tmp_path / "checkpoints" / "step-000004")
    with pytest.warns(UserWarning, match=f"a checkpoint is damaged, the run goes on from step-000002: .*{message}"):
        assert same(restored(saved), state(2))
    shutil.rmtree(tmp_path / "checkpoints" / "step-000002")
    with pytest.raises(InputError, match=f"step-000004/.*{message}.*; no other checkpoint is sound, begin the run ag"):
        restored(saved)


def test_all_damaged_checkpoints_are_named_and_the_last_one_where_none_is_sound(tmp_path):
    checkpoints = Checkpoints(tmp_path, RUN)
    for step in (1, 2, 3):
        checkpoints.save(best_of(step, 1))  # which is kept
    for step in (2, 3):
        flip(tmp_path / f"step-00000{step}")
    with pytest.warns(UserWarning, match="goes on from step-000001") as warned:
        assert same(restored(checkpoints), state(1))
    for step, said in zip((3, 2), warned, strict=True):
        assert f"step-00000{step}/state.safetensors: is not as it was written" in str(said.message)
    flip(tmp_path / "step-000001")
    with pytest.raises(InputError, match="step-000003/state.safetensors: is not .*; no other checkpoint is sound"):
        restored(checkpoints)


def test_settings_and_selection_that_differ_have_other_digests_and_more_steps_have_not():
    config, selection = TrainConfig(lr=1e-3), ExpertSelection({1: [2]})
    begun = digests_of(config, selection)
    assert digests_of(replace(config, steps=7), selection) == begun
    assert digests_of(replace(config, seed=1), selection) == begun | {"settings": ANY}
    others = (
        None, ExpertSelection({1: [3]}), ExpertSelection({2: [2]}), replace(selection, shared_experts=True),
        replace(selection, non_expert_modules=True),
    )  # fmt: skip
    found = [digests_of(config, other) for other in others]
    assert all(each == begun | {"selection": ANY} for each in found)
    assert len({each["selection"] for each in (begun, *found)}) == 1 + len(others)


def test_a_state_that_does_not_fit_is_a_damaged_one(saved):
    def load(found: State) -> None:
        if found.step == 4:
            raise InputError("tensor b is missing")

    with pytest.warns(UserWarning, match="goes on from step-000002: .*/step-000004/state.safetensors: tensor b"):
        assert same(saved.restore(load), state(2))


def test_a_state_of_before_there_were_digests_is_read(tmp_path, saved):
    (tmp_path / "checkpoints" / "step-000004" / "state.json").write_text('{"step": 4}')
    assert same(restored(saved), State(4, [], state(4).tensors))


def test_a_digest_is_of_every_byte_and_of_a_value_whatever_its_order(tmp_path):
    assert value_digest({"a": 1, "b": [2]}) == value_digest({"b": [2], "a": 1}) != value_digest({"a": 1, "b": [3]})
    (tmp_path / "x").write_bytes(bytes(3 << 20))
    before = file_digest(tmp_path / "x")
    with open(tmp_path / "x", "r+b") as file:
        file.seek(2 << 20)
        file.write(b"\1")
    assert file_digest(tmp_path / "x") != before


def test_tensors_of_any_strides_are_saved_as_their_values(saved):
    values = torch.arange(6.0).view(2, 3)
    saved.save(State(6, [], {"master/a": values.T, "master/b": values[:, 1]}))
    assert same(restored(saved), State(6, [], {"master/a": values.T, "master/b": values[:, 1]}))


def test_a_step_after_a_damaged_one_does_not_drop_the_sound_one_before(tmp_path, saved):
    saved.save(state(3))  # after step 4 was found damaged
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-00000{n}" for n in (2, 3, 4)]


def best_of(step: int, best: int, **more) -> State:
    return replace(state(step), best=Best(best, 0.5, 1, step, **more))


def test_what_a_kept_state_calls_best_is_kept_and_goes_when_neither_of_two_does(tmp_path):
    checkpoints = Checkpoints(tmp_path, RUN)

    def steps() -> list[int]:
        return sorted(int(path.name[5:]) for path in tmp_path.iterdir())

    for step, best, there in (
        (1, 1, [1]), (2, 1, [1, 2]), (3, 1, [1, 2, 3]), (4, 4, [1, 3, 4]), (5, 4, [4, 5]), (6, 4, [4, 5, 6]),
    ):  # fmt: skip
        checkpoints.save(best_of(step, best))
        assert steps() == there
    assert restored(checkpoints) is not None and checkpoints.read(4).best == Best(4, 0.5, 1, 4)
    checkpoints.save(state(7))
    assert steps() == [4, 6, 7]
    with pytest.raises(InputError, match="step-000005"):
        checkpoints.read(5)


@pytest.mark.parametrize(
    "wrong",
    [
        [], {}, {"step": 4, "value": 0.5, "stale": 0}, {"step": 4, "value": "x", "stale": 0, "seen": 4},
        {"step": 0, "value": 0.5, "stale": 0, "seen": 4}, {"step": 4, "value": 0.5, "stale": 0, "seen": 3},
        {"step": 4, "value": 0.5, "stale": 0, "seen": 5}, {"step": 4, "value": 0.5, "stale": -1, "seen": 4},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_that_does_not_say_which_step_is_best_is_named(tmp_path, saved, wrong: object):
    file = tmp_path / "checkpoints" / "step-000004" / "state.json"
    values = json.loads(file.read_text()) | {"best": wrong}
    del values["digest"]
    file.write_text(json.dumps(values | {"digest": value_digest(values)}))
    with pytest.raises(InputError, match="state.json: does not say which step is best$"):
        saved.read(4)
    saved.save(best_of(6, 6))  # and is no reason to fail for the next


def test_what_is_named_like_a_checkpoint_and_is_none_is_passed_over(saved):
    (saved.folder / "step-0000008").mkdir()  # of seven digits, where six would do
    (saved.folder / "step-000009").write_text("mine")
    assert saved.last_step() == 4 and same(restored(saved), state(4))


def test_a_link_to_a_checkpoint_of_another_run_is_none(tmp_path, saved):
    (tmp_path / "checkpoints" / "step-000004").rename(tmp_path / "another")
    (tmp_path / "checkpoints" / "step-000004").symlink_to(tmp_path / "another")
    for ask in (saved.last_step, lambda: restored(saved)):
        with pytest.raises(
            InputError, match="checkpoints/step-000004: is a link, where a run has a folder of its own$"
        ):
            ask()
