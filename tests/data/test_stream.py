import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from itertools import islice
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

from dstrain.data.lane import Lane
from dstrain.data.locate import locate
from dstrain.data.masking import NO_LABEL, Vocabulary
from dstrain.data.order import Order
from dstrain.data.producer import StreamSpec
from dstrain.data.shards import Corpus
from dstrain.data.stream import RowStream
from dstrain.data.writer import write_text_shards
from dstrain.errors import CorpusError

WORLDS = (1, 2, 4, 8)


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


def test_rows_are_the_same_for_every_world_size(spec: StreamSpec, text_spec: StreamSpec) -> None:
    for each in (spec, text_spec):
        reference = list(global_steps(each, 1, 25))
        assert sorted(number for step in reference for number in step.rows) == list(range(25 * 16))
        assert reference[-1].cursors[:, 0].min() >= 1, "the test must cross the end of an epoch"
        for world in WORLDS[1:]:
            for step, other in zip(reference, global_steps(each, world, 25), strict=True):
                assert step.rows == other.rows
                assert step.digest == other.digest
                assert (step.cursors == other.cursors).all()


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(1, 9)), min_size=1, max_size=6))
def test_rows_survive_restarts_at_any_step_on_any_world(spec: StreamSpec, attempts: list[tuple[int, int]]) -> None:
    reference = list(global_steps(spec, 1, sum(steps for _, steps in attempts)))
    done, cursors = 0, None
    for world, steps in attempts:
        for step in global_steps(spec, world, steps, first_step=done, cursors=cursors):
            assert step.rows == reference[done].rows
            assert step.digest == reference[done].digest
            done, cursors = done + 1, step.cursors


@pytest.mark.parametrize("prefetch_steps", [1, 2, 8])
def test_rows_and_cursors_do_not_depend_on_prefetch(spec: StreamSpec, prefetch_steps: int) -> None:
    reference = list(global_steps(spec, 2, 20))
    for step, ahead in zip(reference, global_steps(spec, 2, 20, prefetch_steps=prefetch_steps), strict=True):
        assert step.rows == ahead.rows
        assert step.digest == ahead.digest
        assert (step.cursors == ahead.cursors).all()
    resumed = global_steps(spec, 4, 6, first_step=14, cursors=reference[13].cursors, prefetch_steps=prefetch_steps)
    assert [step.digest for step in resumed] == [step.digest for step in reference[14:]]


def test_digest_tells_one_token_apart(spec: StreamSpec, tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(0, 100, 150)
    lengths[70] += 1
    other = stream_spec(tmp_path, numbered_corpus(tmp_path, lengths.tolist()))
    ours = [step.digest for step in global_steps(spec, 1, 12)]
    assert [step.digest for step in global_steps(other, 1, 12)] != ours
    assert [step.digest for step in global_steps(spec, 1, 12)] == ours


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 31, 32, 33, 70]), min_size=8, max_size=40),
    shard_bytes=st.sampled_from([1, 4096, 10**6]),
    block_documents=st.integers(1, 9),
    lanes=st.sampled_from([1, 2, 8]),
    window=st.integers(1, 20),
)
def test_every_document_of_an_epoch_is_read_exactly_once(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    shard_bytes: int,
    block_documents: int,
    lanes: int,
    window: int,
) -> None:
    """One shard or one per block, documents longer than rows, empty ones, more lanes than shards, ends inside rows."""
    folder = tmp_path_factory.mktemp("corpus")
    vocabulary = numbered_corpus(folder, lengths, shard_bytes=shard_bytes, block_documents=block_documents)
    spec = stream_spec(folder, vocabulary, lanes=lanes, global_batch_rows=lanes, shuffle_window=window)
    corpus = Corpus.open(spec.corpus)
    order = Order(corpus.document_counts, lanes, spec.seed, window, "train")
    try:
        lane_tokens = [first_epoch(Lane(number, corpus, order, (0, 0, 0), "stop")) for number in range(lanes)]
        # Rows are the same tokens in the same order.
        packed: list[list[int]] = [[] for _ in range(lanes)]
        with RowStream(spec, 0, 1) as stream:
            while any(len(ours) < len(theirs) for ours, theirs in zip(packed, lane_tokens, strict=True)):
                for number, ids in enumerate(original_ids(next(stream))):
                    packed[number] += ids.tolist()
    except CorpusError as error:
        assert "has a token" in str(error), "a lane may have nothing but empty documents"
        return
    counts = np.bincount(np.concatenate(lane_tokens).astype(np.int64), minlength=FIRST_ID + len(lengths))
    assert counts[FIRST_ID:].tolist() == lengths
    assert [ours[: len(theirs)] for ours, theirs in zip(packed, lane_tokens, strict=True)] == lane_tokens


def first_epoch(lane: Lane) -> list[int]:
    """The tokens of a lane's first epoch, read one by one, so that the cursor tells of each which epoch it is from."""
    tokens: list[int] = []
    while True:
        (piece,) = lane.read(1)
        if lane.cursor > (1, 0, 0):
            return tokens
        tokens.append(int(piece[0]))


def test_position_ids_restart_at_every_document_and_row(spec: StreamSpec) -> None:
    with RowStream(spec, 0, 1) as stream:
        for rows in islice(stream, 20):
            ids = original_ids(rows)
            starts = np.ones_like(ids, bool)
            starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
            assert ((rows.position_ids == 0) == starts).all()
            steps = np.diff(rows.position_ids, axis=1)
            assert ((steps == 1) | starts[:, 1:]).all()


def test_shapes_and_types(spec: StreamSpec) -> None:
    with RowStream(spec, 1, 2, prefetch_steps=2) as stream:
        rows = next(stream)
        assert rows.input_ids.shape == rows.position_ids.shape == (8, 32)
        assert rows.masked_positions.shape == rows.labels.shape == (8, 8)
        assert rows.cursors.shape == (4, 3) and rows.digest.shape == (2,)
        assert rows.row_numbers.tolist() == list(range(1, 16, 2))
        assert {rows.input_ids.dtype, rows.position_ids.dtype, rows.labels.dtype} == {np.dtype(np.int32)}
        assert (rows.labels != NO_LABEL).all() and stream.seconds_waited > 0


def test_a_million_tiny_documents_are_fast(tmp_path: Path) -> None:
    lengths = [2] * 1_000_000
    started = time.process_time()
    vocabulary = numbered_corpus(tmp_path, lengths, shard_bytes=2**20, block_documents=4096)
    spec = stream_spec(tmp_path, vocabulary, sequence_length=512, lanes=64, global_batch_rows=256, shuffle_window=1024)
    seen = np.zeros(FIRST_ID + len(lengths), np.int64)
    with RowStream(spec, 0, 1) as stream:
        for rows in stream:
            if rows.cursors[:, 0].max() >= 1:
                break
            seen += np.bincount(original_ids(rows).ravel(), minlength=len(seen))
    assert seen.max() == 2
    assert (seen[FIRST_ID:] == 2).mean() > 0.9
    assert time.process_time() - started < 30


def test_all_lanes_need_a_token(tmp_path: Path) -> None:
    vocabulary = numbered_corpus(tmp_path, [0] * 20)
    with RowStream(stream_spec(tmp_path, vocabulary), 0, 1) as stream, pytest.raises(CorpusError) as error:
        next(stream)
    assert "lane 0: none of its 2 documents of epoch 1 has a token" in str(error.value)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    numbered_corpus(tmp_path, [9] * 20)
    with pytest.raises(CorpusError, match="holds token id 24, but the vocabulary has 20"):
        RowStream(stream_spec(tmp_path, Vocabulary(20, 4, (0, 1, 2, 3, 4))), 0, 1)


def test_a_cursor_of_another_corpus_is_refused(tmp_path: Path) -> None:
    vocabulary = numbered_corpus(tmp_path, [9] * 20)
    for cursor in ((0, 3, 0), (0, 1, 10)):
        cursors = np.array([cursor] * 8, np.int64)
        with pytest.raises(CorpusError, match="the cursor is of another corpus"):
            next(RowStream(stream_spec(tmp_path, vocabulary), 0, 1, cursors=cursors))


def test_resuming_late_in_ten_million_documents_costs_what_starting_does(tmp_path: Path) -> None:
    """1,000 names of one shard of 10,000 documents."""
    numbered_corpus(tmp_path / "one", [3] * 10_000, shard_bytes=2**30, block_documents=4096)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(1000):
        (corpus / f"train-{number:06d}.tar").hardlink_to(tmp_path / "one" / "train-000000.tar")
    assert sum(shard.summary.documents for shard in locate(str(corpus)).shards) == 10_000_000
    spec = stream_spec(corpus, Vocabulary(20_000, 4, (0, 1, 2, 3, 4)), lanes=64, global_batch_rows=64)
    late = np.array([(0, int(0.99 * 10_000_000 / 64), 1)] * 64, np.int64)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(30):  # other work on the machine only adds: the least of some rounds is what it costs
        for is_late, cursors in ((False, None), (True, late)):
            started = time.process_time()
            with RowStream(spec, 0, 1, cursors=cursors) as stream:
                next(stream)
            seconds[is_late].append(time.process_time() - started)
        if len(seconds[True]) >= 5 and min(seconds[True]) < 1.2 * min(seconds[False]):
            return
    raise AssertionError(f"{min(seconds[True]):.4f} s at 99 %, {min(seconds[False]):.4f} s at 0 %")


# ---------------------------------------------------------------- text


def test_text_is_tokenized_between_cls_and_sep(text_spec: StreamSpec) -> None:
    with RowStream(text_spec, 0, 1) as stream:
        for rows in islice(stream, 5):
            ids = original_ids(rows)
            inner = rows.position_ids[:, 1:] == 0
            assert ((ids[:, 1:] == 2) | ~inner | (ids[:, :-1] != 3)).all(), "a document starts with [CLS] after [SEP]"
            assert (ids != 1).all() and (ids < 19).all()
            labelled = rows.labels[rows.labels != NO_LABEL]
            assert not np.isin(labelled, [0, 1, 2, 3, 4]).any()


def bad_text_spec(folder: Path, **changes: object) -> StreamSpec:
    """60 texts of which three are not UTF-8."""
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "a.tar", "w") as tar:
        for number, text in enumerate(sentences(60)):
            content = b"\xff\xfe broken" if number in (7, 20, 41) else text.encode()
            member = tarfile.TarInfo(f"doc{number}.txt")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    tokenizer = str(write_small_tokenizer(folder / "tokenizer"))
    return stream_spec(folder / "shards", None, tokenizer=tokenizer, **changes)


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_a_bad_sample_stops_the_run_and_is_named(tmp_path: Path, prefetch_steps: int) -> None:
    spec = bad_text_spec(tmp_path)
    with RowStream(spec, 0, 1, prefetch_steps=prefetch_steps) as stream, pytest.raises(CorpusError) as error:
        for _ in range(50):
            next(stream)
    assert "shards/a.tar: sample 'doc" in str(error.value) and "not UTF-8 at byte 0" in str(error.value)
    assert "data.on_bad_sample: skip" in str(error.value)


def test_bad_samples_are_counted_and_skipped_the_same_way_everywhere(tmp_path: Path) -> None:
    spec = bad_text_spec(tmp_path, on_bad_sample="skip")
    reference = list(global_steps(spec, 1, 12))
    assert reference[-1].cursors[:, 0].min() >= 1
    for world in (2, 8):
        assert [step.digest for step in global_steps(spec, world, 12)] == [step.digest for step in reference]
    counted, reports = 0, set()
    with RowStream(spec, 0, 1, prefetch_steps=1) as stream:
        for rows in stream:
            counted += rows.bad_samples
            reports |= set(rows.bad_sample_reports)
            if rows.cursors[:, 0].min() >= 1:
                break
    assert {report.split("'")[1] for report in reports} == {"doc7", "doc20", "doc41"}
    assert counted >= 3


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
        started = time.perf_counter()
        with pytest.raises(RuntimeError, match=rf"the data process \(pid {child}\) was killed by SIGKILL"):
            for _ in range(10):
                next(stream)
        assert time.perf_counter() - started < 2


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
        "from dstrain.data.producer import StreamSpec\n"
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


def test_a_spec_survives_the_way_to_the_process(spec: StreamSpec, text_spec: StreamSpec) -> None:
    for each in (spec, text_spec):
        assert StreamSpec.from_json(json.loads(json.dumps(each.to_json()))) == each
