"""The `data` section of every task: which files, what is in them, and how rows are made of it."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from dstrain.base.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Section

RowRange = Annotated[str, Field(pattern=r"^[0-9]+-[0-9]+$")]
FileFormat = Literal["csv", "tsv", "json", "jsonl", "parquet", "text", "conll"]
MaskingRate = Annotated[float, Field(gt=0, lt=1)]
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
SINGLE_SOURCE = "train"  # the name of what `data.train` holds, where sources have names
FILE_FORMATS: tuple[str, ...] = get_args(FileFormat)


def row_range(text: RowRange) -> tuple[int, int]:
    """First and last row of what `skip_rows` has as `1024-2047`."""
    first, last = text.split("-")
    return int(first), int(last)


class MaskingRamp(Section):
    """A rate that goes in a straight line from a phase's first step to its last; without phases, over the run."""

    from_: MaskingRate = Field(alias="from")
    to: MaskingRate


class Masking(Section):
    """Which tokens are predicted. `replace`: their shares of [mask, random, kept], as in BERT (Devlin et al. 2019).

    `rate` is a number, or {from: 0.3, to: 0.15}. `unit`: single tokens, whole words, or spans of words (SpanBERT; Joshi
    et al. 2020); as many per row.
    """

    rate: MaskingRate | MaskingRamp = 0.15
    unit: Literal["token", "word", "span"] = "token"
    replace: tuple[Fraction, Fraction, Fraction] = (0.8, 0.1, 0.1)

    @property
    def rates(self) -> tuple[float, float]:
        """The rates of the first and of the last step."""
        return masking_rates(self.rate)


def masking_rates(rate: float | MaskingRamp) -> tuple[float, float]:
    """The rates of the first and of the last step of what `data.masking.rate` says."""
    return (rate.from_, rate.to) if isinstance(rate, MaskingRamp) else (rate, rate)


class Pairs(Section):
    """A second objective beside masked-language modelling: do the two halves of a pair of texts belong together?

    `next_sentence`: in half of the pairs the second text is another pair's, of the same row (after BERT; Devlin et al.
    2019). `sentence_order`: in half of them the two have changed places (ALBERT; Lan et al. 2020). Documents of more
    than `tokens` tokens, [CLS] and [SEP] included, become several pairs. The mean loss of the pairs is added to that of
    the masked tokens; evaluations keep them apart, and say valid_pair_loss and valid_pair_accuracy.
    """

    objective: Literal["none", "next_sentence", "sentence_order"] = "none"
    tokens: PositiveInt = 128


class Source(Section):
    """One of several corpora that rows are taken from: shards as in `data.train`, and its share of the rows.

    Shares are `weight` ÷ the sum of all weights; a source of weight 0 is there for a phase that gives it one. When all
    of its tokens have been read, a source is read again in another order (`repeat`), or the run ends (`stop`), or the
    other sources share its rows (`drop`); `dstrain plan` says beforehand when. `valid` is evaluated by itself.
    """

    shards: str
    weight: NonNegativeFloat = 1.0
    valid: str | None = None
    when_exhausted: Literal["repeat", "stop", "drop"] = "repeat"


class MaskedLmData(Section):
    """WebDataset shards for pretraining: a folder, a glob or a brace pattern of tar files.

    Either `train`, or several `sources` by name. A corpus is cut into `lanes` of equally many tokens, which are read
    side by side: each global batch has as many rows of one lane as of any other, so `lanes` divides all of them. A rank
    reads whole lanes: there may be as many ranks as lanes, or any smaller number. null: the greatest divisor of all
    global batches up to a quarter of them (up to 64 where that is more; 1,024 at most): batches mix better where a lane
    has several rows in each. Texts are shuffled within `shuffle_window` blocks of a lane; null: as many as make 8,192
    over all lanes, and at least 32. Every global batch that holds a row of `skip_rows` (as in ["1024-2047"]) is passed
    over.
    """

    train: str | None = None
    sources: dict[SourceName, Source] | None = None
    valid: str | None = None
    text_field: str = "text"
    sequence_length: PositiveInt
    lanes: PositiveInt | None = None
    seed: NonNegativeInt = 0
    shuffle_window: PositiveInt | None = None
    masking: Masking = Masking()
    pairs: Pairs = Pairs()
    on_bad_sample: Literal["stop", "skip"] = "stop"
    max_bad_samples: NonNegativeInt = 1000
    prefetch_steps: NonNegativeInt = 4
    skip_rows: tuple[RowRange, ...] = ()

    @property
    def row_tokens(self) -> int:
        """Tokens of a row."""
        return self.sequence_length

    @property
    def training_sources(self) -> dict[str, Source]:
        """What is trained on, by name: `sources`, or `train` as a source of its own."""
        if self.sources is not None:
            return self.sources
        assert self.train is not None, "a valid recipe has data.train or data.sources"
        return {SINGLE_SOURCE: Source(shards=self.train)}


class ExampleData(Section):
    """Examples to fine-tune on: files of `format` (by default as their names say), or datasets://NAME[:CONFIG]#SPLIT.

    Either `valid` is given, or `validation_split` examples of `train` become it, drawn by `seed`; less than 1 is a
    share. With `validation_split_by`, the name of a field, examples that have the same value there (an author, an
    article) stay together. Or `train` is cut into `folds`, and number `fold` (from 0) is held out; the same texts are
    in one fold. `split_seed` draws what is held out, null: `seed` does. `columns` names those of CSV and TSV files
    without a header; `encoding` is Python's name of a file's. `longest_text` is in characters. Batches are made of
    texts of like length: each run of `length_groups` global batches is sorted by length, and its batches are shuffled.
    `skip_rows` as for masked_lm.
    """

    train: str
    valid: str | None = None
    test: str | None = None
    validation_split: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None = None
    validation_split_by: str | None = None
    folds: Annotated[int, Field(ge=2)] | None = None
    fold: NonNegativeInt = 0
    split_seed: NonNegativeInt | None = None
    format: FileFormat | None = None
    columns: tuple[str, ...] = ()
    encoding: str = "utf-8"
    on_bad_example: Literal["stop", "drop"] = "stop"
    longest_text: PositiveInt = 1_000_000
    sequence_length: PositiveInt
    length_groups: PositiveInt = 50
    seed: NonNegativeInt = 0
    skip_rows: tuple[RowRange, ...] = ()

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest row."""
        return self.sequence_length


class ClassificationData(ExampleData):
    """Texts, or pairs of texts, and a target each: one label, several (a list, or joined by `separator`), or a number.

    `labels` fixes the labels and their order; otherwise they are those of `train`, sorted. `label_pattern` is a regular
    expression whose group is the label, for fields that hold more, such as a path. `truncation_side` is where a text of
    more than `sequence_length` tokens loses some; reviews often conclude at the end (Sun et al. 2019). Examples that
    have one of `left_out_labels` are left out. Prediction says `label: null` where its best label is less probable than
    `min_confidence`; `dstrain threshold` finds a good one.
    """

    truncation_side: Literal["end", "middle", "start"] = "end"
    text_field: str = "text"
    pair_field: str | None = None
    label_field: str = "label"
    target: Literal["label", "labels", "number"] = "label"
    label_pattern: str | None = None
    labels: tuple[str, ...] = ()
    left_out_labels: tuple[str, ...] = ()
    min_confidence: Fraction = 0.0
    separator: str = ","


SCHEME_PREFIXES = {"BIO": "BI", "BIOES": "BIES", "BMES": "BMES"}  # those of an entity's words


class TokenClassificationData(ExampleData):
    """Tokens with a tag each: CoNLL columns, or records with a list of tokens and one of tags. `labels` are the types.

    Tokens are encoded as one text, with `joiner` between them; one longer than a row becomes windows that share
    `stride` tokens. `token_pattern` is a regular expression whose group is the token, for columns that hold more.
    """

    tokens_field: str = "tokens"
    tags_field: str = "tags"
    scheme: Literal["BIO", "BIOES", "BMES"] = "BIO"
    labels: tuple[str, ...] = ()
    joiner: str = " "
    token_pattern: str | None = None
    stride: NonNegativeInt = 32


class QuestionAnsweringData(ExampleData):
    """Questions whose answers are spans of a text: SQuAD's JSON, or flat records with lists of answers.

    A text that is too long becomes windows that share `stride` tokens. `unanswerable` questions (SQuAD 2.0) are
    answered with nothing where that scores better than the best span by more than `null_threshold`. `max_answer_length`
    is in tokens.
    """

    question_field: str = "question"
    context_field: str = "context"
    answers_field: str = "answers"
    unanswerable: bool = False
    language: Literal["en", "zh"] = "en"
    stride: NonNegativeInt = 128
    question_length: PositiveInt = 64
    max_answer_length: PositiveInt = 30
    n_best: PositiveInt = 20
    null_threshold: float = 0.0


class RetrievalData(ExampleData):
    """Queries, each with a document that answers it, in texts, or by ids of `corpus` and `queries`, as BEIR has them.

    A record is one query with one document or a list of them; `score_field` says how relevant they are (0: not at all).
    Evaluation ranks all of `corpus`, or without one the documents of the split, but for those in `exclude_field`. Of
    the documents in `negatives_field`, and of those in `candidates_field` that are not relevant, as many as `negatives`
    says are trained against. `query_length` is in tokens; `id_field`, `text_field` and `title_field` are those of
    `corpus` and `queries`.
    """

    query_field: str = "query"
    positive_field: str = "positive"
    score_field: str | None = None
    negatives_field: str | None = None
    candidates_field: str | None = None
    exclude_field: str | None = None
    corpus: str | None = None
    queries: str | None = None
    id_field: str = "id"
    text_field: str = "text"
    title_field: str | None = None
    negatives: NonNegativeInt = 4
    query_length: PositiveInt = 64

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest query and of its documents."""
        given = self.negatives_field is not None or self.candidates_field is not None
        return self.query_length + (1 + (self.negatives if given else 0)) * self.sequence_length


class TextPairData(ExampleData):
    """Texts and what is to be written of them: fields of records, or parallel files as in train.{en,de}.gz.

    A source may be a list of sentences, a target a list of references: training takes the first, evaluation all.
    `language` is the target's (ISO 639-1): zh, ja and th are scored by characters.
    """

    source_field: str = "source"
    target_field: str = "target"
    language: Annotated[str, Field(pattern=r"^[a-z]{2}$")] = "en"


class SequenceToSequenceData(TextPairData):
    """Texts and what is to be written of them: fields of records, or parallel files as in train.{en,de}.gz.

    `sequence_length` and `target_length` are the most tokens of a source and of a target; longer ones are cut. A
    source may be a list of sentences, a target a list of references: training takes the first, evaluation all. `target`
    decides the scores: BLEU and chrF of a translation, ROUGE of a summary. `language` is the target's (ISO 639-1): zh,
    ja and th are scored by characters. `source_prefix` comes before every source, as T5 has it.
    """

    target: Literal["translation", "summary"] = "translation"
    target_length: PositiveInt
    source_prefix: str = ""

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest source and the longest target."""
        return self.sequence_length + self.target_length


class SentenceExtractionData(TextPairData):
    """Texts and summaries of them. The `sentences` best sentences of a text are its summary, in the text's order.

    A source is a list of sentences, or a text that is split behind its full stops; a target is a summary or a list of
    them. Which sentences are best follows from these: the ones that share most words with a summary. `sequence_length`
    is the most tokens of a text; the sentences that do not fit are never chosen. `language`
    is the texts' (ISO 639-1): zh, ja and th are compared by characters.
    """

    sentences: PositiveInt = 1
