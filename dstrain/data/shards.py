"""A corpus as one line of tokens, of which any stretch is read at once from memory-mapped tars.

The documents of all shards, special tokens in, laid end to end in the order of the shards are the *line*; a place on
it is a number of tokens. A `Corpus` holds a few numbers per shard. What a shard's documents are and where they lie
is loaded when it is first touched, and a bounded number of shards is kept open, so that neither memory nor file
descriptors grow with the corpus.
"""

import hashlib
import resource
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dstrain.data.counts import CorpusCounts, TokenCounter
from dstrain.data.index import TYPES, Kind
from dstrain.data.index_file import index_remedy
from dstrain.data.locate import Located, locate
from dstrain.data.mapped import BadSample, MappedShard
from dstrain.data.open_shard import OpenShard, TextCache, TextShard, TokenIds, TokenShard
from dstrain.data.tokens import DocumentTokenizer
from dstrain.errors import CorpusError

OnBadSample = Literal["stop", "skip"]

DEFAULT_TEXT_FIELD = "text"
OPEN_SHARDS = 512
OPEN_BYTES = 1 << 28  # of what open shards take of the process' own memory
BAD_SAMPLES_SHOWN = 8
DESCRIPTORS_FOR_OTHERS = 128  # what the rest of the process may need of the limit on open files

__all__ = ["DEFAULT_TEXT_FIELD", "BadSample", "Corpus", "DocumentPlace", "OpenShard", "Slices", "TokenIds"]


@dataclass(frozen=True)
class Slices:
    """Slices of documents, in columns of N: `length` tokens from `start` of a shard on. None is empty.

    `start` is what `OpenShard.read` takes.
    """

    shard: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]


@dataclass(frozen=True)
class DocumentPlace:
    """Which document a token belongs to, and where in it the token is.

    `number` counts documents within a sample that holds several, and is None otherwise. `offset` is the token's place
    in its document, `tokens` the document's length, `first` the place of its first token on the corpus' line.
    """

    shard: Path
    key: str
    number: int | None
    offset: int
    tokens: int
    first: int


class Corpus:
    """All documents of a location. Open one with `Corpus.open`."""

    def __init__(
        self,
        located: Located,
        text_field: str,
        counter: TokenCounter | None,
        counts: CorpusCounts | None,
    ) -> None:
        """Take what `open` found: `counter` and `counts` for texts that are read as tokens."""
        self._located, self._text_field = located, text_field
        self._counter, self._counts = counter, counts
        self._text_cache = TextCache()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._open_limit = OPEN_SHARDS
        self._open_bytes = 0
        table = located.table
        self.kind: Kind = "text" if TYPES[int(table.types[0])] is None else "tokens"
        self.tokenizer_digest = located.tokenizer
        self.document_counts = table.documents
        self.total_documents = int(table.documents.sum())
        self.largest_id = int(table.max_ids.max())
        tokens = table.tokens if counts is None else counts.tokens
        self._firsts = np.concatenate([[0], np.cumsum(tokens)])  # of each shard, its first token on the line
        self.bad_sample_count = 0 if counts is None else int(counts.bad.sum())

    @classmethod
    def open(
        cls,
        location: str,
        *,
        text_field: str = DEFAULT_TEXT_FIELD,
        tokenizer: DocumentTokenizer | None = None,
        on_bad_sample: OnBadSample = "stop",
        max_bad_samples: int | None = None,
    ) -> "Corpus":
        """Open a folder, a glob or a brace pattern of tar shards.

        Args:
            location: where the shards are.
            text_field: names the document in `.json` samples; where a sample has a `.txt` file as well, the field wins
                if it is there.
            tokenizer: what is to make, or has made, the ids. Texts are counted with it where that was not done before,
                which takes as long as tokenizing them. Without it, texts are only read as texts.
            on_bad_sample: whether a text sample that cannot be read is an error, or a document without tokens.
            max_bad_samples: how many such documents there may be; None for any number.

        Raises:
            CorpusError: a shard is missing or damaged, a sample cannot be read, or the ids are not this tokenizer's.
        """
        located = locate(location)
        if tokenizer is None or TYPES[int(located.table.types[0])] is not None:
            corpus = cls(located, text_field, None, None)
            if tokenizer is not None:
                corpus._check_tokenizer(location, tokenizer)
            return corpus
        counter = TokenCounter(tokenizer, text_field)
        corpus = cls(located, text_field, counter, counter.count_all(located))
        corpus._check_samples(location, on_bad_sample, max_bad_samples)
        return corpus

    def _check_tokenizer(self, location: str, tokenizer: DocumentTokenizer) -> None:
        """Token shards must be of the tokenizer that the run uses."""
        remedy = index_remedy(self.shard_path(0).parent, tokenizer=tokenizer.folder)
        if self.tokenizer_digest is None:
            raise CorpusError(
                f"{location}: which tokenizer made its token ids is not known; if it was {tokenizer.folder}, {remedy}; "
                "else build the shards again"
            )
        if self.tokenizer_digest != tokenizer.digest:
            raise CorpusError(
                f"{location}: its token ids were made by another tokenizer ({self.tokenizer_digest[:12]}…) than "
                f"{tokenizer.folder} ({tokenizer.digest[:12]}…); use that one, or build the shards again with this one"
            )
        if self.largest_id >= tokenizer.vocab_size:
            raise CorpusError(
                f"{location}: holds token id {self.largest_id}, but {tokenizer.folder} has {tokenizer.vocab_size} "
                "tokens; use the tokenizer that the shards were built with, or build them again with this one"
            )

    def _check_samples(self, location: str, on_bad_sample: OnBadSample, max_bad_samples: int | None) -> None:
        if not self.bad_sample_count:
            return
        first = "; ".join(self.bad_samples)
        if on_bad_sample == "stop":
            raise CorpusError(
                f"{location}: {self.bad_sample_count:,} samples cannot be read; repair or remove them, or set "
                f"data.on_bad_sample: skip to go without them: {first}"
            )
        if max_bad_samples is not None and self.bad_sample_count > max_bad_samples:
            raise CorpusError(
                f"{location}: {self.bad_sample_count:,} samples cannot be read, more than data.max_bad_samples="
                f"{max_bad_samples}; repair or remove them, or allow for more: {first}"
            )

    @cached_property
    def digest(self) -> str:
        """The name of these contents: the shards' in order, and of texts also the field. Neither paths nor names count.

        Of texts it says nothing about the tokenizer.
        """
        if self.kind == "tokens":
            return self._located.table.digest
        return hashlib.sha256(f"{self._located.table.digest} {self._text_field}".encode()).hexdigest()

    @cached_property
    def bad_samples(self) -> tuple[str, ...]:
        """What is wrong with the first of the samples that cannot be read, of which there are `bad_sample_count`."""
        return tuple(islice(self._bad_samples(), BAD_SAMPLES_SHOWN))

    def _bad_samples(self) -> Iterator[str]:
        if self._counts is None:
            return
        for number in np.flatnonzero(self._counts.bad).tolist():
            shard = self._open_shard(number)
            assert isinstance(shard, TextShard)
            yield from (str(BadSample(self.shard_path(number), *sample)) for sample in shard.counts.bad_samples)

    @property
    def total_tokens(self) -> int:
        """The tokens of all documents, special tokens in: the length of the line; 0 for texts without a tokenizer."""
        return int(self._firsts[-1])

    def slices(self, first: int, last: int) -> Slices:
        """The tokens first … last-1 of the line as slices of documents in natural order.

        What says where documents end is checked at its first touch, their own bytes when they are read. Raises
        CorpusError naming the shard and the block of bytes that is not what was indexed.
        """
        assert 0 <= first < last <= self.total_tokens, f"tokens {first} to {last} of {self.total_tokens}"
        number = int(self._firsts.searchsorted(first, "right")) - 1
        shards, starts, lengths = [], [], []
        while first < last:
            start, stop = int(self._firsts[number]), min(last, int(self._firsts[number + 1]))
            if first < stop:
                shard_starts, shard_lengths = self.shard(number).slices(first - start, stop - start)
                shards.append(np.full(len(shard_starts), number))
                starts.append(shard_starts)
                lengths.append(shard_lengths)
                first = stop
            number += 1
        if len(shards) == 1:
            return Slices(shards[0], starts[0], lengths[0])
        return Slices(np.concatenate(shards), np.concatenate(starts), np.concatenate(lengths))

    def check_sizes(self) -> None:
        """Compare the sizes of the shards with the index: `Located.check_sizes`. Raises CorpusError."""
        self._located.check_sizes()

    def shard_path(self, number: int) -> Path:
        """Where a shard lies, for messages."""
        return self._located.path(number)

    def keep_open(self, shards: int) -> None:
        """Allow for this many shards in use at a time, as far as the limit on open files lets us."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = shards + DESCRIPTORS_FOR_OTHERS
        allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
        self._open_limit = max(allowed - DESCRIPTORS_FOR_OTHERS, 16)

    def shard(self, number: int) -> OpenShard:
        """A shard, mapped; the least recently used one is let go when there are too many. Raises CorpusError."""
        opened = self._open.get(number)
        if opened is not None:
            self._open.move_to_end(number)
            return opened
        opened = self._open[number] = self._open_shard(number)
        self._open_bytes += opened.memory_bytes
        while len(self._open) > self._open_limit or (self._open_bytes > OPEN_BYTES and len(self._open) > 1):
            _, oldest = self._open.popitem(last=False)  # its map goes when the last array that looks into it goes
            self._open_bytes -= oldest.memory_bytes
        return opened

    def _open_shard(self, number: int) -> OpenShard:
        mapped = MappedShard(self._located[number])
        if self.kind == "tokens":
            return TokenShard(mapped)
        assert self._counter and self._counts, "texts are read as tokens with a tokenizer"
        counts = self._counts.kept.get(number) or self._counter.obtain(mapped)[0]
        if int(counts.tokens.sum()) != int(self._counts.tokens[number]):
            raise CorpusError(
                f"{mapped.path}: {int(counts.tokens.sum()):,} tokens, but {int(self._counts.tokens[number]):,} were "
                f"counted before; {self._counter.remedy(mapped)}"
            )
        return TextShard(mapped, number, self._counter, counts, self._text_cache)

    def mapped_shard(self, number: int) -> MappedShard:
        """A shard as bytes and texts, which needs no tokenizer."""
        return MappedShard(self._located[number])

    # ------------------------------------------------------------ back from tokens to documents

    def document_of(self, shard: int, start: int) -> DocumentPlace:
        """Which document a slice of `slices` is of."""
        opened = self.shard(shard)
        token = opened.token_at(start)
        document = opened.document_at(token)
        first, last = opened.document_span(document)
        key, number = opened.sample(document)
        return DocumentPlace(
            self.shard_path(shard), key, number, token - first, last - first, int(self._firsts[shard]) + first
        )

    def find(self, shard_name: str, key: str, number: int | None = None) -> list[tuple[int, int]]:
        """Where documents lie on the line: the places of each one's first token and of the one after its last.

        Documents without tokens are nowhere.

        Args:
            shard_name: a shard's name, or its path; all shards of that name are looked into.
            key: of the sample.
            number: of the document in the sample; None for all that it holds.
        """
        places = []
        for shard in self._shards_named(shard_name):
            documents = self.shard(shard).documents_of(key)
            chosen = documents if number is None else [documents[number]] if 0 <= number < len(documents) else []
            places += [self._line_span(shard, document) for document in chosen]
        return [(first, last) for first, last in places if first < last]

    def find_ids(self, ids: NDArray[np.integer]) -> list[tuple[int, int]]:
        """Where the documents lie on the line whose token ids, special tokens in, are exactly these.

        Reads every document's length, and the documents of this length.
        """
        if not len(ids):
            return []
        places = []
        for shard in np.flatnonzero(np.diff(self._firsts)).tolist():
            opened = self.shard(shard)
            for document in opened.documents_with(len(ids)):
                if np.array_equal(opened.read_document(document), ids):
                    places.append(self._line_span(shard, document))
        return places

    def _line_span(self, shard: int, document: int) -> tuple[int, int]:
        first, last = self.shard(shard).document_span(document)
        return int(self._firsts[shard]) + first, int(self._firsts[shard]) + last

    def _shards_named(self, name: str) -> list[int]:
        names = self._located.table.names
        base = Path(name).name
        numbers = [number for number, shard_name in enumerate(names) if shard_name == base]
        if name == base:
            return numbers
        return [number for number in numbers if self.shard_path(number).resolve() == Path(name).resolve()]
