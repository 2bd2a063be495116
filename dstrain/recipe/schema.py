"""The recipe: every key, its type, its unit and its rule. Imports no torch, so that `plan` stays instant."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from dstrain.recipe.metrics import Metric

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
RowRange = Annotated[str, Field(pattern=r"^[0-9]+-[0-9]+$")]
FileFormat = Literal["csv", "tsv", "json", "jsonl", "parquet", "text", "conll"]
FILE_FORMATS: tuple[str, ...] = get_args(FileFormat)


class Section(BaseModel):
    """Base of every section: unknown keys are errors, nothing is coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)


# ---------------------------------------------------------------- model


class BertConfig(Section):
    """Keys of Transformers' BertConfig that shape the model. Defaults are BERT-base's."""

    vocab_size: PositiveInt = 30522
    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 3072
    hidden_act: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    hidden_dropout_prob: Fraction = 0.1
    attention_probs_dropout_prob: Fraction = 0.1
    max_position_embeddings: PositiveInt = 512
    type_vocab_size: PositiveInt = 2
    initializer_range: PositiveFloat = 0.02
    layer_norm_eps: PositiveFloat = 1e-12


class RobertaConfig(BertConfig):
    """The same keys with RoBERTa-base's defaults. Positions start at 2: two of `max_position_embeddings` are unused."""

    vocab_size: PositiveInt = 50265
    max_position_embeddings: PositiveInt = 514
    type_vocab_size: PositiveInt = 1
    layer_norm_eps: PositiveFloat = 1e-5


class ModernBertConfig(Section):
    """Keys of Transformers' ModernBertConfig that shape the model. Defaults are ModernBERT-base's."""

    vocab_size: PositiveInt = 50368
    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 22
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 1152
    hidden_activation: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    max_position_embeddings: PositiveInt = 8192
    initializer_range: PositiveFloat = 0.02
    norm_eps: PositiveFloat = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    attention_dropout: Fraction = 0.0
    embedding_dropout: Fraction = 0.0
    mlp_bias: bool = False
    mlp_dropout: Fraction = 0.0
    decoder_bias: bool = True
    classifier_dropout: Fraction = 0.0
    global_attn_every_n_layers: PositiveInt = 3
    local_attention: PositiveInt = 128
    global_rope_theta: PositiveFloat = 160000.0
    local_rope_theta: PositiveFloat = 10000.0


class T5Config(Section):
    """Keys of Transformers' T5Config that shape the model. Defaults are T5-small's; null takes num_layers."""

    vocab_size: PositiveInt = 32128
    d_model: PositiveInt = 512
    d_kv: PositiveInt = 64
    d_ff: PositiveInt = 2048
    num_layers: PositiveInt = 6
    num_decoder_layers: PositiveInt | None = None
    num_heads: PositiveInt = 8
    relative_attention_num_buckets: PositiveInt = 32
    relative_attention_max_distance: PositiveInt = 128
    dropout_rate: Fraction = 0.1
    layer_norm_epsilon: PositiveFloat = 1e-6
    initializer_factor: PositiveFloat = 1.0
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"


class BartConfig(Section):
    """Keys of Transformers' BartConfig that shape the model. Defaults are BART-large's."""

    vocab_size: PositiveInt = 50265
    max_position_embeddings: PositiveInt = 1024
    d_model: PositiveInt = 1024
    encoder_layers: PositiveInt = 12
    encoder_attention_heads: PositiveInt = 16
    encoder_ffn_dim: PositiveInt = 4096
    decoder_layers: PositiveInt = 12
    decoder_attention_heads: PositiveInt = 16
    decoder_ffn_dim: PositiveInt = 4096
    activation_function: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    dropout: Fraction = 0.1
    attention_dropout: Fraction = 0.0
    activation_dropout: Fraction = 0.0
    init_std: PositiveFloat = 0.02
    scale_embedding: bool = False


class MarianConfig(BartConfig):
    """The same keys with MarianMT's defaults. Positions are sines, which are not trained."""

    vocab_size: PositiveInt = 58101


class Lora(Section):
    """Low-rank adapters (Hu et al. 2022), through peft: the encoder is frozen, its adapters and the head are trained.

    The output of a linear layer with an adapter gains `alpha` ÷ `rank` × what the adapter makes of its input.
    `target_modules` are names of linear layers, or ends of names, as in [query, value]; [] takes queries and values.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ()


class Unfreezing(Section):
    """Gradual unfreezing (Howard & Ruder 2018): at first the head is trained, then layer after layer from the top.

    Another layer joins after each `every_steps` updates, or `every_epochs`; the embeddings are the last.
    """

    every_steps: PositiveInt | None = None
    every_epochs: PositiveFloat | None = None


class _ModelKeys(Section):
    """Keys of every architecture. Exactly one of `config` (from scratch) and `pretrained` (a folder) is given.

    `frozen_layers` keeps the embeddings and as many of the first layers as they are; 0 trains everything. `dropout`
    takes the place of every dropout that the config of `pretrained` has. `attention` auto is sdpa, and matmul for
    encoders on CPUs in bf16, which have no fast fused kernel, with rows of up to 1,024 tokens.
    """

    architecture: str
    config: BertConfig | ModernBertConfig | T5Config | BartConfig | None = None
    pretrained: str | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    frozen_layers: NonNegativeInt = 0
    unfreezing: Unfreezing | None = None
    lora: Lora | None = None
    activation_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "matmul", "eager"] = "auto"


class BertModel(_ModelKeys):
    """BERT (Devlin et al. 2019)."""

    architecture: Literal["bert"]
    config: BertConfig | None = None


class RobertaModel(_ModelKeys):
    """RoBERTa (Liu et al. 2019)."""

    architecture: Literal["roberta"]
    config: RobertaConfig | None = None


class ModernBertModel(_ModelKeys):
    """ModernBERT (Warner et al. 2024)."""

    architecture: Literal["modernbert"]
    config: ModernBertConfig | None = None


class T5Model(_ModelKeys):
    """T5 (Raffel et al. 2020)."""

    architecture: Literal["t5"]
    config: T5Config | None = None


class BartModel(_ModelKeys):
    """BART (Lewis et al. 2020)."""

    architecture: Literal["bart"]
    config: BartConfig | None = None


class MarianModel(_ModelKeys):
    """MarianMT (Junczys-Dowmunt et al. 2018; Vaswani et al. 2017)."""

    architecture: Literal["marian"]
    config: MarianConfig | None = None


class EncoderDecoderModel(_ModelKeys):
    """A BERT or RoBERTa on both sides (Rothe et al. 2020), the decoder with causal and cross attention.

    `pretrained` is such an encoder, of which both sides start (cross attention is new), or a whole such model;
    `config` is BERT's, for both. The decoder has the first `decoder_layers` of the encoder's layers; null: all.
    """

    architecture: Literal["encoder-decoder"]
    config: BertConfig | None = None
    decoder_layers: PositiveInt | None = None


Model = Annotated[BertModel | RobertaModel | ModernBertModel, Field(discriminator="architecture")]
TextToTextModel = Annotated[
    T5Model | BartModel | MarianModel | EncoderDecoderModel, Field(discriminator="architecture")
]


# ---------------------------------------------------------------- data


class Masking(Section):
    """Which tokens are predicted. `replace`: their shares of [mask, random, kept], as in BERT (Devlin et al. 2019).

    `unit`: single tokens, whole words, or spans of words (SpanBERT; Joshi et al. 2020); as many per row.
    """

    rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    unit: Literal["token", "word", "span"] = "token"
    replace: tuple[Fraction, Fraction, Fraction] = (0.8, 0.1, 0.1)


class Pairs(Section):
    """A second objective beside masked-language modelling: do the two halves of a pair of texts belong together?

    `next_sentence`: in half of the pairs the second text is another pair's, of the same row (after BERT; Devlin et al.
    2019). `sentence_order`: in half of them the two have changed places (ALBERT; Lan et al. 2020). Documents of more
    than `tokens` tokens, [CLS] and [SEP] included, become several pairs. The mean loss of the pairs is added to that of
    the masked tokens; evaluations keep them apart, and say valid_pair_loss and valid_pair_accuracy.
    """

    objective: Literal["none", "next_sentence", "sentence_order"] = "none"
    tokens: PositiveInt = 128


class MaskedLmData(Section):
    """WebDataset shards for pretraining: a folder, a glob or a brace pattern of tar files.

    Every global batch that holds a row of `skip_rows` (as in ["1024-2047"]) is passed over.
    """

    train: str
    valid: str | None = None
    text_field: str = "text"
    sequence_length: PositiveInt
    lanes: PositiveInt = 64
    seed: NonNegativeInt = 0
    shuffle_window: PositiveInt = 1024
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


class ExampleData(Section):
    """Examples to fine-tune on: files of `format` (by default as their names say), or datasets://NAME[:CONFIG]#SPLIT.

    Either `valid` is given, or `hold_out` examples of `train` become it, drawn by `seed`; less than 1 is a share. With
    `hold_out_by`, the name of a field, examples that have the same value there (an author, an article) stay together.
    Or `train` is cut into `folds`, and number `fold` (from 0) is held out; the same texts are in one fold. `split_seed`
    draws what is held out, null: `seed` does. `columns` names those of CSV and TSV files without a header; `encoding`
    is Python's name of a file's. `longest_text` is in characters. Batches are made of texts of like length: each run of
    `length_groups` global batches is sorted by length, and its batches are shuffled. `skip_rows` as for masked_lm.
    """

    train: str
    valid: str | None = None
    test: str | None = None
    hold_out: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None = None
    hold_out_by: str | None = None
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
    expression whose group is the label, for fields that hold more, such as a path. `cut` is where a text of more than
    `sequence_length` tokens loses some; reviews often conclude at the end (Sun et al. 2019). Examples that have one of
    `left_out_labels` are left out. Prediction says `label: null` where its best label is less probable than
    `reject_below`; `dstrain threshold` finds a good one.
    """

    cut: Literal["end", "middle", "start"] = "end"
    text_field: str = "text"
    pair_field: str | None = None
    label_field: str = "label"
    target: Literal["label", "labels", "number"] = "label"
    label_pattern: str | None = None
    labels: tuple[str, ...] = ()
    left_out_labels: tuple[str, ...] = ()
    reject_below: Fraction = 0.0
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
    answered with nothing where that scores better than the best span by more than `null_threshold`. `longest_answer`
    is in tokens.
    """

    question_field: str = "question"
    context_field: str = "context"
    answers_field: str = "answers"
    unanswerable: bool = False
    language: Literal["en", "zh"] = "en"
    stride: NonNegativeInt = 128
    question_length: PositiveInt = 64
    longest_answer: PositiveInt = 30
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


# ---------------------------------------------------------------- training


class Zero(Section):
    """ZeRO (Rajbhandari et al. 2020): what is partitioned over the ranks, and what lives in host memory."""

    stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_params: Literal["none", "cpu"] = "none"


class Train(Section):
    """The batch, the length (exactly one of steps, tokens, epochs) and the numerics."""

    global_batch_rows: PositiveInt
    micro_batch_rows: PositiveInt
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    precision: Literal["fp32", "bf16"] = "bf16"
    zero: Zero = Zero()
    clip_grad_norm: PositiveFloat | None = 1.0
    compile: bool = False
    seed: NonNegativeInt = 0


class Optimizer(Section):
    """AdamW (Loshchilov & Hutter 2019). Biases and norms are never decayed.

    `layer_decay` multiplies the learning rate once for each layer that lies between the parameters and the head (Howard
    & Ruder 2018); 1 gives all the same.
    """

    name: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    weight_decay: NonNegativeFloat = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class Plateau(Section):
    """When the learning rate falls: after `patience` evaluations in a row no better by more than `least_change`.

    It is then multiplied by `factor`, and the evaluations are counted anew.
    """

    metric: Metric
    direction: Literal["maximize", "minimize"] = "minimize"
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    patience: PositiveInt = 2
    least_change: NonNegativeFloat = 0.0


class Schedule(Section):
    """Learning rate over the run: warmup, then the named decay down to `final_ratio` × learning_rate.

    `plateau` goes by a metric of the evaluations, named in the section of this name.
    """

    name: Literal["linear", "cosine", "constant", "warmup_stable_decay", "plateau"] = "linear"
    warmup_steps: NonNegativeInt | None = None
    warmup_fraction: Fraction | None = None
    decay_fraction: Fraction = 0.1
    final_ratio: Fraction = 0.0
    plateau: Plateau | None = None


class KeepBest(Section):
    """Keep the checkpoints that scored best. `metric` is a number of the evaluations: `loss`, or `valid_loss`."""

    metric: Metric | None = None
    count: PositiveInt = 1
    best: Literal["lowest", "highest"] | None = None  # null: lowest of a loss, a perplexity or an error, else highest


class Checkpoint(Section):
    """When to save, where to, and what to keep: the last, those of every so many steps, and the best.

    `storage`: null for the run's folder; or a place of this run alone in an object store, as in s3://bucket/runs/bert.
    """

    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 3
    keep_every: PositiveInt | None = None
    keep_best: KeepBest = KeepBest()
    storage: str | None = None
    async_: bool = Field(default=True, alias="async")  # beside training, at the price of one copy in host memory


class Evaluate(Section):
    """Evaluation on `data.valid` with masks frozen by the seed. `batches` are global batches; null means all of it."""

    every_steps: PositiveInt | None = None
    batches: PositiveInt | None = 8


class EarlyStopping(Section):
    """Keep the checkpoint whose evaluation was best by `metric`, and end with it.

    A run stops after `patience` evaluations in a row that were no better by more than `least_change`; null trains on to
    the end.
    """

    metric: Metric
    direction: Literal["maximize", "minimize"] = "maximize"
    patience: PositiveInt | None = None
    least_change: NonNegativeFloat = 0.0


class Log(Section):
    """What is written while training."""

    every_steps: PositiveInt = 10
    tensorboard: bool = True


# ---------------------------------------------------------------- recipes


class CommonRecipe(Section):
    """Keys shared by every task."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: str
    model: _ModelKeys
    tokenizer: str
    data: Section
    train: Train
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    early_stopping: EarlyStopping | None = None
    log: Log = Log()
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    hang_seconds: PositiveFloat = 1200.0  # a rank that stands still for longer is ended, and the run restarted

    @property
    def objective(self) -> str:
        """What is computed: the task, for most. It names a file of `dstrain/tasks/` and decides the model's heads."""
        return self.task


class MaskedLmRecipe(CommonRecipe):
    """Masked-language-model pretraining."""

    task: Literal["masked_lm"]
    model: Model
    data: MaskedLmData

    @property
    def objective(self) -> str:
        """`masked_lm`, or `paired_masked_lm` where there is one by pairs beside it."""
        return "masked_lm" if self.data.pairs.objective == "none" else "paired_masked_lm"


class Loss(Section):
    """How a classifier's mistakes weigh. `balanced` weighs each label by the inverse of its frequency, 1 on average."""

    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: Fraction = 0.0


class ClassificationRecipe(CommonRecipe):
    """Fine-tuning of a sequence classifier."""

    task: Literal["sequence_classification"]
    model: Model
    data: ClassificationData
    loss: Loss = Loss()


class TokenClassificationRecipe(CommonRecipe):
    """Fine-tuning of a tagger of words: named entities and their like."""

    task: Literal["token_classification"]
    model: Model
    data: TokenClassificationData
    loss: Loss = Loss()


class QuestionAnsweringRecipe(CommonRecipe):
    """Fine-tuning of a finder of answers in a text."""

    task: Literal["question_answering"]
    model: Model
    data: QuestionAnsweringData


class ContrastiveLoss(Section):
    """InfoNCE (van den Oord et al. 2018) over all documents of the global batch; `symmetric`: over its queries too.

    Similarities are cosines ÷ `temperature`. Documents known to be relevant to a query are never its negatives. Those
    which answer many queries are among the negatives as often, and so are learnt to be unlikely; `frequency_correction`
    takes that back (Yi et al. 2019), where it is popular documents that are wanted.
    """

    temperature: PositiveFloat = 0.05
    frequency_correction: bool = False
    symmetric: bool = False


class RetrievalRecipe(CommonRecipe):
    """Fine-tuning of a bi-encoder: queries and documents as unit vectors, from the mean over tokens or from [CLS]."""

    task: Literal["retrieval"]
    model: Model
    data: RetrievalData
    pooling: Literal["mean", "cls"] = "mean"
    loss: ContrastiveLoss = ContrastiveLoss()


class RankingLoss(Section):
    """`group`: a document against its row's negatives (softmax); `pointwise`: each document by itself, right or not."""

    kind: Literal["group", "pointwise"] = "group"


class RankingRecipe(CommonRecipe):
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

    Scores are divided by length ** `length_penalty` (0: the short are preferred). `no_repeat_ngram`: no run of so many
    tokens comes twice; 0 allows it. No text ends before it has `shortest` tokens.
    """

    beams: PositiveInt = 4
    length_penalty: float = 1.0
    no_repeat_ngram: NonNegativeInt = 0
    shortest: NonNegativeInt = 0


class SequenceToSequenceRecipe(CommonRecipe):
    """Training of a model that writes text from text: translation and summarisation."""

    task: Literal["sequence_to_sequence"]
    model: TextToTextModel
    data: SequenceToSequenceData
    loss: Smoothing = Smoothing()
    decoding: Decoding = Decoding()


class SentenceExtractionRecipe(CommonRecipe):
    """Fine-tuning of a finder of the sentences that sum up a text (extractive summarisation)."""

    task: Literal["sentence_extraction"]
    model: Model
    data: SentenceExtractionData


ExampleRecipe = (
    ClassificationRecipe
    | TokenClassificationRecipe
    | QuestionAnsweringRecipe
    | RetrievalRecipe
    | RankingRecipe
    | SequenceToSequenceRecipe
    | SentenceExtractionRecipe
)
Recipe = MaskedLmRecipe | ExampleRecipe
