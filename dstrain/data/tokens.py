"""Turns texts into token ids with the `tokenizers` library alone: a data process needs neither torch nor transformers.

A tokenizer is a folder as Transformers saves it. `tokenizer.json` holds the algorithm, `tokenizer_config.json` (or
`special_tokens_map.json`) says which token plays which part; bert ([CLS] … [SEP]), roberta (<s> … </s>) and
modernbert all fit.

A long text is tokenized in segments, so that neither its tokenization nor a slice of it takes more memory or time than
a segment does. A document's ids are thus the same whether they are read from a text shard or were built into a token
shard.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dstrain.data.masking import Vocabulary
from dstrain.errors import CorpusError

ROLE_FILES = ("tokenizer_config.json", "special_tokens_map.json")
FIRST_AND_LAST = (("cls_token", "bos_token"), ("sep_token", "eos_token"))  # around every document, by preference
SEGMENT_CHARACTERS = 1 << 16  # of a text, tokenized at a time
BATCH_SEGMENTS = 1024
BATCH_CHARACTERS = 1 << 22
WHITE_SPACE = " \t\r\n"
WORD_BEGINNINGS = ("Ġ", "Ċ", "ĉ", "č", "▁")  # blanks, as byte-level BPE and SentencePiece write them


@dataclass(frozen=True)
class DocumentTokenizer:
    """A tokenizer with its special tokens known.

    A document is [CLS] text [SEP]; one without any token of text is nothing at all. `begin` is what stands before the
    text: one id, but none for T5 and Marian, whose texts are text </s>. They have no mask either.
    """

    tokenizer: Tokenizer
    vocab_size: int  # number of ids, added tokens included
    special_ids: tuple[int, ...]
    begin: tuple[int, ...]
    sep_id: int
    mask_id: int | None
    pad_id: int
    digest: str
    folder: str  # for messages: where it was loaded from

    @property
    def cls_id(self) -> int:
        """The id that begins a text."""
        (first,) = self.begin
        return first

    @property
    def vocabulary(self) -> Vocabulary:
        """What masking needs to know."""
        assert self.mask_id is not None
        return Vocabulary(self.vocab_size, self.mask_id, self.special_ids)

    @property
    def special_token_ids(self) -> dict[str, int]:
        """What a Transformers config calls the special ids."""
        first = {role: self.cls_id for role in ("cls_token_id", "bos_token_id") if self.begin}
        return {"pad_token_id": self.pad_id, "sep_token_id": self.sep_id, "eos_token_id": self.sep_id} | first

    def encode(self, text: str) -> NDArray[np.int32]:
        """The ids of one document, specials included."""
        return self._document([self.encode_segment(segment) for segment in segments(text)])

    def encode_many(self, texts: Iterable[str]) -> Iterator[NDArray[np.int32]]:
        """The same for many texts, using all cores."""
        document: list[NDArray[np.int32]] = []
        for batch in segment_batches(numbered_segments(texts), BATCH_CHARACTERS):
            for (_, following), ids in zip(batch, self._encode_segments([text for text, _ in batch]), strict=True):
                document.append(ids)
                if following == 0:
                    yield self._document(document)
                    document = []

    def _encode_segments(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The library's encodings take some 150 bytes a token, so none is kept."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_segment(self, segment: str) -> NDArray[np.int32]:
        """The ids of a segment of a text, without specials."""
        return np.array(self.tokenizer.encode(segment, add_special_tokens=False).ids, np.int32)

    def count_segments(self, texts: Sequence[str]) -> list[int]:
        """How many ids each segment has, without specials."""
        return [len(encoding) for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def with_specials(self, counts: Sequence[int]) -> list[int]:
        """The ids of each segment of a text once specials are in: the first has what begins it, the last its end."""
        if not any(counts):
            return list(counts)
        whole = [len(self.begin) + counts[0], *counts[1:]]
        whole[-1] += 1
        return whole

    def decode(self, ids: NDArray[np.integer]) -> str:
        """The text of ids, specials shown."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def continuing_ids(self) -> NDArray[np.int64]:
        """The pieces that go on with the word of the piece before: `##ing` in WordPiece, no space in front elsewhere.

        Raises CorpusError where the pieces do not show it.
        """
        pieces = self.tokenizer.get_vocab(with_added_tokens=False)
        model = json.loads(self.tokenizer.to_str())["model"]
        prefix = model.get("continuing_subword_prefix")
        if model["type"] == "WordPiece" and prefix:
            found = [number for piece, number in pieces.items() if piece.startswith(prefix)]
        elif any(piece.startswith(WORD_BEGINNINGS) for piece in pieces):
            found = [number for piece, number in pieces.items() if not piece.startswith(WORD_BEGINNINGS)]
        else:
            raise CorpusError(
                "data.masking.unit: this tokenizer's pieces do not show where a word begins (neither ## nor a space); "
                "use token"
            )
        return np.array(sorted(found), np.int64)

    def _document(self, parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
        if not any(map(len, parts)):
            return np.empty(0, np.int32)
        return np.concatenate([np.array(self.begin, np.int32), *parts, np.array([self.sep_id], np.int32)])


def segments(text: str) -> Iterator[str]:
    """Cut a text into segments of at most SEGMENT_CHARACTERS, of which a short text is one.

    A cut is made before the last run of white space in the second half of a segment, so that no word is cut and the
    space that many tokenizers take as a part of the word behind it stays with that word; where there is no white
    space, after SEGMENT_CHARACTERS.
    """
    start = 0
    while len(text) - start > SEGMENT_CHARACTERS:
        middle, stop = start + SEGMENT_CHARACTERS // 2, start + SEGMENT_CHARACTERS
        space = max(text.rfind(character, middle, stop + 1) for character in WHITE_SPACE)
        if space >= 0:
            before = len(text[middle:space].rstrip(WHITE_SPACE))
            stop = middle + before if before else space
        yield text[start:stop]
        start = stop
    yield text[start:]


def numbered_segments(texts: Iterable[str]) -> Iterator[tuple[str, int]]:
    """The segments of all texts, each with how many of its text's segments follow: 0 for the last."""
    for text in texts:
        if len(text) <= SEGMENT_CHARACTERS:
            yield text, 0
        else:
            parts = list(segments(text))
            yield from zip(parts, range(len(parts) - 1, -1, -1), strict=True)


def segment_batches(parts: Iterable[tuple[str, int]], batch_characters: int) -> Iterator[list[tuple[str, int]]]:
    """Segments for one call, so that a machine's cores have enough to do and memory is bounded."""
    batch: list[tuple[str, int]] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part[0])
        if len(batch) == BATCH_SEGMENTS or characters >= batch_characters:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def load_document_tokenizer(folder: str | Path, *, text_to_text: bool = False) -> DocumentTokenizer:
    """Load a tokenizer's folder. Raises CorpusError naming what is missing.

    Args:
        folder: as Transformers saves it.
        text_to_text: for a model that writes text, which can do without a mask and without a token that begins a text.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CorpusError(
            f"{folder}: no tokenizer.json there; give a folder made by `dstrain tokenizer train` or by "
            "`save_pretrained`"
        )
    try:
        content = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise CorpusError(f"{path}: not a tokenizer ({error}); make it again with `dstrain tokenizer train`") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    roles = _roles(folder)
    ids = {role: tokenizer.token_to_id(token) for role, token in roles.items()}

    def need(*candidates: str) -> int:
        for role in candidates:
            number = ids.get(role)
            if number is not None:
                return number
        raise CorpusError(
            f"{folder}: no {' or '.join(candidates)} in {' or '.join(ROLE_FILES)} that its vocabulary knows; add "
            "it there"
        )

    known = {role for role, number in ids.items() if number is not None}
    masks = not text_to_text or "mask_token" in known
    begins = not text_to_text or not known.isdisjoint(FIRST_AND_LAST[0])
    mask_id = need("mask_token") if masks else None
    added = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special_ids = tuple(sorted(added | {number for number in ids.values() if number is not None}))
    return DocumentTokenizer(
        tokenizer=tokenizer,
        vocab_size=1 + max(tokenizer.get_vocab(with_added_tokens=True).values()),
        special_ids=special_ids,
        begin=(need(*FIRST_AND_LAST[0]),) if begins else (),
        sep_id=need(*FIRST_AND_LAST[1]),
        mask_id=mask_id,
        pad_id=need("pad_token"),
        digest=_digest(content, ids),
        folder=str(folder),
    )


def _roles(folder: Path) -> dict[str, str]:
    """Role (`mask_token`, …) → token, from the first of `ROLE_FILES` that names it."""
    roles: dict[str, str] = {}
    for name in reversed(ROLE_FILES):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise CorpusError(f"{path}: not JSON ({error})") from error
        for role, token in content.items():
            if role.endswith("_token") and isinstance(token, str):
                roles[role] = token
            elif role.endswith("_token") and isinstance(token, dict):
                roles[role] = str(token["content"])
    return roles


def _digest(content: str, ids: dict[str, int | None]) -> str:
    """Of what decides a text's ids: neither formatting, nor truncation and padding, which other programs switch."""
    parts = {key: value for key, value in json.loads(content).items() if key not in ("truncation", "padding")}
    canonical = json.dumps([parts, sorted(ids.items())], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
