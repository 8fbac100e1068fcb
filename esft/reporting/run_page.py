"""A run as one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.errors import InputError
from esft.reporting.answers import Evaluation, changes
from esft.reporting.curves import charts_of
from esft.reporting.experts import LayerLoad, check_alike, check_scores, explained, heatmap, loads, overlap
from esft.reporting.figures import figure, share, size
from esft.reporting.page import write_page
from esft.reporting.pictures import draw_all, draw_loads
from esft.reporting.record import RunRecord, base_size, named
from esft.runs.config import TrainConfig
from esft.scoring.expert_scores import RULES, ExpertScores

EXAMPLES = 5  # of each kind of answer
_MOMENTS = {"adamw": 8, "adamw_8bit": 2}  # bytes a trained parameter


def _seconds(value: float) -> str:
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# Figures of a summary that the page begins with: their names there and here.
_MEASURED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("trained_parameters", "trained parameters", figure),
    ("stored_bytes", "stored", size),
    ("seconds", "time", _seconds),
    ("peak_rss", "peak memory", size),
    ("peak_gpu_memory", "peak GPU memory", size),
)


@dataclass(frozen=True)
class Beside:
    """Files that tell of a run what its own folder does not.

    Attributes:
        runs: folders of others, whose selections are compared with this one's.
        scores: what the experts were chosen by, a file of ``esft score``.
        scores_after: the same measured with the adapter that was trained.
        eval_before: of the base, a file that ``esft eval --out`` wrote.
        eval_after: of what was trained.
    """

    runs: Sequence[str | Path] = ()
    scores: str | Path | None = None
    scores_after: str | Path | None = None
    eval_before: str | Path | None = None
    eval_after: str | Path | None = None

    @property
    def paths(self) -> list[str | Path | None]:
        """All of them."""
        return [*self.runs, self.scores, self.scores_after, self.eval_before, self.eval_after]


def write_run_page(run: str | Path, path: str | Path, beside: Beside | None = None) -> None:
    """A page that tells what a run chose and why, how its training went, and what came of it.

    Raises InputError for a folder in which no run has begun, and naming the file that is not what it should be or is of
    another model or other records; DiskError when the page cannot be written.
    """
    beside = beside or Beside()
    record = RunRecord.read(run)
    values = _head(record) | _choice(record, beside) | _load(record, beside)
    values |= _overlaps(record, beside) | _answers(beside) | _course(record)
    values["facts"] += values["answered"]
    sections = {
        "choice": "What was chosen",
        "overlap": "Other runs' choice",
        "course": "Training",
        "load": "Expert load",
        "answers": "Answers",
        "sizes": "Sizes",
        "settings": "Settings",
        "origin": "Origin",
    }
    shown = {"overlap": values["overlaps"], "load": values["loads_after"], "answers": values["evaluations"]}
    sections = [(id, name) for id, name in sections.items() if shown.get(id, True)]
    write_page(path, "run.html.jinja", record=record, beside=beside, sections=sections, **values)


def _head(record: RunRecord) -> dict[str, Any]:
    summary, lines = record.summary or {}, record.measured
    facts = [("method", record.config.method), ("steps", f"{record.steps:,} of {record.config.steps:,}")]
    if "loss" in record.lines:
        loss = summary.get("train_loss", record.lines["loss"].values[-1])
        facts.append(("loss, last steps" if "train_loss" in summary else "loss, last step", figure(loss)))
    facts += [(f"{name.replace('_', ' ')}, last", figure(line.values[-1])) for name, line in lines.items()]
    facts += [(what, text(record.figures[name])) for name, what, text in _MEASURED if record.figures.get(name)]
    return {"title": f"Run {named([record])[0]}", "facts": facts, "sizes": _sizes(record)}


def _sizes(record: RunRecord) -> list[tuple[str, str, str, str]]:
    """What the run trained and stored beside what full fine-tuning of the base does: name, run, full, share."""
    trained, base = record.figures.get("trained_parameters"), base_size(record)
    if trained is None or base is None:
        return []
    parameters, nbytes = base
    rows = [("stored", record.figures.get("stored_bytes"), nbytes, size)]
    if parameters:
        moments = _MOMENTS[record.config.optimizer]
        rows.insert(0, ("trained parameters", trained, parameters, figure))
        rows.append(("AdamW's moments, computed", moments * trained, moments * parameters, size))
    return [(name, text(a), text(b), share(a / b)) for name, a, b, text in rows if a is not None and b]


def _choice(record: RunRecord, beside: Beside) -> dict[str, Any]:
    selection = record.selection
    scores = _scores(record, beside.scores)
    maps = []
    for rule in RULES if scores is not None else ():
        if by_layer := getattr(scores, f"{rule}_scores"):
            most = max(score for layer in by_layer.values() for score in layer.values())
            shown = share(most) if rule == "token" else figure(most)
            maps.append((rule.replace("_", " "), heatmap(by_layer, selection), shown))
    ways = explained(selection, scores) if selection is not None and scores is not None else []
    before = loads(selection, scores, None) if selection is not None else []
    total = sum(load.experts or 0 for load in before)
    return {"heatmaps": maps, "ways": ways, "chosen": before, "experts_in_all": total, "scores": scores}


def _load(record: RunRecord, beside: Beside) -> dict[str, Any]:
    before, after = _scores(record, beside.scores), _scores(record, beside.scores_after)
    if after is None or record.selection is None:
        return {"loads_after": [], "loads_drawn": None}
    if before is not None:
        check_alike(before, after, beside.scores_after)
    found: list[LayerLoad] = loads(record.selection, before, after)
    return {"loads_after": found, "loads_drawn": draw_loads(found)}


def _scores(record: RunRecord, path: str | Path | None) -> ExpertScores | None:
    if path is None:
        return None
    scores = ExpertScores.load(path)
    check_scores(record.selection, scores, path)
    return scores


def _overlaps(record: RunRecord, beside: Beside) -> dict[str, Any]:
    others = [RunRecord.read(run) for run in beside.runs]
    scores = _scores(record, beside.scores)
    found = []
    for name, other in zip(named([record, *others])[1:], others, strict=True):
        both = record.selection is not None and other.selection is not None
        layers = overlap(record.selection, other.selection, scores) if both else None
        same = other.origin["digests"]["model"] == record.origin["digests"]["model"]
        found.append((name, other.config.method, same, layers))
    return {"overlaps": found}


def _answers(beside: Beside) -> dict[str, Any]:
    before, after = (
        Evaluation.load(path) if path is not None else None for path in (beside.eval_before, beside.eval_after)
    )
    try:
        kinds = changes(before, after)
    except InputError as error:
        raise InputError(f"{beside.eval_after}: {error}") from error
    names = list(dict.fromkeys(name for each in (before, after) if each for name in each.figures))
    table = [(name, *(each.figures.get(name) if each else None for each in (before, after))) for name in names]
    examples = {kind: (len(found), found[:EXAMPLES]) for kind, found in kinds.items()}
    answered = [
        (f"{name.replace('_', ' ')}, before \u2192 after", f"{figure(old)} \u2192 {figure(new)}")
        for name, old, new in table
        if name != "records" and old is not None and new is not None
    ]
    return {"evaluations": table, "examples": examples, "answered": answered}


def _course(record: RunRecord) -> dict[str, Any]:
    usual = vars(TrainConfig(method=record.config.method))
    given = vars(record.config)
    settings = [(name, value, given[name] != usual[name]) for name, value in record.settings.items()]
    return {
        "charts": draw_all(charts_of(record.lines), record.path),
        "settings": settings,
        "measured": list(record.figures.items()),
        "digests": list(record.origin["digests"].items()),
    }
