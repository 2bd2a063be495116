"""The sections that every task has: batch and length, optimizer and schedule, checkpoints, evaluations, log."""

from typing import Annotated, Literal

from pydantic import Field

from dstrain.recipe.fields import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from dstrain.recipe.metrics import Metric


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
