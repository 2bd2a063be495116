"""How many tokens each document of a text shard has, counted once per tokenizer: text is then addressed in tokens.

    train-000000.tar.<key>.tokens.json  per document its tokens; for one that is tokenized in segments (`tokens.py`),
                                        per segment its tokens and where it begins in the text's UTF-8
    tokens.<key>.json                   per shard of the folder its digest, tokens and unreadable samples

`<key>` names the tokenizer and the field of the texts. A sample that cannot be read has no tokens, and is listed.
Where the folder cannot be written, the same files lie in the user's cache folder (`user_cache.py`):

    counts/<key>/ab/abc….tokens.json    of the shard with the digest abc…
    counts/<key>/<folder>.json          of a folder's shards, by a hash of its path

Several processes that need the same counts share the work without a word: each takes the shards in an order of its
own, and takes over what it finds counted.
"""

import os
import shlex
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from dstrain.base.blocks import DIGEST_BYTES
from dstrain.data.index_file import decode_column, encode_column, index_remedy, read_index_file, write_index_file
from dstrain.data.locate import Located
from dstrain.data.mapped import BadSample, MappedShard
from dstrain.data.terminal import with_progress
from dstrain.data.tokens import DocumentTokenizer, numbered_segments, segment_batches
from dstrain.data.user_cache import is_writable, keep, user_cache, warn_once
from dstrain.errors import CorpusError

BAD_SAMPLES_LISTED = 20  # of a shard; all are counted
BATCH_CHARACTERS = 1 << 19  # tokenized by one thread at a time
CACHE_NAME = "counts"
UNREADABLE = (OSError, CorpusError, KeyError, TypeError, ValueError)  # what a file of counts raises that is none


@dataclass(frozen=True)
class LongDocuments:
    """The documents of a shard that are tokenized in segments, in order.

    Of document `numbers[i]`, the segments `first_segments[i]` … `first_segments[i + 1] - 1` are in the columns
    `tokens` (special tokens in) and `bytes` (of the text's UTF-8).
    """

    numbers: NDArray[np.int64]
    first_segments: NDArray[np.int64]
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]

    def of(self, document: int) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """The tokens and bytes of a document's segments; None for one that is not long."""
        place = int(np.searchsorted(self.numbers, document))
        if place == len(self.numbers) or self.numbers[place] != document:
            return None
        own = slice(int(self.first_segments[place]), int(self.first_segments[place + 1]))
        return self.tokens[own], self.bytes[own]


@dataclass(frozen=True)
class TokenCounts:
    """The tokens of a text shard's documents, special tokens in: 0 for an empty text and for an unreadable sample."""

    tokens: NDArray[np.int64]  # of each document
    long: LongDocuments
    bad_count: int
    bad_samples: tuple[tuple[str, str], ...]  # key and reason of the first ones


@dataclass(frozen=True)
class CorpusCounts:
    """The tokens of text shards. `kept` are the counts, by number of shard, that could not be written anywhere."""

    tokens: NDArray[np.int64]  # of each shard
    bad: NDArray[np.int64]
    kept: Mapping[int, TokenCounts]


class TokenCounter:
    """Counts tokens with one tokenizer in one field of the texts, and knows where the counts are kept."""

    def __init__(self, tokenizer: DocumentTokenizer, text_field: str) -> None:
        self.tokenizer, self.text_field = tokenizer, text_field
        self._head = {"tokenizer": tokenizer.digest, "text_field": text_field}
        self._key = xxhash.xxh3_64_hexdigest(f"{tokenizer.digest} {text_field}".encode())[:12]

    def _counts_paths(self, mapped: MappedShard) -> tuple[Path, Path | None]:
        """Where the counts of a shard's documents are kept: beside it, or in the cache."""
        shard, digest = mapped.path, mapped.located.summary.digest
        beside = shard.with_name(f"{shard.name}.{self._key}.tokens.json")
        return beside, user_cache(CACHE_NAME, self._key, digest[:2], f"{digest}.tokens.json")

    def _summary_paths(self, folder: Path) -> tuple[Path, Path | None]:
        """Where the counts of a folder's shards are kept: in it, or in the cache."""
        name = xxhash.xxh3_64_hexdigest(str(folder.resolve()).encode("utf-8", "surrogateescape"))
        return folder / f"tokens.{self._key}.json", user_cache(CACHE_NAME, self._key, f"{name}.json")

    # ------------------------------------------------------------ a shard

    def counts_of(self, mapped: MappedShard) -> TokenCounts | None:
        """The counts that are kept of a shard, None where there are none of this shard, tokenizer and field."""
        counts = (self._read(path, mapped.located.summary.digest) for path in self._counts_paths(mapped) if path)
        return next(filter(None, counts), None)

    def _read(self, path: Path, digest: str) -> TokenCounts | None:
        try:
            content = read_index_file(path)
            if content["digest"] != digest or not self._is_own(content):
                return None
            return TokenCounts(
                decode_column(content["tokens"]),
                LongDocuments(
                    decode_column(content["long_documents"]),
                    np.concatenate([[0], np.cumsum(decode_column(content["long_segments"]))]),
                    decode_column(content["segment_tokens"]),
                    decode_column(content["segment_bytes"]),
                ),
                content["bad_count"],
                tuple((key, reason) for key, reason in content["bad_samples"]),
            )
        except UNREADABLE:  # then they are made anew
            return None

    def _is_own(self, content: Mapping[str, object]) -> bool:
        """Whether a file was written for this tokenizer and field."""
        return all(content[name] == value for name, value in self._head.items())

    def _keep(self, mapped: MappedShard, counts: TokenCounts) -> bool:
        """Write a shard's counts beside it, or into the cache, and say whether that could be done."""
        content = {
            "digest": mapped.located.summary.digest,
            **self._head,
            "tokens": encode_column(counts.tokens),
            "long_documents": encode_column(counts.long.numbers),
            "long_segments": encode_column(np.diff(counts.long.first_segments)),
            "segment_tokens": encode_column(counts.long.tokens),
            "segment_bytes": encode_column(counts.long.bytes),
            "bad_count": counts.bad_count,
            "bad_samples": counts.bad_samples,
        }
        beside, cached = self._counts_paths(mapped)
        return keep(lambda path: write_index_file(path, content), beside, cached)

    def count(self, mapped: MappedShard) -> TokenCounts:
        """Tokenize all documents of a shard, with all cores. Raises CorpusError for bytes that are damaged."""
        bad: list[BadSample] = []
        tokens: list[int] = []
        long: list[tuple[int, list[int], list[int]]] = []  # document, tokens and bytes of its segments
        counts: list[int] = []
        sizes: list[int] = []
        for segment, following, count in self._counted(self._texts(mapped, bad)):
            counts.append(count)
            sizes.append(len(segment.encode()))
            if following == 0:
                counts = self.tokenizer.with_specials(counts)
                if len(counts) > 1:
                    long.append((len(tokens), counts, sizes))
                tokens.append(sum(counts))
                counts, sizes = [], []
        return TokenCounts(
            np.array(tokens, np.int64),
            LongDocuments(
                np.array([number for number, _, _ in long], np.int64),
                np.cumsum([0, *(len(counts) for _, counts, _ in long)], dtype=np.int64),
                np.array([count for _, counts, _ in long for count in counts], np.int64),
                np.array([size for _, _, sizes in long for size in sizes], np.int64),
            ),
            len(bad),
            tuple((sample.key, sample.reason) for sample in bad[:BAD_SAMPLES_LISTED]),
        )

    def _texts(self, mapped: MappedShard, bad: list[BadSample]) -> Iterator[str]:
        for document in range(mapped.located.summary.documents):
            try:
                yield mapped.text(document, self.text_field)
            except BadSample as sample:
                bad.append(sample)
                yield ""

    def _counted(self, texts: Iterable[str]) -> Iterator[tuple[str, int, int]]:
        """Each segment of the texts with how many of its text follow, and its number of tokens.

        Threads do, for the tokenizer lets go of the interpreter while it works.
        """
        threads = len(os.sched_getaffinity(0))
        batches = segment_batches(numbered_segments(texts), BATCH_CHARACTERS)
        with ThreadPoolExecutor(threads) as pool:
            running: deque[tuple[list[tuple[str, int]], Future[list[int]]]] = deque()
            for batch in batches:
                running.append((batch, pool.submit(self.tokenizer.count_segments, [text for text, _ in batch])))
                if len(running) > 2 * threads:
                    yield from _results(*running.popleft())
            while running:
                yield from _results(*running.popleft())

    # ------------------------------------------------------------ many shards

    def count_all(self, located: Located, *, anew: bool = False) -> CorpusCounts:
        """The tokens of all shards, counted where that was not done before, and kept beside them or in the cache.

        Args:
            located: text shards.
            anew: count also what was counted before.

        Raises:
            CorpusError: a shard is damaged.
        """
        tokens, bad = np.full(len(located), -1, np.int64), np.zeros(len(located), np.int64)
        kept: dict[int, TokenCounts] = {}
        for number, folder in enumerate(located.folders):
            own = np.flatnonzero(located.folder_numbers == number)
            summary = _Summary.empty() if anew else self._read_summary(folder)
            tokens[own], bad[own] = summary.look_up(located.table.digests[own])
            missing = own[tokens[own] < 0]
            if not len(missing):
                continue
            located.check_sizes()  # before hours of counting
            order = np.random.default_rng().permutation(missing)  # so that processes seldom count the same shard
            for shard in with_progress(order.tolist(), "shards: counting tokens"):
                counts, is_kept = self.obtain(MappedShard(located[shard]), anew=anew)
                tokens[shard], bad[shard] = counts.tokens.sum(), counts.bad_count
                if not is_kept:
                    kept[shard] = counts
            self._write_summary(folder, summary.with_shards(located.table.digests[own], tokens[own], bad[own]))
        return CorpusCounts(tokens, bad, kept)

    def known_tokens(self, located: Located) -> int | None:
        """The tokens of all shards where every one was counted before, else None. Reads the folders' counts alone."""
        total = 0
        for number, folder in enumerate(located.folders):
            own = np.flatnonzero(located.folder_numbers == number)
            tokens, _ = self._read_summary(folder).look_up(located.table.digests[own])
            if (tokens < 0).any():
                return None
            total += int(tokens.sum())
        return total

    def obtain(self, mapped: MappedShard, *, anew: bool = False) -> tuple[TokenCounts, bool]:
        """A shard's counts, made if need be or if `anew`, and whether they are kept.

        Raises CorpusError for bytes that are damaged.
        """
        counts = None if anew else self.counts_of(mapped)
        if counts is not None:
            return counts, True
        counts = self.count(mapped)
        is_kept = self._keep(mapped, counts)
        if not is_kept:
            self._warn(mapped.path.parent)
        return counts, is_kept

    def remedy(self, mapped: MappedShard) -> str:
        """What has a shard counted again."""
        folder, (beside, _) = mapped.path.parent, self._counts_paths(mapped)
        if beside.exists() or is_writable(folder):
            return index_remedy(folder, tokenizer=self.tokenizer.folder)
        return f"have its tokens counted again with `rm -r {shlex.quote(str(user_cache(CACHE_NAME, self._key)))}`"

    def _warn(self, folder: Path) -> None:
        cached = user_cache(CACHE_NAME)
        remedy = index_remedy(folder, tokenizer=self.tokenizer.folder)
        warn_once(
            f"{folder}: neither it nor {cached or 'a cache folder (there is no home)'} can be written, so at every "
            f"start each rank and each data process counts the tokens of its texts again; {remedy} on a copy that can "
            "be written, or set XDG_CACHE_HOME to a folder that can"
        )

    def _read_summary(self, folder: Path) -> "_Summary":
        beside, cached = self._summary_paths(folder)
        summary = self._summary_at(beside)
        if cached is None:
            return summary
        more = self._summary_at(cached)
        return summary.with_shards(more.digests, more.tokens, more.bad) if len(more.digests) else summary

    def _summary_at(self, path: Path) -> "_Summary":
        try:
            content = read_index_file(path)
            if not self._is_own(content):
                return _Summary.empty()
            digests = np.frombuffer(bytes.fromhex(content["digests"]), np.uint8).reshape(-1, DIGEST_BYTES)
            return _Summary(digests, decode_column(content["tokens"]), decode_column(content["bad"]))
        except UNREADABLE:
            return _Summary.empty()

    def _write_summary(self, folder: Path, summary: "_Summary") -> None:
        columns = {"tokens": encode_column(summary.tokens), "bad": encode_column(summary.bad)}
        content = {**self._head, "digests": summary.digests.tobytes().hex(), **columns}
        beside, cached = self._summary_paths(folder)
        keep(lambda path: write_index_file(path, content), beside, cached)


def _results(batch: list[tuple[str, int]], counts: "Future[list[int]]") -> Iterator[tuple[str, int, int]]:
    for (segment, following), count in zip(batch, counts.result(), strict=True):
        yield segment, following, count


@dataclass(frozen=True)
class _Summary:
    """Tokens and unreadable samples of shards by their digests: whatever their names, and whichever are asked for."""

    digests: NDArray[np.uint8]  # (N, DIGEST_BYTES), in the order of their bytes
    tokens: NDArray[np.int64]
    bad: NDArray[np.int64]

    @classmethod
    def empty(cls) -> "_Summary":
        return cls(np.empty((0, DIGEST_BYTES), np.uint8), np.empty(0, np.int64), np.empty(0, np.int64))

    def look_up(self, digests: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens and unreadable samples of shards; -1 tokens where nothing is known."""
        if not len(self.digests):
            return np.full(len(digests), -1), np.zeros(len(digests), np.int64)
        places = np.searchsorted(_sortable(self.digests), _sortable(digests)).clip(max=len(self.digests) - 1)
        known = (self.digests[places] == digests).all(1)
        return np.where(known, self.tokens[places], -1), np.where(known, self.bad[places], 0)

    def with_shards(self, digests: NDArray[np.uint8], tokens: NDArray[np.int64], bad: NDArray[np.int64]) -> "_Summary":
        """This and some more shards; of one that is here already, nothing changes."""
        digests = np.concatenate([self.digests, digests])
        _, first = np.unique(_sortable(digests), return_index=True)
        return _Summary(
            digests[first], np.concatenate([self.tokens, tokens])[first], np.concatenate([self.bad, bad])[first]
        )


def _sortable(digests: NDArray[np.uint8]) -> NDArray[np.void]:
    """Rows of bytes as single values, which numpy orders by their bytes."""
    return np.ascontiguousarray(digests).view(f"V{DIGEST_BYTES}")[:, 0]
