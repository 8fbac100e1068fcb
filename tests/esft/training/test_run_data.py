import json

import pytest

import esft
from esft.checkpoint.source import Reach
from esft.data.batches import Packing, epoch_batches, steps
from esft.data.mixing import Mix, mixed_in
from esft.data.report import data_report
from esft.data.sources import DataSource, read_records
from esft.runs.config import TrainConfig
from esft.storage.files import file_digest, value_digest
from esft.training import run_data
from esft.training.run_data import RunData, held_out_sources, sources_of
from tests.esft.models import chat, tiny_encoder, tiny_tokenizer, write_records

REACH = Reach(256, 300)


@pytest.fixture
def paths(tmp_path):
    return [write_records(tmp_path / "a.jsonl", 12), write_records(tmp_path / "b.jsonl", 5)]


def read(data, **settings) -> RunData:
    return RunData(
        sources_of(data), tiny_tokenizer(), REACH, TrainConfig(**({"batch_size": 4, "steps": 9} | settings))
    ).read()


def test_one_source_or_several_are_sources(paths):
    one, other = map(str, paths)
    assert sources_of(paths[0]) == sources_of([one]) == [DataSource(one)]
    assert sources_of([f"{one}:2", f"{other}:1"]) == [DataSource(one, None, 2), DataSource(other, None, 1)]
    with pytest.raises(esft.InputError, match="b.jsonl: has no weight"):
        sources_of([f"{one}:2", other])


def test_the_batches_of_one_source_are_its_examples_epoch_after_epoch(paths):
    found = read(paths[0])
    examples = [tiny_encoder(256).encode(record) for record in read_records(paths[0])]
    assert list(found.examples) == examples
    whole = [[examples[i] for i in batch] for epoch in range(3) for batch in epoch_batches(examples, 4, 0, epoch)]
    assert list(found.batches(0)) == whole and list(found.batches(4)) == whole[4:]
    assert found.report() is not None and found.report().records == 12


def test_several_sources_are_one_set_or_drawn_from_by_weight(paths):
    both = read(paths)
    assert len(both.examples) == 17 and both.mix is None and both.name == f"{paths[0]}, {paths[1]}"
    weighted = read([f"{paths[0]}:1", f"{paths[1]}:3"])
    assert weighted.mix == Mix([12, 5], [1, 3])
    rows = [row for batch in list(weighted.batches(0))[:5] for row in batch]
    assert len(rows) == 17 and [row.ids for row in rows] != [
        row.ids for batch in list(both.batches(0))[:5] for row in batch
    ]


def test_the_digest_is_the_files_or_of_all_and_their_weights(paths):
    one, two = map(file_digest, paths)
    assert read(paths[0]).digest() == one
    assert read(paths).digest() == value_digest([[one, two], None])
    assert read([f"{paths[0]}:1", f"{paths[1]}:3"]).digest() == value_digest([[one, two], [1.0, 3.0]])


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_are_as_long_as_a_record_may_be(paths, strategy: str):
    found = read(paths[0], packing=True, packing_strategy=strategy, max_length=40)
    assert found.packing == Packing(40, strategy)
    rows = [row for batch in found.batches(0) for row in batch]
    assert max(len(row.ids) for row in rows) <= 40 and max(len(row.starts) for row in rows) > 1
    assert found.report().packing == found.packing


def test_what_wrapped_rows_cut_is_not_cut_before(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": chat("a", "b" * 99)}))
    rows = next(read(path, packing=True, packing_strategy="wrapped", max_length=30, batch_size=9).batches(0))
    assert sorted(len(row.ids) for row in rows) == [15, 30, 30, 30]
    found = read(path, packing=True, max_length=30, batch_size=9)
    (row,) = next(found.batches(0))
    assert len(row.ids) == 30 and found.report().truncated == 1
    for packing, whole in ((True, True), (False, False)):  # only where rows are packed does the strategy matter
        found = read(path, packing=packing, packing_strategy="wrapped", max_length=30)
        assert (len(found.examples[0].ids) > 30) == whole and found.report().truncated == (not whole)


@pytest.mark.parametrize(
    ("packing", "eval_packing", "packs"),
    [(False, None, False), (True, None, True), (True, False, False), (False, True, True)],
)
def test_the_evaluation_is_packed_as_the_training_unless_it_is_said(paths, packing, eval_packing, packs: bool):
    found = read(paths[0], packing=packing, eval_packing=eval_packing, max_length=60)
    (data,) = found.eval_sets({"task": DataSource.of(paths[1])})
    rows = data.examples
    assert (data.name, data.source, data.records) == ("task", str(paths[1]), [])
    assert (max(len(row.starts) for row in rows) > 1) == packs
    assert sum(len(row.ids) for row in rows) == sum(
        len(tiny_encoder().encode(record).ids) for record in read_records(paths[1])
    )
    assert found.eval_sets({}) == []


def test_evaluation_data_has_its_records_where_answers_are_compared_and_they_are_tried(paths, tmp_path):
    config = {"eval_metrics": "loss,exact_match"}
    (data,) = read(paths[0], **config).eval_sets({"": DataSource.of(paths[1])})
    assert data.records == read_records(paths[1])
    (tmp_path / "t.jsonl").write_text('{"text": "all of it"}\n')
    with pytest.raises(esft.InputError, match=r"t\.jsonl: line 1: is a text without a prompt"):
        read(paths[0], **config).eval_sets({"a": DataSource.of(tmp_path / "t.jsonl")})


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "a" * 65, "é"])
def test_a_name_of_evaluation_data_is_a_word(name: str):
    assert list(held_out_sources({"a-1_B": "x", "b": "y"})) == ["a-1_B", "b"]
    assert held_out_sources(None) == {} and list(held_out_sources("x")) == [""] == list(held_out_sources({"": "x"}))
    with pytest.raises(esft.InputError, match="is no name of evaluation data: letters, digits, - and _ make one$"):
        held_out_sources({name: "x", "other": "y"})


def test_evaluation_data_has_no_weight():
    with pytest.raises(esft.InputError, match="^d.jsonl:2: of data that is measured"):
        held_out_sources({"a": "d.jsonl:2"})


def test_settings_of_the_loss_reach_the_labels(paths):
    every = read(paths[0], assistant_only_loss=False).examples
    assert every[0].targets == len(every[0].ids) - 1 > read(paths[0]).examples[0].targets


def test_a_stream_is_tried_and_has_no_report(paths, tmp_path):
    found = read(paths, streaming=True)
    assert found.examples is None and found.report() is None
    batches = list(found.batches(2))
    assert len(batches) == 7 and {len(batch) for batch in batches} == {4}
    (tmp_path / "bad.jsonl").write_text('{"a": 1}')
    with pytest.raises(esft.InputError, match="bad.jsonl: line 1: has none of the columns"):
        read(tmp_path / "bad.jsonl", streaming=True)


@pytest.mark.parametrize("more", [{}, {"packing": True, "max_length": 40}], ids=str)
def test_a_stream_goes_on_from_any_step_and_its_rows_are_packed_where_that_is_set(paths, more: dict):
    found = read(paths, streaming=True, steps=40, **more)
    whole = list(found.batches(0))
    assert list(found.batches(34)) == whole[34:] and len(whole) == 40
    assert any(len(row.starts) > 1 for batch in whole for row in batch) == bool(more)


def test_the_bytes_of_a_file_are_the_digest_of_a_stream_too(paths):
    assert read(paths[0], streaming=True).digest() == file_digest(paths[0])


def test_steps_and_batches_agree_on_packed_rows(paths):
    found = read(paths[0], packing=True, max_length=40)
    whole = steps(list(found.examples), 4, 0, 0, Packing(40, "bfd"))
    assert list(found.batches(0)) == [next(whole) for _ in range(9)]


def test_what_is_held_out_is_cut_as_its_own_packing_needs(tmp_path):
    """Wrapped rows have all of a record, though those of the training are not packed."""
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": chat("a", "b" * 99)}))
    length = len(tiny_encoder(999).encode(read_records(path)[0]).ids)
    for packs, tokens in ((True, length), (False, 30)):
        found = read(path, packing=not packs, eval_packing=packs, packing_strategy="wrapped", max_length=30)
        (data,) = found.eval_sets({"": DataSource.of(path)})
        assert sum(len(row.ids) for row in data.examples) == tokens


def test_several_streams_have_the_weights_and_the_seed_of_the_run(paths):
    texts = [f"{paths[0]}:1", f"{paths[1]}:9"]
    one, same, other = (list(read(texts, streaming=True, seed=seed).batches(0)) for seed in (1, 1, 2))
    assert one == same != other


def test_a_mix_of_one_source_is_that_source(paths):
    found = read([f"{paths[0]}:3"])
    assert found.mix is None and list(found.batches(0)) == list(read(paths[0]).batches(0))


def test_how_records_are_encoded_depends_on_whether_rows_are_packed_out_of_whole_ones(paths):
    def encoding(**settings) -> str | None:
        return RunData(sources_of(paths), tiny_tokenizer(), REACH, TrainConfig(steps=9, **settings)).encoding()

    assert encoding() == encoding(packing=True) == encoding(packing_strategy="wrapped")
    assert encoding() != encoding(packing=True, packing_strategy="wrapped")


def test_how_records_are_encoded_is_what_the_settings_say(paths, monkeypatch):
    asked, real = [], run_data.encoded
    monkeypatch.setattr(run_data, "encoded", lambda source, encoder, *how: asked.append(how) or real(source, encoder))
    settings = TrainConfig(batch_size=4, steps=9, dataset_num_proc=3)
    for progress in (True, False):
        found = RunData(sources_of(paths), tiny_tokenizer(), REACH, settings).read(progress)
        found.eval_sets({"": DataSource.of(paths[0])}, progress)
    assert asked == [(3, True)] * 3 + [(3, False)] * 3


@pytest.mark.parametrize("more", [{}, {"micro_batch_size": 2}, {"padding_free": True}, {"packing": True}], ids=str)
def test_the_report_is_of_the_batches_that_are_trained_on(tmp_path, more: dict):
    for name, lengths in (("a", range(1, 30)), ("b", (1, 60))):
        lines = [{"messages": chat("a", "b" * length)} for length in lengths]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read([f"{tmp_path}/a:1", f"{tmp_path}/b:3"], max_length=90, batch_size=4, **more)
    together, alone = more.get("micro_batch_size"), more.get("padding_free", False)
    expected = data_report(found.examples, 4, found.packing, found.mix, together, alone)
    assert found.report() == expected and found.mix is not None
    for other in ((None, together, alone), (found.mix, 1, False)):
        assert data_report(found.examples, 4, found.packing, *other).fill != expected.fill


def with_mixed(paths, share: str, **settings) -> RunData:
    config = TrainConfig(**({"batch_size": 4, "steps": 9} | settings))
    return RunData(sources_of(paths[0]), tiny_tokenizer(), REACH, config, mixed_in(f"{paths[1]}:{share}")).read()


def test_general_data_is_mixed_in_with_its_share_of_the_records(paths):
    found = with_mixed(paths, "0.25", steps=100)
    rows = [row for batch in found.batches(0) for row in batch]
    assert sum(bool(row.mixed) for row in rows) / len(rows) == pytest.approx(0.25, abs=0.03)
    of_task = [tiny_encoder(256).encode(record).ids for record in read_records(paths[0])]
    assert all(row.ids in of_task for row in rows if not row.mixed)
    assert found.report() is not None and found.report().records == 17
    assert found.name == f"{paths[0]}, mixed with {paths[1]}:0.25"


def test_what_is_mixed_in_is_a_part_of_the_digest(paths):
    digests = [with_mixed(paths, share).digest() for share in ("0.25", "0.5")]
    assert len({*digests, read(paths).digest(), read(paths[0]).digest()}) == 4
    assert with_mixed(paths, "0.25").digest() == digests[0]


def test_records_that_are_mixed_in_are_traced_too(paths):
    found, text = with_mixed(paths, "0.25"), json.dumps({"messages": chat("general", "words")})
    paths[1].write_text(f"{text}\n")
    mixed = tiny_encoder(256).encode(read_records(paths[1])[0])
    assert found.places([mixed]) == [f"{paths[1]}: line 1"]


def test_nothing_is_mixed_into_a_stream(paths):
    with pytest.raises(esft.InputError, match=r"b.jsonl:0.25: nothing is mixed into data that is streamed$"):
        with_mixed(paths, "0.25", streaming=True)


def test_what_goes_through_the_model_together_is_known_beforehand(tmp_path):
    """At the most: the longest records, padded, end to end, or rows that are full."""
    paths = tmp_path / "a.jsonl"
    lines = [{"messages": chat("a", "b" * length)} for length in range(1, 9)]
    paths.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lengths = sorted(read(paths).examples.lengths.tolist(), reverse=True)
    assert lengths[0] > lengths[1]
    assert read(paths).together() == (4, 4 * lengths[0])
    assert read(paths, padding_free=True).together() == (4, sum(lengths[:4]))
    assert read(paths, micro_batch_size=3).together() == (3, 3 * lengths[0])
    assert read(paths, packing=True, max_length=64).together() == (4, 4 * 64)
    assert read(paths, streaming=True, max_length=64).together() == (4, 4 * 64)
