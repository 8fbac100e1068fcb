"""Any sequence of trainings, kills, resumes, overwrites and damage ends in the unbroken bytes or in a named error."""

import random
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.esft.chaos import KILLED, NAMED, Place, contents

# Before which of its file operations a training is killed: one of 4 steps has about 150 of them.
KILL = st.none() | st.integers(1, 160)
STATES = ("state.json", "state.safetensors")


class Runs(RuleBasedStateMachine):
    """One run folder, trained in by processes that may be killed."""

    place: Place

    @initialize()
    def begin(self) -> None:
        for path in sorted((self.place.folder / "run").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        self.run = self.place.folder / "run"
        self.run.mkdir(exist_ok=True)
        self.spoilt, self.mine = False, {}

    def work(self, before: int | None, **how) -> int:
        """Train; where nothing kills it, it ends unbroken or with an error."""
        kept = contents(self.run / "adapter") if (self.run / "adapter").is_dir() else None
        ended = self.place.wait(self.place.start(partial(self.place.train, **how), before))
        if ended == 0:
            self.spoilt = False
            self.place.check_run(beside=[path.name for path in self.mine])
        elif kept is not None and not any(self.run.glob("overwriting*/*")):
            assert contents(self.run / "adapter") == kept  # whole, or about to be put in place
        return ended

    @rule(config=st.sampled_from("ab"), before=KILL)
    def train(self, config: str, before: int | None) -> None:
        free = not any(self.run.iterdir())
        if self.work(before, config=config) == NAMED:
            assert not free and ("holds something already" in self.place.said or self.mine), self.place.said

    @rule(before=KILL)
    def resume(self, before: int | None) -> None:
        if self.work(before, config=None, resume=True) == NAMED:
            nothing = "holds no run to resume" in self.place.said
            assert nothing or self.spoilt or self.mine, self.place.said

    @rule(config=st.sampled_from("ab"), before=KILL)
    def overwrite(self, config: str, before: int | None) -> None:
        if self.work(before, config=config, overwrite=True) == NAMED:
            assert self.mine or self.spoilt, self.place.said

    @precondition(lambda self: list(self.run.rglob("state.*")))
    @rule(seed=st.integers(0, 999), how=st.sampled_from(("flip", "cut", "gone")))
    def damage_a_checkpoint(self, seed: int, how: str) -> None:
        draw = random.Random(seed)
        path = draw.choice(sorted(self.run.rglob("state.*")))
        content = bytearray(path.read_bytes())
        self.spoilt = True
        if how == "gone":
            path.unlink()
        elif content and how == "cut":
            path.write_bytes(content[: draw.randrange(len(content))])
        elif content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)

    @precondition(lambda self: any(self.run.iterdir()))
    @rule(where=st.sampled_from(("notes.txt", "adapter/README.md", "checkpoints/notes.txt")))
    def a_user_adds_a_file(self, where: str) -> None:
        if (self.run / where).parent.is_dir():
            self.mine[self.run / where] = b"mine"
            (self.run / where).write_bytes(b"mine")

    @precondition(lambda self: self.mine)
    @rule()
    def the_user_takes_the_files_away(self) -> None:
        for path in self.mine:
            path.unlink()
        self.mine = {}

    @rule(config=st.sampled_from("ab"), resume=st.booleans())
    def two_at_once(self, config: str, resume: bool) -> None:
        how = {"config": None, "resume": True} if resume else {"config": config, "overwrite": True}
        ended = [self.place.wait(pid) for pid in [self.place.start(partial(self.place.train, **how)) for _ in "12"]]
        assert KILLED not in ended
        if 0 in ended:
            self.spoilt = False
            self.place.check_run(beside=[path.name for path in self.mine])

    @invariant()
    def files_of_others_stay(self) -> None:
        self.place.check_foreign()
        assert all(path.read_bytes() == content for path, content in getattr(self, "mine", {}).items())

    def teardown(self) -> None:
        """In the end a user gets there: going on, beginning, or overwriting where a checkpoint was damaged."""
        self.the_user_takes_the_files_away()
        if not self.spoilt:
            resumed = self.work(None, config=None, resume=True)
            assert resumed == 0 or self.work(None, config="b") == 0, self.place.said
        else:
            assert self.work(None, config="b", overwrite=True) == 0, self.place.said
        assert not [name for name in contents(self.run) if "esft-" in name or ".esft" in name]


@pytest.mark.slow
def test_whatever_happens_to_a_run_it_ends_unbroken_or_with_a_named_error():
    with tempfile.TemporaryDirectory() as folder:
        Runs.place = Place(Path(folder))
        run_state_machine_as_test(
            Runs,
            settings=settings(
                max_examples=12,
                stateful_step_count=8,
                deadline=None,
                derandomize=True,
                phases=[Phase.generate],
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
