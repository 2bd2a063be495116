"""Which documents a step's rows are made of: the way back from rows to shards, for people who look into a step.

Walks the lanes as `Lane.read` does, but keeps track of where each token came from. Far slower than making the rows;
nothing on the way of training uses it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dstrain.data.order import Order
from dstrain.data.producer import StreamSpec, step_shape
from dstrain.data.shards import BadSample, Corpus, TokenIds
from dstrain.data.tokens import load_document_tokenizer
from dstrain.errors import CorpusError


@dataclass(frozen=True)
class Piece:
    """A document, or what of it lies in one row. `ids` are its tokens before masking."""

    row: int
    first_token: int  # where in the row it starts
    ids: TokenIds
    shard: str
    key: str  # of the sample
    document: int | None  # its number within a sample that holds several


def step_pieces(spec: StreamSpec, rank: int, world: int, step: int, cursors: NDArray[np.int64] | None) -> list[Piece]:
    """The pieces that rank `rank` of `world` is given at data step `step`, by row and place in it.

    Args:
        spec: the stream.
        rank: whose rows.
        world: of how many ranks.
        step: which global batch.
        cursors: (lanes, 3), where the lanes stood before it; None for the start of the run.

    Raises:
        CorpusError: the corpus cannot be opened, or is not the one that the cursors are of.
    """
    encode = load_document_tokenizer(spec.tokenizer).encode if spec.tokenizer is not None else None
    corpus = Corpus.open(spec.corpus, text_field=spec.text_field, encode=encode)
    order = Order(corpus.document_counts, spec.lanes, spec.seed, spec.shuffle_window, spec.purpose)
    shape = step_shape(spec, world)
    pieces = []
    for lane in range(rank, spec.lanes, world):
        cursor = (0, 0, 0) if cursors is None else tuple(map(int, cursors[lane]))
        documents = _documents(corpus, order, lane, *cursor)
        tokens = shape.rows // shape.lanes * shape.row_tokens
        for piece, place in _first(documents, tokens, shape.row_tokens):
            row, first_token = divmod(place, shape.row_tokens)
            shard, document, ids = piece
            key, number = corpus.shard(shard).sample(document)
            row_number = step * spec.global_batch_rows + row * spec.lanes + lane
            pieces.append(Piece(row_number, first_token, ids, str(corpus.shard_path(shard)), key, number))
    return sorted(pieces, key=lambda piece: (piece.row, piece.first_token))


_Placed = tuple[int, int, TokenIds]  # shard, document in it, tokens


def _first(documents: Iterator[_Placed], tokens: int, row_tokens: int) -> Iterator[tuple[_Placed, int]]:
    """The first `tokens` tokens, cut at the ends of rows, each piece with its place on the line of all rows."""
    place = 0
    for shard, document, ids in documents:
        while len(ids) and place < tokens:
            here = min(len(ids), row_tokens - place % row_tokens)
            yield (shard, document, ids[:here]), place
            ids, place = ids[here:], place + here
        if place == tokens:
            return


def _documents(corpus: Corpus, order: Order, lane: int, epoch: int, position: int, offset: int) -> Iterator[_Placed]:
    """A lane's documents from a cursor on, without end; the first one without the `offset` tokens that were read."""
    window_of = lru_cache(maxsize=2)(lambda epoch, window: _window(order, epoch, lane, window))
    count = order.lane_documents(lane)
    if not 0 <= position < count:
        raise CorpusError(f"lane {lane}: no document {position} of {count}; the run was made with another corpus")
    while True:
        window, place = order.window_of(position)
        shard, document = (int(number) for number in window_of(epoch, window)[:, place])
        try:
            ids = corpus.document(shard, document)
        except BadSample:  # the run skipped it, too
            ids = np.empty(0, np.int32)
        yield shard, document, ids[offset:]
        position, offset = position + 1, 0
        if position == count:
            epoch, position = epoch + 1, 0


def _window(order: Order, epoch: int, lane: int, window: int) -> NDArray[np.int64]:
    """Shards and documents of a window in reading order, (2, documents)."""
    runs = [
        np.stack([np.full(last - first, shard), np.arange(first, last)])
        for shard, first, last in order.runs(epoch, lane, window)
    ]
    return np.concatenate(runs, axis=1)[:, order.shuffle(epoch, lane, window)]
