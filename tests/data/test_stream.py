import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from data_support import (
    FIRST_ID,
    global_steps,
    numbered_corpus,
    original_ids,
    sentences,
    stream_spec,
    write_small_tokenizer,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstrain.data.layout import Layout
from dstrain.data.masking import NO_LABEL, Vocabulary
from dstrain.data.row_documents import RowDocuments
from dstrain.data.shards import OnBadSample
from dstrain.data.spec import PhaseSpec, StreamSpec
from dstrain.data.stream import RowStream
from dstrain.data.writer import write_text_shards
from dstrain.errors import CorpusError

pytestmark = pytest.mark.slow

WORLDS = (1, 2, 3, 5, 7, 8)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> StreamSpec:
    """Token shards with documents of 0 to 100 tokens: a row holds 32."""
    folder = tmp_path_factory.mktemp("tokens")
    lengths = np.random.default_rng(0).integers(0, 100, 150).tolist()
    return stream_spec(folder, numbered_corpus(folder, lengths))


@pytest.fixture(scope="module")
def text_spec(tmp_path_factory: pytest.TempPathFactory) -> StreamSpec:
    """Text shards, of which spans of words are masked."""
    folder = tmp_path_factory.mktemp("texts")
    write_text_shards(folder / "shards", sentences(60), shard_bytes=20_000)
    tokenizer = str(write_small_tokenizer(folder / "tokenizer"))
    return stream_spec(folder / "shards", None, tokenizer=tokenizer, masking_unit="span")


@pytest.fixture(scope="module")
def phased_spec(tmp_path_factory: pytest.TempPathFactory) -> StreamSpec:
    """Three sources in three phases, whose rows, batches, masks and weights differ."""
    folder = tmp_path_factory.mktemp("mixture")
    rng = np.random.default_rng(1)
    vocabularies = [
        numbered_corpus(folder / name, rng.integers(0, most, documents).tolist())
        for name, most, documents in (("a", 90, 200), ("b", 9, 2100), ("c", 300, 20))
    ]
    phases = (
        PhaseSpec(0, 6, 16, 32, (0.3, 0.1), (0.7, 0.25, 0.05)),
        PhaseSpec(6, 4, 24, 32, (0.2, 0.2), (0.5, 0.5, 0.0)),
        PhaseSpec(10, None, 8, 100, (0.15, 0.15), (0.1, 0.0, 0.9)),
    )
    vocabulary = max(vocabularies, key=lambda vocabulary: vocabulary.size)
    return stream_spec({name: folder / name for name in "abc"}, vocabulary, phases=phases)


def test_rows_are_the_same_for_every_number_of_ranks(
    spec: StreamSpec, text_spec: StreamSpec, phased_spec: StreamSpec
) -> None:
    for each in (spec, text_spec, phased_spec):
        reference = list(global_steps(each, 1, 25))
        numbers = sorted(number for step in reference for number in step.rows)
        assert numbers == list(range(len(numbers)))
        for world in WORLDS[1:]:
            for step, other in zip(reference, global_steps(each, world, 25), strict=True):
                assert (step.rows, step.sources, step.digest) == (other.rows, other.sources, other.digest)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(1, 9)), min_size=1, max_size=6))
def test_rows_survive_restarts_at_any_step_on_any_number_of_ranks(
    phased_spec: StreamSpec, attempts: list[tuple[int, int]]
) -> None:
    reference = list(global_steps(phased_spec, 1, sum(steps for _, steps in attempts)))
    done = 0
    for world, steps in attempts:
        for step in global_steps(phased_spec, world, steps, first_step=done):
            assert (step.rows, step.digest) == (reference[done].rows, reference[done].digest)
            done += 1


@pytest.mark.parametrize("prefetch_steps", [1, 2, 8])
def test_rows_do_not_depend_on_prefetch(phased_spec: StreamSpec, prefetch_steps: int) -> None:
    reference = list(global_steps(phased_spec, 2, 20))
    ahead = list(global_steps(phased_spec, 2, 20, prefetch_steps=prefetch_steps))
    assert ahead == reference
    assert list(global_steps(phased_spec, 3, 6, first_step=9, prefetch_steps=prefetch_steps)) == reference[9:15]


def test_new_data_begins_at_its_origin_and_row_numbers_go_on(spec: StreamSpec) -> None:
    moved = StreamSpec.from_json(
        spec.to_json()
        | {"first_step": 40, "first_row": 1000, "phases": [spec.to_json()["phases"][0] | {"first_step": 40}]}
    )
    with RowStream(spec, 0, 1) as ours, RowStream(moved, 0, 1) as theirs:
        for step, (mine, other) in enumerate(zip(islice(ours, 5), islice(theirs, 5), strict=True)):
            assert other.step == 40 + step
            assert (original_ids(other) == original_ids(mine)).all()
            assert other.row_numbers.tolist() == (mine.row_numbers + 1000).tolist()
            assert (other.masked_positions != mine.masked_positions).any(), "masks go by the row number"


def test_digest_tells_one_token_apart(spec: StreamSpec, tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(0, 100, 150)
    lengths[70] += 1
    other = stream_spec(tmp_path, numbered_corpus(tmp_path, lengths.tolist()))
    ours = [step.digest for step in global_steps(spec, 1, 12)]
    assert [step.digest for step in global_steps(other, 1, 12)] != ours
    assert [step.digest for step in global_steps(spec, 1, 12)] == ours


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 31, 32, 33, 70, 400]), min_size=8, max_size=40),
    shard_bytes=st.sampled_from([1, 4096, 10**6]),
    block_documents=st.integers(1, 9),
    lanes=st.sampled_from([1, 2, 3, 8]),
    window=st.integers(1, 20),
)
def test_every_token_is_read_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    shard_bytes: int,
    block_documents: int,
    lanes: int,
    window: int,
) -> None:
    """One shard or one per block, documents longer than rows and lanes, empty ones, more lanes than shards."""
    folder = tmp_path_factory.mktemp("corpus")
    vocabulary = numbered_corpus(folder, lengths, shard_bytes=shard_bytes, block_documents=block_documents)
    spec = stream_spec(
        folder, vocabulary, lanes=lanes, global_batch_rows=lanes, sequence_length=8, shuffle_window=window
    )
    if sum(lengths) < lanes:
        with pytest.raises(CorpusError, match="each lane needs one"):
            RowStream(spec, 0, 1)
        return
    wanted = np.array(lengths)
    counts = np.zeros(len(lengths), np.int64)
    with RowStream(spec, 0, 1) as stream:
        for rows in islice(stream, 3 * -(-sum(lengths) // (8 * lanes))):
            before = counts.copy()
            counts += np.bincount(original_ids(rows).ravel(), minlength=FIRST_ID + len(lengths))[FIRST_ID:]
            epochs = np.floor_divide(counts.sum(), sum(lengths))
            assert (counts >= epochs * wanted).all() and (counts <= (epochs + 1) * wanted).all()
            assert (counts - before).sum() == 8 * lanes


def test_long_documents_have_their_share(tmp_path: Path) -> None:
    """Lanes of equally many documents gave those of 4,000 tokens a third of their share."""
    lengths = [4000] * 40 + [20] * 4000
    vocabulary = numbered_corpus(tmp_path, lengths, shard_bytes=2**18, block_documents=512)
    for lanes in (8, 64):
        spec = stream_spec(
            tmp_path, vocabulary, lanes=lanes, global_batch_rows=64, sequence_length=64, shuffle_window=None
        )
        steps = sum(lengths) // (64 * 64)
        with RowStream(spec, 0, 1) as stream:
            seen = np.concatenate([original_ids(rows).ravel() for rows in islice(stream, steps)])
        assert (seen < FIRST_ID + 40).mean() == pytest.approx(160_000 / 240_000, abs=0.005)


def test_shares_of_sources_are_those_of_the_weights(phased_spec: StreamSpec) -> None:
    steps = list(global_steps(phased_spec, 1, 40))
    for phase, (first, last) in zip(phased_spec.phases, pairwise((0, 6, 10, 40)), strict=True):
        for step in steps[first:last]:
            counts = Counter(step.sources.values())
            for source, weight in enumerate(phase.weights):
                assert abs(counts[source] - weight * phase.global_batch_rows) < 2
        total = Counter(source for step in steps[first:last] for source in step.sources.values())
        for source, weight in enumerate(phase.weights):
            assert abs(total[source] - weight * phase.global_batch_rows * (last - first)) < 3.5


def test_a_masking_rate_falls_over_its_phase(phased_spec: StreamSpec) -> None:
    with RowStream(phased_spec, 0, 1) as stream:
        masked = [int((rows.labels != NO_LABEL).sum(axis=1)[0]) for rows in islice(stream, 12)]
    assert masked == [10, 8, 7, 6, 4, 3, 6, 6, 6, 6, 15, 15]


def test_slices_of_documents_put_together_are_the_rows(phased_spec: StreamSpec, text_spec: StreamSpec) -> None:
    for each in (phased_spec, text_spec):
        documents = RowDocuments(each)
        with RowStream(each, 1, 3) as stream:
            for rows in islice(stream, 14):
                slices = documents.of_step(1, 3, rows.step)
                by_row = {row: [s for s in slices if s.row == row] for row in rows.row_numbers.tolist()}
                assert sum(map(len, by_row.values())) == len(slices)
                for row, source, ids, positions in zip(
                    by_row, rows.sources.tolist(), original_ids(rows), rows.position_ids, strict=True
                ):
                    assert np.array_equal(np.concatenate([s.ids for s in by_row[row]]), ids)
                    assert [s.first_token for s in by_row[row]] == np.flatnonzero(positions == 0).tolist()
                    assert {s.source for s in by_row[row]} == {source}


def test_slices_name_shard_block_and_document(tmp_path: Path) -> None:
    lengths = [(7 * n) % 90 for n in range(60)]  # some are empty, some longer than two rows
    vocabulary = numbered_corpus(tmp_path, lengths, shard_bytes=4096, block_documents=7)
    documents = RowDocuments(stream_spec(tmp_path, vocabulary))
    ends: dict[int, int] = {}
    for step in range(9):  # well into the second epoch
        for s in documents.of_step(0, 1, step):
            number = int(s.ids[0]) - FIRST_ID
            assert set(s.ids.tolist()) == {FIRST_ID + number}
            assert s.offset + len(s.ids) <= lengths[number]
            ends[number] = max(ends.get(number, 0), s.offset + len(s.ids))
            assert documents.sources[0].corpus.find(Path(s.shard).name, s.key, s.document) == [
                (sum(lengths[:number]), sum(lengths[: number + 1]))
            ]
    assert ends == {number: length for number, length in enumerate(lengths) if length}


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=st.integers(0, 2), data=st.data())
def test_find_names_every_row_that_holds_a_token(phased_spec: StreamSpec, source: int, data: st.DataObject) -> None:
    documents, steps = RowDocuments(phased_spec), 30
    lanes = documents.sources[source]
    first = data.draw(st.integers(0, lanes.corpus.total_tokens - 1))
    last = data.draw(st.integers(first + 1, min(first + 60, lanes.corpus.total_tokens)))
    found = Counter(
        (span.step, span.row, span.first_token + token, span.line + token)
        for span in documents.layout.find(source, lanes, first, last, steps)
        for token in range(span.tokens)
    )
    wanted: Counter[tuple[int, int, int, int]] = Counter()
    for step in range(steps):
        places = documents.layout.places(step, np.arange(phased_spec.lanes))
        is_source = places.sources == source
        lane_of = np.broadcast_to(places.lanes[:, None], is_source.shape)
        columns = (places.row_numbers[is_source], lane_of[is_source], places.positions[is_source])
        for row, lane, position in zip(*(column.tolist() for column in columns), strict=True):
            at = 0
            slices = lanes.slices(lane, position, places.phase.spec.sequence_length)
            for shard, start, tokens in zip(slices.shard, slices.start, slices.length, strict=True):
                place = lanes.corpus.document_of(int(shard), int(start))
                for token in range(int(tokens)):
                    line = place.first + place.offset + token
                    if first <= line < last:
                        wanted[step, row, at + token, line] += 1
                at += int(tokens)
    assert found == wanted


def test_position_ids_restart_at_every_document_and_row(spec: StreamSpec) -> None:
    with RowStream(spec, 0, 1) as stream:
        for rows in islice(stream, 20):
            ids = original_ids(rows)
            starts = np.ones_like(ids, bool)
            starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
            assert (rows.position_ids[starts] == 0).all()
            steps = np.diff(rows.position_ids, axis=1)
            assert ((steps == 1) | (rows.position_ids[:, 1:] == 0)).all()


def test_shapes_and_types(spec: StreamSpec) -> None:
    with RowStream(spec, 1, 2, prefetch_steps=2) as stream:
        rows = next(stream)
        assert rows.input_ids.shape == rows.position_ids.shape == (8, 32)
        assert rows.masked_positions.shape == rows.labels.shape == (8, 8)
        assert rows.sources.tolist() == [0] * 8 and rows.digest.shape == (2,)
        assert rows.row_numbers.tolist() == list(range(1, 16, 2))
        assert {rows.input_ids.dtype, rows.position_ids.dtype, rows.labels.dtype} == {np.dtype(np.int32)}
        assert (rows.labels != NO_LABEL).all() and stream.seconds_waited > 0


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    numbered_corpus(tmp_path, [9] * 20)
    with pytest.raises(CorpusError, match="holds token id 24, but the vocabulary has 20"):
        RowStream(stream_spec(tmp_path, Vocabulary(20, 4, (0, 1, 2, 3, 4))), 0, 1)


def test_fewer_tokens_than_lanes_are_refused_with_a_remedy(tmp_path: Path) -> None:
    vocabulary = numbered_corpus(tmp_path, [0, 3, 0])
    with pytest.raises(
        CorpusError, match=r"data\.lanes=8, but the train corpus has 3 tokens.*use data\.lanes=3 at most"
    ):
        RowStream(stream_spec(tmp_path, vocabulary), 0, 1)
    with RowStream(stream_spec(tmp_path, vocabulary, lanes=2), 0, 1) as stream:
        assert (original_ids(next(stream)) == FIRST_ID + 1).all(), "a corpus shorter than a row goes round in it"


def test_a_far_step_is_found_as_the_first_one_is(spec: StreamSpec) -> None:
    layout = Layout(spec)
    far = layout.places(10**9, np.arange(8))
    walked = next(layout.walk(np.arange(8), 10**9))
    assert far.row_numbers[3].tolist() == [16 * 10**9 + 3, 16 * 10**9 + 11]
    assert far.positions.tolist() == walked.positions.tolist() == [[64 * 10**9, 64 * 10**9 + 32]] * 8


# ---------------------------------------------------------------- text


def test_text_is_tokenized_between_cls_and_sep(text_spec: StreamSpec) -> None:
    documents = RowDocuments(text_spec)
    with RowStream(text_spec, 0, 1) as stream:
        for rows in islice(stream, 5):
            for s in documents.of_step(0, 1, rows.step):
                assert (s.ids[0] == 2) == (s.offset == 0) and not (s.ids[1:] == 2).any(), "[CLS] begins a document"
                assert not (s.ids[:-1] == 3).any(), "and [SEP] ends it"
            ids = original_ids(rows)
            assert (ids != 1).all() and (ids < 19).all()
            labelled = rows.labels[rows.labels != NO_LABEL]
            assert not np.isin(labelled, [0, 1, 2, 3, 4]).any()


def bad_text_spec(folder: Path, on_bad_sample: OnBadSample = "stop", max_bad_samples: int = 0) -> StreamSpec:
    """60 texts of which three are not UTF-8."""
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "a.tar", "w") as tar:
        for number, text in enumerate(sentences(60)):
            content = b"\xff\xfe broken" if number in (7, 20, 41) else text.encode()
            member = tarfile.TarInfo(f"doc{number}.txt")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    tokenizer = str(write_small_tokenizer(folder / "tokenizer"))
    return stream_spec(
        folder / "shards", None, tokenizer=tokenizer, on_bad_sample=on_bad_sample, max_bad_samples=max_bad_samples
    )


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_a_bad_sample_stops_the_run_and_is_named(tmp_path: Path, prefetch_steps: int) -> None:
    with (
        pytest.raises(CorpusError) as error,
        RowStream(bad_text_spec(tmp_path), 0, 1, prefetch_steps=prefetch_steps) as s,
    ):
        next(s)
    assert "shards/a.tar: sample 'doc7'" in str(error.value) and "not UTF-8 at byte 0" in str(error.value)
    assert "data.on_bad_sample: skip" in str(error.value)


def test_bad_samples_are_skipped_the_same_way_everywhere(tmp_path: Path) -> None:
    spec = bad_text_spec(tmp_path, on_bad_sample="skip", max_bad_samples=3)
    reference = list(global_steps(spec, 1, 12))
    for world in (2, 7):
        assert [step.digest for step in global_steps(spec, world, 12)] == [step.digest for step in reference]
    documents = RowDocuments(spec)
    keys = {s.key for step in range(12) for s in documents.of_step(0, 1, step)}
    assert keys == {f"doc{number}" for number in range(60)} - {"doc7", "doc20", "doc41"}


def test_more_bad_samples_than_allowed_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"data\.max_bad_samples=2"):
        RowStream(bad_text_spec(tmp_path, on_bad_sample="skip", max_bad_samples=2), 0, 1)


# ---------------------------------------------------------------- the background process


def children(pid: int | str = "self") -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def wait_until_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_the_process_has_no_torch_and_goes_with_close(spec: StreamSpec) -> None:
    before = set(children())
    with RowStream(spec, 0, 1, prefetch_steps=2) as stream:
        next(stream)
        (child,) = set(children()) - before
        maps = Path(f"/proc/{child}/maps").read_text()
        assert "numpy" in maps and "libtorch" not in maps
    assert wait_until_gone(child)


def test_a_killed_process_is_an_error_at_once(spec: StreamSpec) -> None:
    before = set(children())
    with RowStream(spec, 0, 1, prefetch_steps=2) as stream:
        next(stream)
        (child,) = set(children()) - before
        os.kill(child, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=rf"the data process \(pid {child}\) was killed by SIGKILL"):
            for _ in range(10):
                next(stream)


def test_signals_that_stop_a_run_leave_the_process_at_work(spec: StreamSpec) -> None:
    before = set(children())
    with RowStream(spec, 0, 1, prefetch_steps=1) as stream:
        next(stream)
        (child,) = set(children()) - before
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(child, number)
        assert [rows.step for rows in islice(stream, 5)] == [1, 2, 3, 4, 5]


def test_the_process_dies_with_its_parent(spec: StreamSpec) -> None:
    program = (
        "import json, sys\n"
        "from dstrain.data.spec import StreamSpec\n"
        "from dstrain.data.stream import RowStream\n"
        "stream = RowStream(StreamSpec.from_json(json.loads(sys.argv[1])), 0, 1, prefetch_steps=2)\n"
        "next(stream)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(spec.to_json())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
    (child,) = children(parent.pid)
    parent.kill()
    parent.wait()
    assert wait_until_gone(child)


def test_a_spec_survives_the_way_to_the_process(
    spec: StreamSpec, text_spec: StreamSpec, phased_spec: StreamSpec
) -> None:
    for each in (spec, text_spec, phased_spec):
        assert StreamSpec.from_json(json.loads(json.dumps(each.to_json()))) == each
