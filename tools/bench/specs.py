"""The streams of the benchmarks: token corpora, one phase without end, tokens masked one by one."""

from pathlib import Path

from packing import MASK_ID, REPLACE, VOCAB_SIZE

from dstrain.data.masking import Vocabulary
from dstrain.data.spec import PhaseSpec, SourceSpec, StreamSpec

MIXTURE_WEIGHTS = (0.4, 0.2, 0.15, 0.1, 0.06, 0.05, 0.03, 0.01)


def mixture_folders(folder: Path) -> tuple[Path, ...]:
    """Where the corpora of a mixture lie."""
    return tuple(folder / f"source-{number}" for number in range(len(MIXTURE_WEIGHTS)))


def stream_spec(
    locations: tuple[Path, ...],
    *,
    weights: tuple[float, ...] = (1.0,),
    rows: int,
    row_tokens: int,
    lanes: int,
    masking_rate: float = 0.3,
    shuffle_window: int | None = None,
) -> StreamSpec:
    """Rows of these corpora by their weights, with the vocabulary that the benchmarks' documents are made of."""
    phase = PhaseSpec(
        first_step=0,
        steps=None,
        global_batch_rows=rows,
        sequence_length=row_tokens,
        masking_rate=(masking_rate, masking_rate),
        weights=weights,
    )
    return StreamSpec(
        sources=tuple(SourceSpec(location.name, str(location)) for location in locations),
        phases=(phase,),
        lanes=lanes,
        seed=0,
        shuffle_window=shuffle_window,
        masking_replace=REPLACE,
        masking_unit="token",
        tokenizer=None,
        vocabulary=Vocabulary(VOCAB_SIZE, MASK_ID, tuple(range(MASK_ID + 1))),
        text_field="text",
        on_bad_sample="stop",
        max_bad_samples=0,
        purpose="train",
        pair_objective=None,
        pair_tokens=0,
    )
