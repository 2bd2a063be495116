"""The recipe of every task, whose sections say every key with its type, its unit and its rule. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, Union

from pydantic import Field

from dstrain.architectures import Architecture, ModelKeys, installed_encoders, installed_seq2seq
from dstrain.base.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section
from dstrain.optimizers import OptimizerSection, installed_optimizers
from dstrain.recipe.data import (
    ClassificationData,
    ExampleData,
    MaskedLmData,
    QuestionAnsweringData,
    RetrievalData,
    SentenceExtractionData,
    SequenceToSequenceData,
    TokenClassificationData,
)
from dstrain.recipe.phases import Phase
from dstrain.recipe.training import Checkpoint, EarlyStopping, Evaluate, Log, Schedule, Train

if TYPE_CHECKING:
    AnyOptimizer = OptimizerSection
else:  # of this package and of others
    _SECTIONS = tuple(optimizer.section for optimizer in installed_optimizers().values())
    AnyOptimizer = Annotated[Union[_SECTIONS], Field(discriminator="name")]  # noqa: UP007

MOST_DEFAULT_LANES = 1024
FEW_LANES = 64  # which are not made fewer
LANE_ROWS = 4  # of a lane in a batch


if TYPE_CHECKING:
    Model: TypeAlias = ModelKeys
    TextToTextModel: TypeAlias = ModelKeys
else:

    def _any_of(architectures: Mapping[str, Architecture]) -> object:
        """The type of a `model` section: that of any of these."""
        sections = tuple(architecture.section for architecture in architectures.values())
        return Annotated[Union[sections], Field(discriminator="architecture")]  # noqa: UP007  (a tuple of them)

    Model, TextToTextModel = _any_of(installed_encoders()), _any_of(installed_seq2seq())


class CommonRecipe(Section):
    """Keys shared by every task."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: str
    model: ModelKeys
    tokenizer: str
    data: Section
    train: Train
    optimizer: AnyOptimizer
    schedule: Schedule = Schedule()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    early_stopping: EarlyStopping | None = None
    log: Log = Log()
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    hang_timeout_seconds: PositiveFloat = 1200.0  # a rank that stands still for longer is ended, and the run restarted

    @property
    def head(self) -> str:
        """The task whose head the model has, by which its parameters are counted: for most this one."""
        return self.task


def default_lanes(global_batches: Sequence[int]) -> int:
    """The number of lanes where a recipe does not say it: a divisor of all of these numbers of rows.

    The greatest one up to a quarter of them, or up to 64 if that is more, and up to 1,024. A lane that has several rows
    in a batch has a document longer than a row in fewer batches, so that neighbouring batches are less alike.
    """
    common = math.gcd(*global_batches)
    most = min(max(common // LANE_ROWS, FEW_LANES), common, MOST_DEFAULT_LANES)
    return next(lanes for lanes in range(most, 0, -1) if common % lanes == 0)


class PretrainingRecipe(CommonRecipe):
    """Pretraining on rows of shards. The sum of `phases` is the run's length; without them `train` says it."""

    model: Model
    data: MaskedLmData
    phases: tuple[Phase, ...] = ()

    @property
    def lanes(self) -> int:
        """`data.lanes`; where that is null, what `default_lanes` makes of all global batches."""
        return default_lanes([self.common_rows]) if self.data.lanes is None else self.data.lanes

    @property
    def common_rows(self) -> int:
        """The greatest number of rows that divides all global batches: as many lanes as there may be.

        `train.global_batch_rows` is among them where every phase has another: evaluations take it.
        """
        of_phases = [phase.train.global_batch_rows for phase in self.phases]
        return math.gcd(self.train.global_batch_rows, *filter(None, of_phases))

    @property
    def head(self) -> str:
        """`masked_lm`, or `paired_masked_lm` where there is one for pairs beside it."""
        return "masked_lm" if self.data.pairs.objective == "none" else "paired_masked_lm"


class MaskedLmRecipe(PretrainingRecipe):
    """Masked-language-model pretraining. The sum of `phases` is the run's length; without them `train` says it."""

    task: Literal["masked_lm"]


class ExampleRecipe(CommonRecipe):
    """Fine-tuning on labelled examples."""

    model: Model | TextToTextModel
    data: ExampleData


class Loss(Section):
    """How a classifier's mistakes weigh. `balanced` weighs each label by the inverse of its frequency, 1 on average."""

    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: Fraction = 0.0


class ClassificationRecipe(ExampleRecipe):
    """Fine-tuning of a sequence classifier."""

    task: Literal["sequence_classification"]
    model: Model
    data: ClassificationData
    loss: Loss = Loss()


class TokenClassificationRecipe(ExampleRecipe):
    """Fine-tuning of a tagger of words: named entities and their like."""

    task: Literal["token_classification"]
    model: Model
    data: TokenClassificationData
    loss: Loss = Loss()


class QuestionAnsweringRecipe(ExampleRecipe):
    """Fine-tuning of a finder of answers in a text."""

    task: Literal["question_answering"]
    model: Model
    data: QuestionAnsweringData


class ContrastiveLoss(Section):
    """InfoNCE (van den Oord et al. 2018) over all documents of the global batch; `symmetric`: over its queries too.

    Similarities are cosines ÷ `temperature`. Documents known to be relevant to a query are never its negatives. Those
    which answer many queries are among the negatives as often, and so are learnt to be unlikely; `log_q_correction`
    takes that back (Yi et al. 2019), where it is popular documents that are wanted.
    """

    temperature: PositiveFloat = 0.05
    log_q_correction: bool = False
    symmetric: bool = False


class RetrievalRecipe(ExampleRecipe):
    """Fine-tuning of a bi-encoder: queries and documents as unit vectors, from the mean over tokens or from [CLS]."""

    task: Literal["retrieval"]
    model: Model
    data: RetrievalData
    pooling: Literal["mean", "cls"] = "mean"
    loss: ContrastiveLoss = ContrastiveLoss()


class RankingLoss(Section):
    """`group`: a document against its row's negatives (softmax); `pointwise`: each document by itself, right or not."""

    kind: Literal["group", "pointwise"] = "group"


class RankingRecipe(ExampleRecipe):
    """Fine-tuning of a cross-encoder: one number for a query and a document read together, to put candidates in order.

    Evaluation ranks a query's candidates, where it has none its judged documents and its negatives.
    """

    task: Literal["ranking"]
    model: Model
    data: RetrievalData
    loss: RankingLoss = RankingLoss()


class Smoothing(Section):
    """How much of a target's probability goes to all other tokens (Szegedy et al. 2016)."""

    label_smoothing: Fraction = 0.0


class Decoding(Section):
    """Beam search, in evaluation and by `dstrain predict`: 1 beam takes the likeliest token each time.

    Scores are divided by length ** `length_penalty` (0: the short are preferred). `no_repeat_ngram_size`: no run of so
    many tokens comes twice; 0 allows it. No text ends before it has `min_new_tokens` tokens.
    """

    num_beams: PositiveInt = 4
    length_penalty: float = 1.0
    no_repeat_ngram_size: NonNegativeInt = 0
    min_new_tokens: NonNegativeInt = 0


class SequenceToSequenceRecipe(ExampleRecipe):
    """Training of a model that writes text from text: translation and summarisation."""

    task: Literal["sequence_to_sequence"]
    model: TextToTextModel
    data: SequenceToSequenceData
    loss: Smoothing = Smoothing()
    decoding: Decoding = Decoding()


class SentenceExtractionRecipe(ExampleRecipe):
    """Fine-tuning of a finder of the sentences that sum up a text (extractive summarisation)."""

    task: Literal["sentence_extraction"]
    model: Model
    data: SentenceExtractionData


Recipe = PretrainingRecipe | ExampleRecipe
