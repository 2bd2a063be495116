"""Corpora for the tests: every token names its document, so that what was read can be told from the rows."""

import ctypes
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from dstrain.data.masking import NO_LABEL, Vocabulary
from dstrain.data.rows import StepRows
from dstrain.data.spec import PhaseSpec, SourceSpec, StreamSpec
from dstrain.data.stream import RowStream
from dstrain.data.writer import write_token_shards

SPECIAL_IDS = (0, 1, 2, 3, 4)
MASK_ID = 4
FIRST_ID = 5  # of an ordinary token
WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "##s", "ü", "x", "y", "z", ".")


def numbered_corpus(
    folder: Path, lengths: Sequence[int], *, shard_bytes: int = 4096, block_documents: int = 7
) -> Vocabulary:
    """Token shards in which document i is `lengths[i]` times the id FIRST_ID + i."""
    vocab_size = FIRST_ID + len(lengths)
    documents = (np.full(length, FIRST_ID + number) for number, length in enumerate(lengths))
    write_token_shards(
        folder,
        documents,
        vocab_size=vocab_size,
        tokenizer=None,
        shard_bytes=shard_bytes,
        block_documents=block_documents,
    )
    return Vocabulary(vocab_size, MASK_ID, SPECIAL_IDS)


def stream_spec(
    corpus: Path | Mapping[str, Path],
    vocabulary: Vocabulary | None,
    *,
    phases: Sequence[PhaseSpec] | None = None,
    sequence_length: int = 32,
    lanes: int = 8,
    global_batch_rows: int = 16,
    masking_rate: float = 0.25,
    **changes: object,
) -> StreamSpec:
    """A small stream of one phase without end, or of `phases`; `changes` are its other fields."""
    locations = {"corpus": corpus} if isinstance(corpus, Path) else corpus
    if phases is None:
        rates, weights = (masking_rate, masking_rate), (1 / len(locations),) * len(locations)
        phases = [PhaseSpec(0, None, global_batch_rows, sequence_length, rates, weights)]
    fields: dict[str, object] = {
        "sources": tuple(SourceSpec(name, str(location)) for name, location in locations.items()),
        "phases": tuple(phases),
        "lanes": lanes,
        "seed": 3,
        "shuffle_window": 2,
        "tokenizer": None,
        "vocabulary": vocabulary,
    }
    return StreamSpec(**(fields | changes))  # type: ignore[arg-type]


def original_ids(rows: StepRows) -> NDArray[np.int32]:
    """What stood in the rows before masking, (R, L)."""
    ids = rows.input_ids.copy()
    row, place = np.nonzero(rows.labels != NO_LABEL)
    ids[row, rows.masked_positions[row, place]] = rows.labels[row, place]
    return ids


@dataclass(frozen=True)
class GlobalStep:
    """One step of all ranks: rows by number as bytes, their sources, and the digest summed over ranks."""

    rows: dict[int, bytes]
    sources: dict[int, int]
    digest: tuple[int, int]


def global_steps(
    spec: StreamSpec, world: int, steps: int, *, first_step: int = 0, prefetch_steps: int = 0
) -> Iterator[GlobalStep]:
    """Run all ranks of a world side by side."""
    streams = [
        RowStream(spec, rank, world, first_step=first_step, prefetch_steps=prefetch_steps) for rank in range(world)
    ]
    try:
        for step in range(first_step, first_step + steps):
            rows: dict[int, bytes] = {}
            sources: dict[int, int] = {}
            digest = np.zeros(2, np.int64)
            for stream in streams:
                own = next(stream)
                assert own.step == step
                assert (np.diff(own.row_numbers) > 0).all()
                for index, number in enumerate(own.row_numbers.tolist()):
                    rows[number] = b"|".join(
                        array[index].tobytes()
                        for array in (own.input_ids, own.position_ids, own.masked_positions, own.labels)
                    )
                    sources[number] = int(own.sources[index])
                digest += own.digest
            yield GlobalStep(rows, sources, (int(digest[0]), int(digest[1])))
    finally:
        for stream in streams:
            stream.close()


def write_small_tokenizer(folder: Path, cls: str = "[CLS]", sep: str = "[SEP]", mask: str = "[MASK]") -> Path:
    """A word-level tokenizer of `WORDS`, as Transformers would save it: ids 0 … 4 are special."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["[PAD]", "[UNK]", cls, sep, mask, *WORDS]
    tokenizer = Tokenizer(WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(tokens[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": cls, "sep_token": sep, "mask_token": mask}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody can make files in a folder: not root either, nor the processes that it starts."""
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    with _without_overriding_modes():
        yield
    folder.chmod(mode)


@contextmanager
def _without_overriding_modes() -> Iterator[None]:
    """Take from root, for a while, the capabilities that let it pass over the modes of files: capabilities(7)."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] = effective & ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if sets[0] == effective:
        yield
        return
    set_securebits, no_root = 28, 1
    assert libc.prctl(set_securebits, no_root, 0, 0, 0) == 0 and libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0 and libc.prctl(set_securebits, 0, 0, 0, 0) == 0


def sentences(count: int) -> Iterable[str]:
    """Texts of `WORDS`, each different."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield " ".join(rng.choice(["the", "a", "cat", "dog", "sat", "ran", "on", "mats"], int(rng.integers(1, 40))))
