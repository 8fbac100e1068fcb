"""All cells of the comparison, each in a process of its own; what is measured already is not measured again."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.methods import tables, tasks
from benchmarks.methods.cell import METHODS, Cell, measure
from esft.storage.files import write_json

# What has been measured so far, and is not measured again; the tables of docs/methods_tables.md are made from it.
RESULTS = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Study:
    """What is compared: tasks, methods, seeds of the test, steps of a training, and sizes of the tasks' splits."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    sizes: dict[str, int]

    def cells(self, known: dict[Cell, dict[str, Any]]) -> list[Cell]:
        """All that can be measured with what is known, task after task: a study that is stopped has whole tables."""
        each = [replace(self, tasks=(task,)) for task in self.tasks]
        return [cell for alone in each for cell in (*alone.trials(), *alone.finals(known))]

    def trials(self) -> list[Cell]:
        """For the choice of each method's rate, on the validation split."""
        return [
            Cell(task, method, rate, 0, "validation", self.steps)
            for task in self.tasks
            for method in self.methods
            for rate in METHODS[method].rates
            if len(METHODS[method].rates) > 1
        ]

    def finals(self, known: dict[Cell, dict[str, Any]]) -> list[Cell]:
        """For the tables, at the rates that the trials have shown to be best; of those whose trials are all known."""
        cells = []
        for task in self.tasks:
            for method in self.methods:
                rates = METHODS[method].rates
                tried = [Cell(task, method, rate, 0, "validation", self.steps) for rate in rates]
                if len(rates) == 1 or all(cell in known for cell in tried):
                    best = (max(tried, key=lambda cell: known[cell]["score"]) if len(tried) > 1 else tried[0]).rate
                    seeds = self.seeds if METHODS[method].train else self.seeds[:1]
                    cells += [Cell(task, method, best, seed, "test", self.steps) for seed in seeds]
        return cells


def measured(study: Study, folder: Path, workers: int, results: Path) -> dict[Cell, dict[str, Any]]:
    """All cells, ``workers`` at a time.

    Those that the folder or the file of results has are not measured again; that file gets all, as soon as they are.
    """
    for task in study.tasks:
        tasks.scores(tasks.files(task, folder / "tasks", study.sizes))
    tasks.general(folder)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    known, running = found_in(results) | dict(_known(folder)), dict[Future[dict[str, Any]], Cell]()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            begun = {*known, *running.values()}
            waiting = [cell for cell in study.cells(known) if cell not in begun]
            for cell in waiting[: workers - len(running)]:
                running[pool.submit(_in_a_process, folder, cell)] = cell
            known |= found_in(results)  # of other studies, beside this one
            write_json(results, [known[cell] for cell in sorted(known)])
            if not running:
                return {cell: known[cell] for cell in study.cells(known)}
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                known[cell] = future.result()
                left = sum(cell not in known for cell in study.cells(known))
                print(f"{cell.name}: {known[cell]['score']:.1%}; {left} and those that follow are left", flush=True)


def found_in(results: Path) -> dict[Cell, dict[str, Any]]:
    """The cells of a file of results; none where there is no such file."""
    found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else []
    return {_cell(each): each for each in found}


def _known(folder: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    for file in sorted((folder / "cells").glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        yield _cell(found), found


def _cell(found: dict[str, Any]) -> Cell:
    return Cell(**{name: found[name] for name in Cell.__dataclass_fields__})


def _in_a_process(folder: Path, cell: Cell) -> dict[str, Any]:
    """Of its own, or the peak of memory would be that of an earlier cell; what it imports was imported once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=one, args=(folder, cell))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{cell.name}: ended with {process.exitcode}, see above")
    return json.loads(_file(folder, cell).read_text(encoding="utf-8"))


def _file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def one(folder: Path, cell: Cell) -> None:
    """Measure a cell and leave what was found in its file."""
    task = folder / "tasks" / cell.task
    found = measure(cell, task, folder / "general.jsonl", folder / "runs" / cell.name)
    write_json(_file(folder, cell), found)


SMOKE = Study(("settings",), ("base", "esft-token, shared"), (1, 2), 2, {"train": 64, "validation": 16, "test": 16})


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks methods", description="fine-tuning methods with error bars")
    parser.add_argument("--out", type=Path, default=Path("build/methods"), help="of everything written; goes on there")
    parser.add_argument("--tasks", default=",".join(tasks.TASKS), help="comma-separated (default: all)")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ; (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of a training; the tables are of these")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--smoke", action="store_true", help="two methods on a few records, to see that all works")
    parser.add_argument(
        "--results", type=Path, help="file of all figures, which gets these too (default: in this package)"
    )
    parser.add_argument("--tables", action="store_true", help="measure nothing, print the tables of that file")
    args = parser.parse_args(argv)
    out = args.out / "smoke" if args.smoke else args.out  # or the small tasks would be found as those of the study
    results = args.results or (out / "results.json" if args.smoke else RESULTS)
    if args.tables:
        print(_tables(results, args.steps))
        return
    chosen = tuple(args.tasks.split(",")), tuple(args.methods.split(";")), tuple(range(1, args.seeds + 1))
    for name, known in ((chosen[0], tasks.TASKS), (chosen[1], METHODS)):
        if unknown := [each for each in name if each not in known]:
            parser.error(f"there is no {unknown[0]!r}, but {', '.join(known)}")
    study = SMOKE if args.smoke else Study(*chosen, args.steps, tasks.SIZES)
    measured(study, out, args.workers, results)
    print(_tables(results, study.steps))


def _tables(results: Path, steps: int) -> str:
    """Of trainings that are as long as one another."""
    return tables.page([found for cell, found in found_in(results).items() if cell.steps == steps])
