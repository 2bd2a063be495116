#!/usr/bin/env python3
"""Recompute the ledger of a masked-LM run from its recipe: on one process, without a model, by another program.

    python tools/recompute_ledger.py RUN --out DIR

Writes DIR/ledger.jsonl for what the run has done. `dstrain ledger RUN DIR` then shows whether the run, on its ranks and
through its restarts, was fed the rows that the law of the data order says (docs/architecture.md, section 3).

This is that law a second time, as simply as it can be said. Training computes any row by closed forms; here every epoch
of every source is written down block by block and dealt out, each lane has a tape that is read from the run's first
token on, and rows are counted. Shared with training are what is no matter of order: reading shards, the numbers that
are drawn, the source of a row, how rows are masked and paired, and the sizes of blocks and windows.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dstrain.base.counter_rng import draws, mix64, permutation, stream_key
from dstrain.data.ledger import LEDGER_NAME, LedgerEntry, LedgerWriter, read_all_backwards
from dstrain.data.line import default_block_tokens, default_window_blocks
from dstrain.data.masking import Masker
from dstrain.data.mixture import Mixture
from dstrain.data.pairs import Pairing
from dstrain.data.permutation import permute
from dstrain.data.rows import digest_hex, digest_keys
from dstrain.data.shards import Corpus, TokenIds
from dstrain.data.spec import PhaseSpec, StreamSpec
from dstrain.data.tokens import DocumentTokenizer
from dstrain.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from dstrain.proof.history import run_ledger
from dstrain.proof.training_data import TrainingData
from dstrain.recipe.pair_slots import pair_slots

LineRange = tuple[int, int]  # tokens of a corpus' line: first and last + 1


@dataclass(frozen=True)
class Order:
    """What the order of one corpus follows from."""

    corpus: Corpus
    lanes: int
    key: tuple[int | str, ...]
    block_tokens: int
    window_blocks: int

    @classmethod
    def of(cls, corpus: Corpus, spec: StreamSpec) -> "Order":
        """The order of a source of a run."""
        return cls(
            corpus,
            spec.lanes,
            (spec.seed, spec.purpose, corpus.digest),
            default_block_tokens(corpus.total_tokens, corpus.total_documents),
            default_window_blocks(spec.lanes) if spec.shuffle_window is None else spec.shuffle_window,
        )

    def blocks(self, epoch: int) -> list[LineRange]:
        """All blocks of the line in the order of an epoch."""
        full, rest = divmod(self.corpus.total_tokens, self.block_tokens)
        numbers = permute(np.arange(full), full, stream_key(*self.key, "blocks", epoch)).tolist() if full else []
        if rest:
            draw = int(draws(stream_key(*self.key, "rest", epoch), np.zeros(1, np.uint64))[0])
            numbers.insert(draw % (full + 1), full)
        return [
            (number * self.block_tokens, min((number + 1) * self.block_tokens, self.corpus.total_tokens))
            for number in numbers
        ]

    def shares(self, epoch: int) -> list[int]:
        """How many tokens of an epoch each lane reads: of the first n tokens of a run, lane l has (n + l) ÷ lanes."""
        before, after = epoch * self.corpus.total_tokens, (epoch + 1) * self.corpus.total_tokens
        return [(after + lane) // self.lanes - (before + lane) // self.lanes for lane in range(self.lanes)]

    def windows(self, lane: int, epoch: int) -> Iterator[tuple[int, list[LineRange]]]:
        """What a lane reads in an epoch: the number of each window, and the parts of blocks that it has of it."""
        shares = self.shares(epoch)
        lane_first = sum(shares[:lane])
        lane_last = lane_first + shares[lane]
        blocks = self.blocks(epoch)
        ends = accumulate(last - first for first, last in blocks)
        parts: dict[int, list[LineRange]] = {}
        for number, ((first, last), end) in enumerate(zip(blocks, ends, strict=True)):
            begin = end - (last - first)  # of the block, among the blocks laid end to end
            skipped, missing = max(lane_first - begin, 0), max(end - lane_last, 0)
            if skipped + missing < last - first:
                parts.setdefault(number // self.window_blocks, []).append((first + skipped, last - missing))
        yield from sorted(parts.items())

    def tape(self, lane: int) -> Iterator[TokenIds]:
        """All that a lane ever reads, as parts of documents: window by window, each shuffled, epoch after epoch."""
        for epoch in count():
            for number, parts in self.windows(lane, epoch):
                slices = [
                    column
                    for first, last in parts
                    for part in [self.corpus.slices(first, last)]
                    for column in zip(part.shard.tolist(), part.start.tolist(), part.length.tolist(), strict=True)
                ]
                for place in permutation(stream_key(*self.key, "window", epoch, lane, number), len(slices)).tolist():
                    shard, start, length = slices[place]
                    yield self.corpus.shard(shard).read(start, length)


class Reader:
    """Takes rows off a tape."""

    def __init__(self, tape: Iterator[TokenIds]) -> None:
        self._tape = tape
        self._rest: TokenIds = np.empty(0, np.int32)

    def row(self, tokens: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The next tokens, and their places in their parts of documents."""
        ids, positions = np.empty(tokens, np.int32), np.empty(tokens, np.int32)
        filled = 0
        while filled < tokens:
            if not len(self._rest):
                self._rest = next(self._tape)
            part, self._rest = self._rest[: tokens - filled], self._rest[tokens - filled :]
            ids[filled : filled + len(part)] = part
            positions[filled : filled + len(part)] = np.arange(len(part))
            filled += len(part)
        return ids, positions


class RowRecords:
    """Masks rows of a phase, pairs them where the recipe says so, and takes their digests."""

    def __init__(self, spec: StreamSpec, phase: PhaseSpec, tokenizer: DocumentTokenizer) -> None:
        length = phase.sequence_length
        self._masker = Masker(
            tokenizer.vocabulary,
            length,
            phase.most_masked,
            spec.masking_replace,
            spec.seed,
            spec.purpose,
            spec.masking_unit,
            None if spec.masking_unit == "token" else tokenizer.continuing_ids(),
        )
        self._pairing: Pairing | None = None
        if spec.pair_objective:
            cls_id, sep_id = tokenizer.cls_id, tokenizer.sep_id
            self._pairing = Pairing(
                spec.pair_objective, spec.pair_tokens, cls_id, sep_id, length, spec.seed, spec.purpose
            )
        self._pair_slots = pair_slots(length) if spec.pair_objective else 0

    def digest(
        self, ids: NDArray[np.int32], positions: NDArray[np.int32], row_number: int, masked: int
    ) -> NDArray[np.uint64]:
        """The digest of one row's record, in two halves."""
        row_ids, row_positions, row_numbers = ids[None], positions[None], np.array([row_number], np.int64)
        pairs = np.empty((1, self._pair_slots, 4), np.int32)
        if self._pairing:
            pairs = self._pairing.make(row_ids, row_positions, row_numbers)
        masked_positions, labels = self._masker.mask(row_ids, row_numbers, masked)
        record = (row_numbers.view(np.int32), row_ids, masked_positions, labels, row_positions, pairs)
        words = np.concatenate([part.astype(np.int32).reshape(-1) for part in record]).view(np.uint64)
        return mix64(words @ digest_keys(len(words)))


def global_batches(data: TrainingData) -> Iterator[tuple[tuple[int, int], str]]:
    """The rows of every global batch from the first one on, first and last, and their digest; without end."""
    spec = data.spec
    readers = [
        [Reader(order.tape(lane)) for lane in range(spec.lanes)]
        for order in (Order.of(corpus, spec) for corpus in data.corpora)
    ]
    row_number = spec.first_row
    ends = [later.first_step for _, later in pairwise(spec.phases)]
    for phase, end in zip(spec.phases, [*ends, None], strict=True):
        records = RowRecords(spec, phase, data.tokenizer)
        mixture = Mixture(phase.weights, spec.lanes)
        lane_rows = phase.global_batch_rows // spec.lanes
        for step in count(phase.first_step) if end is None else range(phase.first_step, end):
            digest = np.zeros(2, np.uint64)
            first_row = row_number
            for turn in range(lane_rows):
                row_of_lane = np.array((step - phase.first_step) * lane_rows + turn)
                sources = mixture.sources(np.arange(spec.lanes), row_of_lane)
                for lane, source in enumerate(sources.tolist()):
                    ids, positions = readers[source][lane].row(phase.sequence_length)
                    digest += records.digest(ids, positions, row_number, phase.masked_per_row(step))
                    row_number += 1
            yield (first_row, row_number - 1), digest_hex(digest.view(np.int64))


def recompute(run_dir: Path, out: Path) -> int:
    """Write the ledger below `out` and return its number of lines. Raises UserError where the run cannot be read."""
    lines = [entry for entry, _ in read_all_backwards(run_ledger(run_dir))]
    data, _ = TrainingData.of(str(run_dir), [])
    lines = [entry for entry in reversed(lines) if entry.rows[0] >= data.spec.first_row]  # those before: other data
    if not lines:
        raise UserError(f"{run_dir}: this run has made no step with its data yet; run it first")
    last_row = max(entry.rows[1] for entry in lines)
    digests: dict[tuple[int, int], str] = {}
    for rows, digest in global_batches(data):
        digests[rows] = digest
        if rows[1] >= last_row:
            break
    out.mkdir(parents=True, exist_ok=True)
    (out / LEDGER_NAME).unlink(missing_ok=True)
    with LedgerWriter(out / LEDGER_NAME) as ledger:
        for entry in lines:
            if entry.rows not in digests:
                first, last = entry.rows
                raise UserError(f"{run_dir}: step {entry.step} has rows {first}–{last}, which are no global batch")
            ledger.append(LedgerEntry(entry.step, entry.rows, digests[entry.rows], entry.skipped))
    return len(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="recompute a run's ledger from its recipe, without training")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for ledger.jsonl")
    args = parser.parse_args()
    try:
        lines = recompute(args.run, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"{lines:,} steps read anew on one process, without a model → {args.out / LEDGER_NAME}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
