"""Token ids of texts, shortened and padded into a batch: the same in training, evaluation and prediction."""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dstrain.data.tokens import DocumentTokenizer
from dstrain.tasks.task import Inputs

Cut = Literal["end", "middle", "start"]  # where a text that is too long loses tokens
LENGTH_MULTIPLE = 8  # tensor cores like it
Ids = NDArray[np.int32]


def encoded(encoder: DocumentTokenizer, texts: Iterable[str], length: int, cut: Cut = "end") -> list[Ids]:
    """[CLS] text [SEP] of each text, at most `length` tokens: longer ones lose tokens where `cut` says, no special."""
    nothing = np.array([*encoder.begin, encoder.sep_id], np.int32)  # a text without tokens, such as a control character
    complete = (ids if len(ids) else nothing for ids in encoder.encode_many(texts))
    # Tokens kept from the end; the [SEP] is one.
    last = {"end": 1, "middle": length // 2, "start": length - len(encoder.begin)}[cut]
    return [ids if len(ids) <= length else np.concatenate([ids[: length - last], ids[-last:]]) for ids in complete]


def encoded_pairs(
    encoder: DocumentTokenizer, pairs: Iterable[tuple[str, str]], length: int, separators: int
) -> list[tuple[Ids, int]]:
    """[CLS] first [SEP] second [SEP] of each pair and where `second` begins; tokens go from the end of the longer one.

    Args:
        encoder: the tokenizer.
        pairs: of texts.
        length: most tokens of a row.
        separators: [SEP]s between the two: 1, but 2 for RoBERTa.
    """
    listed = list(pairs)
    firsts = encoded(encoder, (first for first, _ in listed), length)
    seconds = encoded(encoder, (second for _, second in listed), length)
    rows = []
    for one, other in zip(firsts, seconds, strict=True):
        first, second = one[1:-1], other[1:-1]
        room = max(length - 2 - separators, 0)
        kept = min(len(first), max(room - len(second), room - room // 2))
        first, second = first[:kept], second[: room - kept]
        ids = [encoder.cls_id, *first, *[encoder.sep_id] * separators, *second, encoder.sep_id]
        rows.append((np.array(ids, np.int32), 1 + len(first) + separators))
    return rows


def batches_by_length(rows: Sequence[Ids], batch_rows: int) -> list[list[int]]:
    """The places of rows that share a batch, those of like length, the longest first."""
    longest_first = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    return [longest_first[start : start + batch_rows] for start in range(0, len(rows), batch_rows)]


def padded(
    rows: Sequence[Ids],
    pad_id: int,
    longest_allowed: int,
    second_starts: Sequence[int] = (),
    multiple: int = LENGTH_MULTIPLE,
) -> Inputs:
    """`input_ids` and `attention_mask`, int64 (rows, tokens), padded to the longest, rounded up to a multiple.

    Args:
        rows: ids of each, at most `longest_allowed` of them.
        pad_id: fills the rest of a row.
        longest_allowed: the rounding goes no further than this, the model has no more positions.
        second_starts: where the second text of each row begins; given, there are `token_type_ids` too.
        multiple: of the number of tokens; 1 for no rounding.
    """
    longest = max(len(ids) for ids in rows)
    width = min(-(-longest // multiple) * multiple, longest_allowed)
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    attention_mask = np.zeros((len(rows), width), np.int64)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
    inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
    if len(second_starts):
        second = (np.arange(width) >= np.array(second_starts)[:, None]) & (attention_mask == 1)
        inputs["token_type_ids"] = torch.from_numpy(second.astype(np.int64))
    return inputs
