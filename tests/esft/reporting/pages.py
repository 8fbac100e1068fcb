"""Run folders made without a training, and pages read back: what the tests of reporting share."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from esft.runs.config import TrainConfig
from esft.runs.run_folder import RunFolder
from esft.scoring.expert_scores import ExpertScores
from esft.selection import ExpertSelection
from esft.storage.files import write_json

SELECTION = ExpertSelection({1: [2, 0], 3: [1]}, shared_experts=True)
# Of four experts a layer; SELECTION is what the rule gives for a top_p above 0.5 and up to 0.7.
SCORES = ExpertScores(
    {1: {0: 0.3, 1: 0.2, 2: 0.5, 3: 0.0}, 3: {0: 0.1, 1: 0.7, 2: 0.1, 3: 0.1}},
    {1: {0: 0.1, 1: 0.23456, 2: 0.05, 3: 0.0}, 3: {0: 0.1, 1: 0.2, 2: 0.1, 3: 0.1}},
)
AFTER = ExpertScores({1: {0: 0.3, 1: 0.1, 2: 0.4, 3: 0.2}, 3: {0: 0.0, 1: 0.8, 2: 0.1, 3: 0.1}}, {})
_INLINE = {"code", "strong", "i"}
_VOID = {"meta", "link", "img", "source", "br", "hr", "input"}
_SUMMARY = {
    "steps": 4, "train_loss": 1.25, "eval_loss": 1.5, "trained_parameters": 300, "stored_bytes": 600,
    "seconds": 65.4, "tokens_per_second": 100.0, "peak_rss": 2_500_000_000, "peak_gpu_memory": 0,
}  # fmt: skip


def make_run(
    folder: Path,
    method: str = "esft",
    steps: int = 4,
    ended: bool = True,
    selection: ExpertSelection = SELECTION,
    evaluated: bool = True,
    more: dict[str, float] | None = None,
    model: str = "base",
    **settings: Any,
) -> Path:
    """The folder of a run as a training leaves it, but for checkpoints and what was trained.

    Args:
        more: further figures of each step.
    """
    run = RunFolder(folder)
    origin = {"model": model, "data": "d.jsonl", "base_settings": {}, "digests": {"model": "m1", "data": "d1"}}
    run.begin(TrainConfig(method=method, steps=4, **settings), origin, selection if method == "esft" else None)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 4.0 - step / 2, "lr": step * 1e-3, "tokens_per_second": 90.0 + step})
        lines[-1] |= more or {}
        if evaluated and step % 2 == 0:
            lines.append({"step": step, "eval_loss": 3 - step / 8})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ended:
        run.write_summary(dict(_SUMMARY) if evaluated else _SUMMARY | {"eval_loss": None})
    return folder


def write_evaluation(path: Path, *answers: tuple[str, str, str], loss: float = 1.0) -> Path:
    """A file as ``esft eval --out`` writes it, of (prompt, expected, given)."""
    outcomes = [{"prompt": p, "expected": e, "given": g, "correct": e == g} for p, e, g in answers]
    right = sum(outcome["correct"] for outcome in outcomes)
    figures = {"records": len(answers), "loss": loss, "exact_match": right / max(1, len(answers))}
    write_json(path, figures | {"answers": outcomes})
    return path


@dataclass
class Element:
    """What a tag of a page holds: its attributes, its own text and the elements in it."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    inside: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it, with single spaces."""
        if self.tag in ("script", "style"):
            return ""
        parts = (
            each if isinstance(each, str) else each.text if each.tag in _INLINE else f" {each.text} "
            for each in self.inside
        )
        return " ".join("".join(parts).split())

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """The elements in it of this tag and with such attributes, at any depth, in order."""
        found = []
        for each in self.inside:
            if isinstance(each, Element):
                same = all(each.attributes.get(name) == value for name, value in attributes.items())
                found += [each] * (same and tag in ("", each.tag)) + each.all(tag, **attributes)
        return found

    def one(self, tag: str = "", **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def rows(self) -> list[list[str]]:
        """A table's cells as text."""
        return [[c.text for c in row.inside if isinstance(c, Element)] for row in self.all("tr")]


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = [Element("")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"{tag} is closed within {self.open[-1].tag}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def read_page(path: Path) -> Element:
    """A page as its elements, after what has to hold of every page of ours."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert len(reader.open) == 1, f"{reader.open[-1].tag} is never closed"
    page = reader.open[0]
    check_safe(page)
    check_readable(page)
    return page


def check_safe(page: Element) -> None:
    """Nothing is loaded, and no script or style runs but the two whose hashes the policy has."""
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for tag in ("script", "style"):
        element = page.one(tag)
        content = "".join(each for each in element.inside if isinstance(each, str))
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert not element.attributes and rules[f"{tag}-src"] == f"'sha256-{digest}'"
    for element in page.all():
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name != "style", f"{element.tag} has {name}={value!r}"
            if name in ("src", "srcset", "href", "action", "data"):
                assert value.startswith(("data:image/svg+xml;base64,", "#")) or value == "data:,", value
    tags = {element.tag for element in page.all()}
    assert not tags & {"iframe", "object", "embed", "base", "form", "svg", "math"}, tags


def check_readable(page: Element) -> None:
    """Every section, picture, table and meter can be found and is told to who does not see it."""
    assert page.one("html").attributes["lang"] == "en" and page.one("title").text
    assert "width=device-width" in page.one("meta", name="viewport").attributes["content"]
    ids = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert len(set(ids)) == len(ids)
    links = [link.attributes["href"] for link in page.one("nav").all("a")]
    assert links == [f"#{section.attributes['id']}" for section in page.all("section")]
    for section in page.all("section"):
        assert section.one("h2").attributes["id"] == section.attributes["aria-labelledby"]
    for picture in page.all("picture"):
        assert len(picture.one("img").attributes["alt"]) > 20
        assert "dark" in picture.one("source").attributes["media"]
    for table in page.all("table"):
        widths = {len(row) for row in table.rows}
        assert len(widths) == 1 or "heatmap" in table.attributes.get("class", ""), table.rows
        assert all(head.attributes.get("scope") in ("row", "col") for head in table.all("th"))
    assert all(meter.attributes.get("aria-label") for meter in page.all("meter"))
