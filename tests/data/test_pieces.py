"""The way back from rows to documents: put together again, the pieces are the rows."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_support import FIRST_ID, numbered_corpus, original_ids, sentences, stream_spec, write_small_tokenizer

from dstrain.data.pieces import Piece, step_pieces
from dstrain.data.producer import StreamSpec
from dstrain.data.stream import RowStream
from dstrain.data.writer import write_text_shards


def check_steps(spec: StreamSpec, world: int, rank: int, steps: int) -> list[Piece]:
    """Compare the pieces of some steps with the rows that the stream makes; returns those of the last step."""
    cursors = np.zeros((spec.lanes, 3), np.int64)
    with RowStream(spec, rank, world) as stream:
        for step in range(steps):
            pieces = step_pieces(spec, rank, world, step, cursors if step else None)
            rows = next(stream)
            by_row = {row: [p for p in pieces if p.row == row] for row in rows.row_numbers.tolist()}
            assert sum(map(len, by_row.values())) == len(pieces)
            for row, ids, positions in zip(by_row, original_ids(rows), rows.position_ids, strict=True):
                assert np.array_equal(np.concatenate([p.ids for p in by_row[row]]), ids)
                assert [p.first_token for p in by_row[row]] == np.flatnonzero(positions == 0).tolist()
            cursors[rank::world] = rows.cursors
    return pieces


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (4, 3)])
def test_pieces_of_token_shards_name_block_and_document(world: int, rank: int, tmp_path: Path) -> None:
    lengths = [(7 * n) % 90 for n in range(60)]  # some are empty, some longer than two rows
    vocabulary = numbered_corpus(tmp_path, lengths, shard_bytes=4096, block_documents=7)
    pieces = check_steps(stream_spec(tmp_path, vocabulary), world, rank, steps=9)  # well into the second epoch
    first_documents: dict[tuple[str, str], int] = {}
    documents = 0
    for shard in sorted(tmp_path.glob("*.tar")):
        index = json.loads((shard.parent / f"{shard.name}.idx.json").read_text())
        for key, count in zip(index["keys"], index["block_documents"], strict=True):
            first_documents[str(shard), key] = documents
            documents += count
    assert len(first_documents) > 5
    for piece in pieces:
        assert piece.document is not None
        assert set(piece.ids.tolist()) == {FIRST_ID + first_documents[piece.shard, piece.key] + piece.document}


def test_pieces_of_text_shards_name_the_sample(tmp_path: Path) -> None:
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    texts = list(sentences(80))
    write_text_shards(tmp_path / "shards", texts, shard_bytes=8192)
    spec = stream_spec(tmp_path / "shards", None, tokenizer=str(tokenizer))
    for piece in check_steps(spec, 2, 1, steps=3):
        with tarfile.open(piece.shard) as shard:
            assert shard.extractfile(f"{piece.key}.txt").read().decode() in texts  # type: ignore[union-attr]
        assert piece.document is None
