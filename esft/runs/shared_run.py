"""One run of several processes: the first one reads and writes its files, the others are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from esft.parallel.ranks import Ranks
from esft.runs.checkpoints import Best, State
from esft.runs.config import TrainConfig
from esft.runs.opened import cleared, opened
from esft.runs.run_folder import METRICS, RunFolder
from esft.selection import ExpertSelection

CHUNK = 1 << 24  # values that are hashed at a time


@contextmanager
def shared_run(ranks: Ranks, out: str | Path, resume: bool, overwrite: bool) -> Iterator[SharedRun]:
    """``opened`` for all ranks, who leave the block when all is written."""
    with opened(out, resume, overwrite) if ranks.main else nullcontext() as folder:
        yield SharedRun(ranks, folder or RunFolder(out))
    ranks.wait()


class SharedRun:
    """What a training needs of a ``RunFolder``, on every rank. All methods are collective.

    Attributes:
        folder: the run's; only the first rank looks into it.
    """

    def __init__(self, ranks: Ranks, folder: RunFolder):
        self.ranks, self.folder = ranks, folder

    @property
    def path(self) -> Path:
        return self.folder.path

    def begun_with(
        self, config: TrainConfig | None, selection: ExpertSelection | None
    ) -> tuple[TrainConfig, ExpertSelection | None]:
        """The settings and the selection to go on with."""

        def begun() -> list[Any]:
            settings, chosen = self.folder.begun_with(config, selection)
            return [asdict(settings), None if chosen is None else [asdict(chosen), [*chosen.experts.items()]]]

        settings, chosen = self.ranks.told(begun)
        if chosen is None:
            return TrainConfig(**settings), None
        return TrainConfig(**settings), ExpertSelection(**chosen[0] | {"experts": dict(chosen[1])})

    def check_origin(self, *begun: Any) -> None:
        if self.ranks.main:
            self.folder.check_origin(*begun)

    def restore(self, load: Callable[[State], None]) -> State | None:
        """Hand the last sound state to ``load``, on every rank. None without any."""
        state = self._told(self.folder.checkpoints().restore(load) if self.ranks.main else None)
        if state is not None and not self.ranks.main:
            load(state)
        return state

    def read(self, step: int) -> State:
        """The state after a step that was saved. Raises InputError where it cannot be read."""
        state = self._told(self.folder.checkpoints().read(step) if self.ranks.main else None)
        assert state is not None
        return state

    def _told(self, state: State | None) -> State | None:
        """The first rank's."""
        told = self.ranks.told(
            lambda: None if state is None else [state.step, state.losses, state.best and astuple(state.best)]
        )
        if told is None:
            return None
        tensors = self.ranks.spread(None if state is None else state.tensors)
        step, losses, best = told
        return state or State(step, losses, tensors, best and Best(*best))

    def begin(
        self, config: TrainConfig, origin: dict[str, Any], selection: ExpertSelection | None, anew: bool = False
    ) -> None:
        if self.ranks.main:
            (cleared(self.folder) if anew else self.folder).begin(config, origin, selection)

    def check_alike(self, state: State) -> None:
        """Raise RankError where a rank has come to another state than the first one."""
        if self.ranks.size > 1:
            self.ranks.check_alike({f"state after step {state.step}": _digest(state)})

    def save(self, state: State) -> None:
        """Write a checkpoint, of whole tensors. Raises RankError as ``check_alike`` does."""
        self.check_alike(state)
        whole = self.ranks.collected({name: state.tensors[name] for name in state.parts}, _put_together)
        if self.ranks.main:
            self.folder.checkpoints().save(replace(state, tensors={**state.tensors, **whole}, parts=frozenset()))
        self.ranks.wait()

    def log(self, done: int) -> AbstractContextManager[Callable[..., None]]:
        return self.folder.log(done) if self.ranks.main else nullcontext(lambda step, **values: None)

    def metrics(self) -> list[dict[str, Any]]:
        """Without a last line that a kill has cut short; none before the first."""
        holds = self.ranks.main and self.folder.holds(METRICS)
        return self.ranks.told(lambda: self.folder.metrics(torn=True) if holds else [])

    def last_step(self) -> int:
        return self.ranks.told(self.folder.last_step)

    def leave(self, write: Callable[[RunFolder | None], None]) -> int:
        """Write the outcome; only the first rank is given a folder for it. Returns the bytes of its tensors."""
        write(self.folder if self.ranks.main else None)
        self.ranks.wait()
        return self.ranks.told(self.folder.stored_bytes)

    def write_summary(self, measured: dict[str, Any]) -> None:
        if self.ranks.main:
            self.folder.write_summary(measured)


def _put_together(parts: list[Tensor]) -> Tensor:
    """Of a number every rank has the same; of experts each has some, one after the other."""
    return torch.cat(parts) if parts[0].dim() else parts[0]


def _digest(state: State) -> str:
    hashed = xxhash.xxh3_128(repr(state.losses).encode())
    for name, tensor in sorted((name, t) for name, t in state.tensors.items() if name not in state.parts):
        hashed.update(name.encode())
        for part in tensor.detach().reshape(-1).split(CHUNK):
            hashed.update(part.cpu().view(torch.uint8).numpy())
    return hashed.hexdigest()
