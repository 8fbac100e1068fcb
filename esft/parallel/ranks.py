"""The processes of a job, the ranks: what each has to do, and what they tell one another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] (documented)

from esft.errors import LONGEST, RankError
from esft.parallel.deal import dealt
from esft.parallel.gradients import add_up
from esft.parallel.watch import Watch

T = TypeVar("T")
_POLL = 0.05  # seconds


class Ranks:
    """A job of one process, for which all of this does nothing. Methods are collective: every rank calls each of them.

    Attributes:
        rank, size: this process's number, from 0 on, and how many there are.
        lockstep: whether a model's forward pass, too, is collective.
    """

    rank = 0
    size = 1
    lockstep = False

    @property
    def main(self) -> bool:
        """Whether this process logs, draws bars and writes files."""
        return self.rank == 0

    def shares(self, rows: Sequence[T], length: Callable[[T], int]) -> list[list[T]]:
        """The rows of every rank, of about as many tokens; not collective."""
        lengths = [length(row) for row in rows]
        return [[rows[i] for i in share] for share in dealt(lengths, self.size)]

    def share(self, rows: Sequence[T], length: Callable[[T], int]) -> list[T]:
        """The rows of this rank; not collective."""
        return self.shares(rows, length)[self.rank]

    def rounds(self, rows: Sequence[T], length: Callable[[T], int], together: int) -> list[tuple[list[T], int]]:
        """This rank's rows in parts of at most ``together``, each with how many all ranks have in theirs.

        As many parts on every rank: some may be empty. Not collective.
        """
        parts = [[own[i : i + together] for i in range(0, len(own), together)] for own in self.shares(rows, length)]
        every = zip_longest(*parts, fillvalue=[])
        return [(part[self.rank], sum(map(len, part))) for part in every]

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """See ``esft.parallel.gradients``."""

    def sum(self, values: Tensor) -> Tensor:
        """Of every rank's values, of one shape, dtype and device."""
        return values

    def totals(self, *values: float) -> list[float]:
        """The sums of every rank's numbers."""
        return list(values)

    def largest(self, number: int, at: str = "a step's end") -> int:
        """Of every rank's numbers; ``at`` says what for, where a rank does not come."""
        return number

    def gather(self, rows: Tensor) -> Tensor:
        """Every rank's rows, as many of each, [n, ...] -> [ranks * n, ...]."""
        return rows

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """Of the sum of all ranks' rows this rank's part, [ranks * n, ...] -> [n, ...]."""
        return rows

    def collected(self, tensors: Mapping[str, Tensor], put: Callable[[list[Tensor]], Any] = list) -> dict[str, Any]:
        """Under each name all that ranks have of it, in their order, in the CPU's memory; for the first rank alone.

        Args:
            put: together, name by name, as they come.
        """
        return {name: put([tensor]) for name, tensor in tensors.items()}

    def told(self, make: Callable[[], Any]) -> Any:
        """A JSON value that the first rank makes, and all get."""
        return make()

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in their order."""
        return [value]

    def spread(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Tensors of the first rank's CPU memory, for all; the others give None."""
        return dict(tensors or {})

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        """Raise RankError where a rank has another JSON value than the first one under one of these names."""

    def progress(self) -> None:
        """Tell that this rank is at work, where it goes long without a collective operation."""

    def meet(self) -> None:
        """Wait for all ranks, for as long as those that are missing make ``progress``."""

    def wait(self) -> None:
        """Until the first rank has come here, too, which waits for nobody: for what it does alone, however long."""

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A block that the first rank runs before the others."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


ALONE = Ranks()


class Group(Ranks):
    """Several processes, in PyTorch's default process group.

    Args:
        store: of the job.
        watch: of this rank.
    """

    def __init__(self, store: Store, watch: Watch):
        self.store, self.watch = store, watch
        self.rank, self.size = watch.rank, watch.size
        self._waits, self._meetings = 0, 0

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        with self.watch.waiting("the gradients' sum"):
            add_up(parameters)

    def sum(self, values: Tensor) -> Tensor:
        with self.watch.waiting("a sum"):
            total = values.clone()
            dist.all_reduce(total)
        return total

    def totals(self, *values: float) -> list[float]:
        return self.sum(torch.tensor(values, dtype=torch.float64)).tolist()

    def largest(self, number: int, at: str = "a step's end") -> int:
        with self.watch.waiting(at):
            found = torch.tensor(number)
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gather(self, rows: Tensor) -> Tensor:
        with self.watch.waiting("what all ranks' experts compute"):
            found = rows.new_empty(self.size * len(rows), *rows.shape[1:])
            dist.all_gather_single(found, rows)
        return found

    def scatter_sum(self, rows: Tensor) -> Tensor:
        with self.watch.waiting("the sum of what all ranks' experts compute"):
            own = rows.new_empty(len(rows) // self.size, *rows.shape[1:])
            dist.reduce_scatter_single(own, rows)
        return own

    def collected(self, tensors: Mapping[str, Tensor], put: Callable[[list[Tensor]], Any] = list) -> dict[str, Any]:
        kinds = self.gathered({name: [str(t.dtype)[6:], list(t.shape)] for name, t in tensors.items()})
        found: dict[str, Any] = {}
        for name in dict.fromkeys(name for held in kinds for name in held):
            parts: list[Tensor] = []
            for rank, (dtype, shape) in ((r, held[name]) for r, held in enumerate(kinds) if name in held):
                if self.main:
                    here = tensors[name].cpu() if rank == 0 else torch.empty(shape, dtype=getattr(torch, dtype))
                    parts.append(here)
                with self.watch.waiting("what other ranks hold"):
                    # As bytes: of some dtypes gloo knows nothing.
                    if self.main and rank:
                        dist.recv(parts[-1].view(-1).view(torch.uint8), rank)
                    elif rank and rank == self.rank:
                        dist.send(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8), 0)
            if self.main:
                found[name] = put(parts)
        return found

    def told(self, make: Callable[[], Any]) -> Any:
        text = json.dumps(make()).encode() if self.main else b""
        return json.loads(self._broadcast(text))

    def gathered(self, value: Any) -> list[Any]:
        self.meet()
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self.watch.waiting("an exchange"):
            lengths = torch.zeros(self.size, dtype=torch.int64)
            lengths[self.rank] = len(mine)
            dist.all_reduce(lengths)
            # Of one length, as all-gather needs it.
            padded = torch.nn.functional.pad(mine, (0, int(lengths.max()) - len(mine)))
            every = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(every, padded)
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(every, lengths.tolist(), strict=True)]

    def spread(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        kinds = {name: [str(t.dtype)[6:], t.shape] for name, t in (tensors or {}).items()}
        found: dict[str, Tensor] = {}
        for name, (dtype, shape) in self.told(lambda: kinds).items():
            empty = torch.empty(shape, dtype=getattr(torch, dtype))
            found[name] = empty if tensors is None else tensors[name].contiguous()
            with self.watch.waiting("the checkpoint's tensors"):
                # As bytes: of some dtypes gloo knows nothing.
                dist.broadcast(found[name].view(-1).view(torch.uint8), 0)
        return found

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        first, *others = self.gathered(dict(facts))
        for rank, theirs in enumerate(others, 1):
            for name, value in first.items():
                if theirs.get(name) != value:
                    their, ours = (str(each)[:LONGEST] for each in (theirs.get(name), value))
                    raise RankError(f"rank {rank} has other {name} than rank 0: {their}, not {ours}")

    def progress(self) -> None:
        self.watch.progress()

    def meet(self) -> None:
        self._meetings += 1
        keys = [f"met/{self._meetings}/{rank}" for rank in range(self.size)]
        with self.watch.waiting("a meeting"):
            self.store.set(keys[self.rank], "")
            while not self.store.check(keys):
                time.sleep(_POLL)

    def wait(self) -> None:
        self._waits += 1
        key = f"here/{self._waits}"
        if self.main:
            self.store.set(key, "")
        while not self.store.check([key]):
            time.sleep(_POLL)

    def _broadcast(self, text: bytes) -> bytes:
        """The first rank's bytes; others' are passed over."""
        with self.watch.waiting("what the first rank tells"):
            length = torch.tensor(len(text))
            dist.broadcast(length, 0)
            told = torch.empty(int(length), dtype=torch.uint8)
            if self.main:
                told = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            dist.broadcast(told, 0)
        return bytes(told.tolist())
