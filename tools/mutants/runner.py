"""Runs tests against mutants, several at a time, each in a copy of the tree.

Importing PyTorch, Triton and transformers takes longer than most test files. So they are imported once, and every run
is a fork of the process that has them; this project's own modules are imported after the fork, from the copy.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.mutants.operators import Mutant

SLOWER = 5  # how many times longer than without the mutant tests may run before they count as hanging
SPARE = 30  # seconds besides
SUITE_LIMIT = 1800  # seconds of the whole suite


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant; ``killed_by`` is "mirror", "rest" or None, and ``hung`` that it was for want of time."""

    mutant: Mutant
    killed_by: str | None
    hung: bool = False


class Runner:
    """Worker processes, and a copy of the tree for each, which go when the block ends."""

    def __init__(self, root: Path, workers: int, seconds: float, whole: bool):
        self.root, self.workers, self.whole = root, workers, whole
        self.until = time.monotonic() + seconds

    def __enter__(self) -> Runner:
        self.folder = Path(tempfile.mkdtemp(prefix="mutants-"))
        tracked = subprocess.check_output(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=self.root, text=True
        )
        context = multiprocessing.get_context("fork")
        trees = context.Queue()
        for number in range(self.workers):
            tree = self.folder / str(number) / self.root.name
            for name in filter(None, tracked.split("\0")):
                if (source := self.root / name).is_file():
                    (tree / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, tree / name)
            if (shared := self.root.parent / "shared").is_dir():  # some tests read what lies beside the tree
                (tree.parent / "shared").symlink_to(shared)
            trees.put(tree)
        _settle()
        _import_what_is_large()
        self.pool = context.Pool(self.workers, _begin, (trees, self.until, self.whole))
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.terminate()
        self.pool.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, pairs: list[tuple[Mutant, str]]) -> Iterator[Outcome]:
        """Outcomes of (mutant, the test file that mirrors its module), as they come; some are left out for time."""
        return filter(None, self.pool.imap_unordered(_meet, pairs))


def _settle() -> None:
    """The environment of all tests, those of processes that they start too."""
    os.environ |= {
        "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    sys.dont_write_bytecode = True  # a mutant may have its module's size and second: its bytecode would be taken for it


def _import_what_is_large() -> None:
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401
    import triton  # noqa: F401
    from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Trainer  # noqa: F401


def _begin(trees, until: float, whole: bool) -> None:
    """What every worker keeps: its tree, when to stop, and how long tests take without a mutant."""
    global _tree, _until, _whole, _usual
    _tree, _until, _whole, _usual = trees.get(), until, whole, {}


def _meet(pair: tuple[Mutant, str]) -> Outcome | None:
    mutant, mirror = pair
    if time.monotonic() > _until:
        return None
    has_mirror = (_tree / mirror).is_file()
    if has_mirror and mirror not in _usual:
        begun = time.monotonic()
        if _tests_fail([mirror], SUITE_LIMIT):
            raise RuntimeError(f"{mirror} fails without a mutant")
        _usual[mirror] = time.monotonic() - begun
    path = _tree / mutant.path
    source = path.read_text(encoding="utf-8")
    try:
        path.write_text(mutant.apply(source), encoding="utf-8")
        if has_mirror and (how := _tests_fail([mirror], SLOWER * _usual[mirror] + SPARE)):
            return Outcome(mutant, "mirror", how == "hung")
        if _whole and (how := _tests_fail(_rest(mutant, mirror), SUITE_LIMIT)):
            return Outcome(mutant, "rest", how == "hung")
    finally:
        path.write_text(source, encoding="utf-8")
    return Outcome(mutant, None)


def _rest(mutant: Mutant, mirror: str) -> list[str]:
    """All other test files; those of the module's folder first."""
    files = (str(path.relative_to(_tree)) for path in sorted((_tree / "tests").rglob("test_*.py")))
    near = str(Path(mirror).parent)
    return sorted((file for file in files if file != mirror), key=lambda file: not file.startswith(near))


def _tests_fail(tests: list[str], limit: float) -> Literal["failed", "hung"] | None:
    """Whether one of these test files fails, or takes longer than so many seconds, in a fork of this process."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            multiprocessing.current_process().daemon = False  # a worker's fork is one, and could start no processes
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            os.chdir(_tree)
            os.environ["PYTHONPATH"] = str(_tree)  # of the processes that tests start
            sys.path[:] = [str(_tree), *(p for p in sys.path if p not in ("", str(Path.cwd())))]
            for name in [name for name in sys.modules if name.split(".")[0] in ("tools", "tests")]:
                del sys.modules[name]  # the runner's own
            import pytest

            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
        finally:
            os._exit(1 if status else 0)
    until = time.monotonic() + limit
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hung"
        time.sleep(0.05)
    return "failed" if done[1] else None
