"""Which documents a step's rows are made of: the way back from rows to shards, for people who look into a step.

It goes by the same layout as the stream, but asks of each slice where it lies. Far slower than making the rows; nothing
on the way of training uses it.
"""

from dataclasses import dataclass

import numpy as np

from dstrain.data.lanes import SourceLanes
from dstrain.data.layout import Layout
from dstrain.data.producer import StreamTokenizer, open_source
from dstrain.data.shards import TokenIds
from dstrain.data.spec import StreamSpec


@dataclass(frozen=True)
class DocumentSlice:
    """A document, or what of it lies in one row. `ids` are its tokens before masking, and before pairs were made."""

    row: int
    first_token: int  # where in the row it starts
    ids: TokenIds
    source: int
    shard: str
    key: str  # of the sample
    document: int | None  # its number within a sample that holds several
    offset: int  # of its first token here, in the document


class RowDocuments:
    """The documents in the rows of a stream."""

    def __init__(self, spec: StreamSpec) -> None:
        """Open the corpora. Raises CorpusError."""
        self.spec = spec
        self.layout = Layout(spec)
        tokenizer = StreamTokenizer(spec)
        self.sources = [open_source(spec, source, tokenizer) for source in spec.sources]

    def of_step(self, rank: int, world: int, step: int) -> list[DocumentSlice]:
        """The slices in a rank's rows of one data step, by row and place in it.

        Raises:
            CorpusError: a shard cannot be read, or is not what was indexed.
        """
        places = self.layout.places(step, self.layout.own_lanes(rank, world))
        length = places.phase.spec.sequence_length
        lanes = np.broadcast_to(places.lanes[:, None], places.sources.shape)
        columns = (places.row_numbers, places.sources, lanes, places.positions)
        slices = [
            document_slice
            for row, source, lane, position in zip(*(column.reshape(-1).tolist() for column in columns), strict=True)
            for document_slice in self._of_row(self.sources[source], source, lane, row, position, length)
        ]
        return sorted(slices, key=lambda document_slice: (document_slice.row, document_slice.first_token))

    def _of_row(
        self, lanes: SourceLanes, source: int, lane: int, row: int, position: int, length: int
    ) -> list[DocumentSlice]:
        corpus, slices = lanes.corpus, lanes.slices(lane, position, length)
        first_tokens = np.cumsum(slices.length) - slices.length
        document_slices = []
        for shard, start, tokens, first_token in zip(
            slices.shard.tolist(), slices.start.tolist(), slices.length.tolist(), first_tokens.tolist(), strict=True
        ):
            place = corpus.document_of(shard, start)
            ids = corpus.shard(shard).read(start, tokens)
            document_slices.append(
                DocumentSlice(row, first_token, ids, source, str(place.shard), place.key, place.number, place.offset)
            )
        return document_slices
