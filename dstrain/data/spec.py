"""What the rows of a run depend on, as plain data that can be sent to another process."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from dstrain.data.masking import Unit, Vocabulary
from dstrain.data.pairs import PairObjective

DEFAULT_TEXT_FIELD = "text"

Purpose = Literal["train", "valid"]


def masked_per_row(rate: float, sequence_length: int) -> int:
    """How many tokens of every row are predicted at a masking rate."""
    return max(1, round(rate * sequence_length))


@dataclass(frozen=True)
class SourceSpec:
    """A corpus of a mixture: its name in the recipe, and a folder, a glob or a brace pattern of shards."""

    name: str
    location: str


@dataclass(frozen=True)
class PhaseSpec:
    """A stretch of data steps from `first_step` on; `steps` of None is without end.

    `masking_rate` is that of its first and of its last step; in between it is interpolated. `weights` are by source;
    a source of weight 0 has no rows.
    """

    first_step: int
    steps: int | None
    global_batch_rows: int
    sequence_length: int
    masking_rate: tuple[float, float]
    weights: tuple[float, ...]

    def masked_per_row(self, step: int) -> int:
        """How many tokens of each row of a data step are predicted."""
        first, last = self.masking_rate
        passed = 0.0
        if self.steps is not None and self.steps > 1:
            passed = min(max((step - self.first_step) / (self.steps - 1), 0.0), 1.0)
        return masked_per_row(first + (last - first) * passed, self.sequence_length)

    @property
    def most_masked(self) -> int:
        """The most tokens of a row that any step of the phase predicts: what its buffers have room for."""
        return masked_per_row(max(self.masking_rate), self.sequence_length)


@dataclass(frozen=True)
class StreamSpec:
    """Everything that the rows of a run depend on. Equal specs and equal corpora make the same stream.

    The first phase begins at data step `first_step`, with row `first_row` of the run and the first token of every
    source: 0 and 0, unless the run went on with other data there. `tokenizer` is a tokenizer's folder; token shards can
    do without one where `vocabulary` is given. `shuffle_window` is in blocks of a lane; None is the default.
    """

    sources: tuple[SourceSpec, ...]
    phases: tuple[PhaseSpec, ...]
    lanes: int
    seed: int
    tokenizer: str | None
    vocabulary: Vocabulary | None = None
    shuffle_window: int | None = None
    masking_replace: tuple[float, float, float] = (0.8, 0.1, 0.1)
    masking_unit: Unit = "token"
    text_field: str = DEFAULT_TEXT_FIELD
    on_bad_sample: Literal["stop", "skip"] = "stop"
    max_bad_samples: int = 0
    purpose: Purpose = "train"
    pair_objective: PairObjective | None = None
    pair_tokens: int = 0
    first_step: int = 0
    first_row: int = 0

    def to_json(self) -> dict[str, Any]:
        """For the way into another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        vocabulary = content["vocabulary"]
        if vocabulary is not None:
            vocabulary = Vocabulary(vocabulary["size"], vocabulary["mask_id"], tuple(vocabulary["special_ids"]))
        phases = (
            PhaseSpec(**{**phase, "masking_rate": tuple(phase["masking_rate"]), "weights": tuple(phase["weights"])})
            for phase in content["phases"]
        )
        return cls(
            **{
                **content,
                "sources": tuple(SourceSpec(**source) for source in content["sources"]),
                "phases": tuple(phases),
                "masking_replace": tuple(content["masking_replace"]),
                "vocabulary": vocabulary,
            }
        )
