"""The sections that every task has: batch and length, optimizer and schedule, checkpoints, evaluations, log."""

from typing import Annotated, Literal

from pydantic import Field

from dstrain.base.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from dstrain.recipe.metrics import Metric


class Zero(Section):
    """ZeRO (Rajbhandari et al. 2020): what is partitioned over the ranks, and what lives in host memory."""

    stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_params: Literal["none", "cpu"] = "none"


class Train(Section):
    """The batch, the length (exactly one of steps, tokens, epochs; none of them beside `phases`) and the numerics.

    A rank trains on its rows of a global batch in micro-batches of `micro_batch_rows` at most, and alike ones.
    """

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


class Plateau(Section):
    """When the learning rate falls: after `patience` evaluations in a row no better by more than `min_delta`.

    It is then multiplied by `factor`, and the evaluations are counted anew.
    """

    metric: Metric
    direction: Literal["maximize", "minimize"] = "minimize"
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    patience: PositiveInt = 2
    min_delta: NonNegativeFloat = 0.0


class PhaseSchedule(Section):
    """Learning rate over the steps of a phase: the keys of the recipe's `schedule`, but for `plateau`."""

    name: Literal[
        "linear",
        "cosine",
        "cosine_restarts",
        "polynomial",
        "inverse_sqrt",
        "one_minus_sqrt",
        "constant",
        "warmup_stable_decay",
    ] = "linear"
    warmup_steps: NonNegativeInt | None = None
    warmup_fraction: Fraction | None = None
    decay_fraction: Fraction = 0.1
    power: PositiveFloat = 1.0
    restarts: PositiveInt = 1
    min_lr_ratio: Fraction = 0.0


class Schedule(Section):
    """Learning rate over the run: a linear warm-up, then the named course down to `min_lr_ratio` × learning_rate.

    `linear`, `cosine` (Loshchilov & Hutter 2017), `polynomial` (the share of steps left, to the power of `power`; Chen
    et al. 2018) and `one_minus_sqrt` (1 - √ of the share passed, the cooldown of Hägele et al. 2024) fall from the end
    of the warm-up to the end of the run. `cosine_restarts` begins again after each of its `restarts`, in equal parts
    (Loshchilov & Hutter 2017). `inverse_sqrt` falls with 1 ÷ √ of the step (Vaswani et al. 2017), and `min_lr_ratio` is
    its least. `warmup_stable_decay` (Hu et al. 2024) stays, and falls in a line over the last `decay_fraction`.
    `plateau` goes by a metric of the evaluations, named in the section of this name.
    """

    name: Literal[
        "linear",
        "cosine",
        "cosine_restarts",
        "polynomial",
        "inverse_sqrt",
        "one_minus_sqrt",
        "constant",
        "warmup_stable_decay",
        "plateau",
    ] = "linear"
    warmup_steps: NonNegativeInt | None = None
    warmup_fraction: Fraction | None = None
    decay_fraction: Fraction = 0.1
    power: PositiveFloat = 1.0
    restarts: PositiveInt = 1
    min_lr_ratio: Fraction = 0.0
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

    A run stops after `patience` evaluations in a row that were no better by more than `min_delta`; null trains on to
    the end.
    """

    metric: Metric
    direction: Literal["maximize", "minimize"] = "maximize"
    patience: PositiveInt | None = None
    min_delta: NonNegativeFloat = 0.0


class Log(Section):
    """What is written while training. `trackers` are others than TensorBoard, brought by installed packages."""

    every_steps: PositiveInt = 10
    tensorboard: bool = True
    trackers: tuple[str, ...] = ()
