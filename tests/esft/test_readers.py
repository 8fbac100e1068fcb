"""Whatever bytes a file holds: a right value or a named error, in bounded time and memory.

``ESFT_CHAOS=1`` runs forty times as many cases.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esft.adapters.folder import MANIFEST, open_manifest
from esft.checkpoint.source import CONFIG, INDEX, open_config, weight_files
from esft.data.cache import load as load_cached
from esft.data.cache import save as save_cached
from esft.data.examples import Example, Examples
from esft.data.records import ROLES
from esft.data.sources import read_records
from esft.errors import InputError
from esft.optimizer.schedule import learning_rate
from esft.reporting.answers import Evaluation
from esft.runs.config import TrainConfig
from esft.runs.report import report
from esft.scoring.expert_scores import ExpertScores
from esft.scoring.select import select_experts
from esft.selection import ExpertSelection
from esft.storage.files import open_safetensors, safetensors_header, write_yaml

CASES = 800 * (40 if os.environ.get("ESFT_CHAOS") == "1" else 1)  # of each reader
SECONDS = 5.0  # of one case, on a machine that does other work too
GROWTH = 1 << 29  # bytes that all cases of a reader may add to the process's largest size

_key = st.one_of(
    st.sampled_from(
        (
            "experts shared_experts shared_expert non_expert_modules token_scores gate_scores 0 1 2 01 -1 1.0 messages "
            "role content format_version base_digest base_dtype base_model chosen_by weight_map metadata model_type "
            "text prompt completion conversations from value tools chat_template_kwargs weight "
            "step loss lr tokens_per_second eval_loss num_hidden_layers num_experts hidden_size architectures auto_map"
        ).split()
    ),
    st.text(max_size=6),
)
_leaf = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 9), st.floats(), st.text(max_size=8),
    st.sampled_from(["user", "assistant", "olmoe", "mixtral", "../a.safetensors", 10**4000, 1e308]),
)  # fmt: skip
_value = st.recursive(
    _leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_key, inner, max_size=4), max_leaves=12
)
_text = _value.map(json.dumps)
_NASTY = [b"NaN", b"-1", b"1e999", b"{", b"[" * 3000, b"9" * 5000, b'"', b"null", b"\xef\xbb\xbf", b"\x00"]


@st.composite
def damaged(draw: Callable[..., Any], good: bytes) -> bytes:
    """Bytes that are nearly a good file's: cut, doubled, changed in places, or with another's inside."""
    content = bytearray(good)
    for _ in range(draw(st.integers(0, 3))):
        places = [i + 1 for i, byte in enumerate(content) if byte in b":[,{ \n"]  # where a value or a key begins
        start = draw(st.integers(0, len(content)) | st.sampled_from([0, *places]))
        end = min(len(content), start + draw(st.just(0) | st.integers(0, 12)))
        put = draw(
            st.one_of(
                st.binary(max_size=4), _text.map(str.encode), st.just(bytes(content[start:end]) * 2),
                st.sampled_from(_NASTY),
            )
        )  # fmt: skip
        content[start:end] = put
    return bytes(content)


def bytes_like(*good: bytes) -> st.SearchStrategy[bytes]:
    """Mostly what is near to a good file, as a reader's last checks are behind its first ones."""
    near = [damaged(each) for each in good]
    return st.one_of(*near, *near, _text.map(str.encode), st.binary(max_size=60))


def runs(path: Path, content: bytes, read: Callable[[], Any]) -> Any:
    """What is read, or None after an error that names the file; in bounded time."""
    path.write_bytes(content)
    started = time.monotonic()
    try:
        return read()
    except InputError as error:
        assert str(path) in str(error) or str(path.parent) in str(error), error
        assert len(str(error)) < 2000
        return None
    finally:
        assert time.monotonic() - started < SECONDS


def property_of(*good: bytes) -> Callable[[Any], Any]:
    """Runs a test over such contents; the fixtures that it has are shared by all of them."""

    def decorate(test: Any) -> Any:
        test = given(content=bytes_like(*good))(test)
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
        return settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=checks)(test)

    return decorate


@pytest.fixture(autouse=True)
def memory():
    """All cases together leave the process about as large as it was."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWTH


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


SCORES = dump(
    {"token_scores": {"1": {"0": 0.25, "1": 0.75}, "3": {"0": 1}}, "gate_scores": {"1": {"0": 0.1, "1": 0.3}}}
)


@property_of(SCORES)
def test_scores(tmp_path: Path, content: bytes):
    if (scores := runs(path := tmp_path / "s.json", content, lambda: ExpertScores.load(path))) is None:
        return
    for layers in (scores.token_scores, scores.gate_scores):
        for layer, by_expert in layers.items():
            assert type(layer) is int and layer >= 0 and list(by_expert) == list(range(len(by_expert)))
            assert all(type(score) is float and 0 <= score < math.inf for score in by_expert.values())
    assert all(sum(layer.values()) == pytest.approx(1, abs=1e-2) for layer in scores.token_scores.values())
    if scores.token_scores:
        chosen = select_experts(scores, top_p=0.5)
        assert all(chosen.experts[layer] for layer in scores.token_scores)
    scores.save(path)
    assert ExpertScores.load(path) == scores


@property_of(dump({"experts": {"1": [0, 5], "12": []}, "shared_experts": True, "non_expert_modules": False}))
def test_selections(tmp_path: Path, content: bytes):
    if (selection := runs(path := tmp_path / "e.json", content, lambda: ExpertSelection.load(path))) is None:
        return
    assert all(type(e) is int and e >= 0 for ids in selection.experts.values() for e in ids)
    selection.check(dict.fromkeys(selection.experts, 65_536), shared_experts=True)
    selection.save(path)
    assert ExpertSelection.load(path) == selection


ANSWER = {"prompt": "p", "expected": "e", "given": "g", "correct": False}


@property_of(dump({"records": 1, "loss": 0.5, "exact_match": 0, "answers": [ANSWER]}))
def test_evaluations(tmp_path: Path, content: bytes):
    if (evaluation := runs(path := tmp_path / "e.json", content, lambda: Evaluation.load(path))) is None:
        return
    assert all(type(value) in (int, float) and math.isfinite(value) for value in evaluation.figures.values())
    for answer in evaluation.answers:
        assert isinstance(answer.correct, bool) and type(answer.prompt) is type(answer.given) is str


@property_of(
    b"lr: 1e-3\nsteps: 7 # of all\nclip: .inf\nmethod: full\nmicro_batch_size: null\n", b"- 1\n", b"a: &b [*b]"
)
def test_settings(tmp_path: Path, content: bytes):
    if (config := runs(path := tmp_path / "c.yaml", content, lambda: TrainConfig.load(path))) is None:
        return
    write_yaml(path, asdict(config))
    assert TrainConfig.load(path) == config
    assert 0 <= learning_rate(config, 0) <= config.learning_rate < math.inf


RECORD = dump({"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}], "id": 3})


TEXTS = dump([{"text": "a"}, {"prompt": "b", "completion": "c"}])
SHARED = dump({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[{}]"})


def check_records(read: Any) -> None:
    for record in read or ():
        if not record.messages:
            assert len(record.text) > record.prompt >= 0
            record.text.encode()
            continue
        assert any(message["role"] == "assistant" for message in record.messages[record.prompt :])
        assert record.messages[0]["role"] != "assistant"
        for message in record.messages:
            assert message["role"] in ROLES
            message.get("content", "").encode()  # whole characters


@property_of(RECORD, RECORD + b"\n\n" + RECORD, TEXTS, SHARED)
def test_records(tmp_path: Path, content: bytes):
    check_records(runs(path := tmp_path / "d.jsonl", content, lambda: read_records(path)))


@property_of(gzip.compress(RECORD, mtime=0))
def test_compressed_records(tmp_path: Path, content: bytes):
    check_records(runs(path := tmp_path / "d.jsonl.gz", content, lambda: read_records(path)))


def in_parquet(*rows: dict) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


@property_of(in_parquet(json.loads(RECORD)), in_parquet({"text": "a"}, {"text": "b"}))
def test_records_of_parquet(tmp_path: Path, content: bytes):
    check_records(runs(path := tmp_path / "d.parquet", content, lambda: read_records(path)))


def in_cache() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_cached(path := Path(folder) / "a.safetensors", Examples.of([Example([5, 6], [-100, 6])], 1, 0))
        return path.read_bytes()


@property_of(in_cache())
def test_what_is_kept_of_earlier_encodings(tmp_path: Path, content: bytes):
    found = runs(path := tmp_path / "a.safetensors", content, lambda: load_cached(path))
    assert found is None or (list(found), found.records) == ([Example([5, 6], [-100, 6])], 1)


@property_of(
    dump({"format_version": 1, "base_digest": "ab", "base_dtype": "float32", "base_model": "m", "chosen_by": {}})
)
def test_manifests(tmp_path: Path, content: bytes):
    manifest = runs(tmp_path / MANIFEST, content, lambda: open_manifest(tmp_path))
    if manifest is not None:
        assert manifest["format_version"] == 1 and isinstance(manifest["base_digest"], str)


@property_of(
    dump({"model_type": "olmoe", "num_experts": 8, "num_hidden_layers": 3, "architectures": ["OlmoeForCausalLM"]})
)
def test_configurations(tmp_path: Path, content: bytes):
    config = runs(tmp_path / CONFIG, content, lambda: open_config(tmp_path))
    if config is not None:
        assert isinstance(json.loads(content)["model_type"], str) and config.model_type


@property_of(dump({"metadata": {}, "weight_map": {"a": "b.safetensors", "c": "d-1.safetensors"}}))
def test_indices(tmp_path: Path, content: bytes):
    for name in ("b.safetensors", "d-1.safetensors"):
        (tmp_path / name).touch()
    for file in (runs(tmp_path / INDEX, content, lambda: weight_files(tmp_path)) or {}).values():
        assert Path(file).name == file and (tmp_path / file).is_file()


def tensors(header: Any, data: bytes = bytes(12)) -> bytes:
    text = dump(header)
    return struct.pack("<Q", len(text)) + text + data


FIRST = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@property_of(
    tensors({"a": FIRST, "b": FIRST | {"dtype": "BF16", "shape": [1, 2], "data_offsets": [8, 12]}}),
    struct.pack("<Q", 2**62) + b"{}",
)  # fmt: skip
def test_safetensors_headers(tmp_path: Path, content: bytes):
    header = runs(path := tmp_path / "t.safetensors", content, lambda: safetensors_header(path))
    if header is None:
        return
    with open_safetensors(path) as handle:
        assert set(handle.keys()) == header.keys()
        for name, info in header.items():
            assert 0 <= info.start <= info.end <= len(content) and all(size >= 0 for size in info.shape)
            assert tuple(handle.get_slice(name).get_shape()) == info.shape


LINES = [{"step": 1, "loss": 2.5, "lr": 1e-3, "tokens_per_second": 99.5}, {"step": 1, "eval_loss": 2}]


@property_of(b"\n".join(map(dump, LINES)))
def test_reports(tmp_path: Path, content: bytes):
    text = runs(tmp_path / "metrics.jsonl", content, lambda: report(tmp_path))
    assert text is None or text.startswith("| steps") or text.endswith("no step done yet")


@property_of(dump({"steps": 3, "loss": 2.5, "note": ["a", None]}))
def test_summaries(tmp_path: Path, content: bytes):
    (tmp_path / "metrics.jsonl").write_bytes(dump(LINES[0]))
    text = runs(tmp_path / "summary.json", content, lambda: report(tmp_path))
    assert text is None or text.startswith("| steps")
