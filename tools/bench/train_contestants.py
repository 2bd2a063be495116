"""The contestants of the training benchmark, each in a process of its own, one global step at a time.

dstrain          this project's own loop on its own rows: background process, ledger, status file, metrics
dstrain-zero1    the same under ZeRO-1
hand             a minimal PyTorch loop with the same mathematics: packed rows already in memory, masks confined to
                 documents, head on the masked positions, fp32 masters beside bf16 weights, clipping, fused AdamW;
                 the same attention as ours, and the C library told to keep freed memory, as ours does: else it
                 would be 10 % slower, and in bf16 another 15 % at 128 tokens
hand-sdpa        the same with torch's fused attention
trainer          Transformers' Trainer: texts grouped into full rows, its collator masks, bf16 autocast, SDPA,
                 fused AdamW, two data workers, no logging, evaluation or saving
trainer-eager    the same with Transformers' eager attention, which in bf16 is faster on a CPU
"""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from dstrain.plan.attention import attention_of
from dstrain.plan.streams import training_stream
from dstrain.recipe.schema import MaskedLmRecipe

if TYPE_CHECKING:
    from dstrain.data.stream import RowStream

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Contest:
    """What every contestant trains, on how many threads. `folder` has token shards in shards/ and a tokenizer."""

    recipe: MaskedLmRecipe
    folder: Path
    threads: int


class Finished(Exception):
    """The benchmark has all its figures."""


class Pacer:
    """Called at every step boundary: lets as many steps run as it is told to, reports their seconds, and waits.

    Seconds of wall time, and of CPU time: of all threads, and of the processes that feed the data.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection, self._left, self._started = connection, 0, (math.nan, math.nan)

    def __call__(self) -> None:
        if self._left == 0:
            wall, cpu = self._started
            self._connection.send((time.perf_counter() - wall, cpu_seconds() - cpu))
            self._left = self._connection.recv()
            if self._left == 0:
                raise Finished
            self._started = (time.perf_counter(), cpu_seconds())
        self._left -= 1


def cpu_seconds() -> float:
    """User and system time of this process and its living children."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return float(sum(spent.user + spent.system for spent in times))


def compete(name: str, contest: Contest, connection: Connection) -> None:
    """Run one contestant until it is told to stop. Its first report, before any step, only says that it is ready."""
    os.environ["OMP_NUM_THREADS"] = str(contest.threads)
    sys.stdout = sys.stderr
    import torch

    torch.set_num_threads(contest.threads)
    pacer = Pacer(connection)
    try:
        if name.startswith("trainer"):
            trainer(contest, pacer, attention="eager" if name == "trainer-eager" else "sdpa")
        elif name.startswith("hand"):
            attention = "sdpa" if name == "hand-sdpa" else attention_of(contest.recipe, on_cpu=True)
            hand_written(contest, pacer, attention)
        else:
            dstrain_loop(contest, pacer, zero_stage=1 if name == "dstrain-zero1" else 0)
    except Finished:
        pass


def dstrain_loop(contest: Contest, pacer: Pacer, zero_stage: int) -> None:
    """`dstrain run`, from the rank's point of view."""
    from dstrain.runtime.runtime import Runtime
    from dstrain.tasks.task import StepBatch
    from dstrain.train.loop import Loop, StopRequest
    from dstrain.train.main import build_task, prepare
    from dstrain.train.reporting import Reporter

    train = contest.recipe.train
    zero = train.zero.model_copy(update={"stage": zero_stage})
    recipe = contest.recipe.model_copy(update={"train": train.model_copy(update={"zero": zero})})
    runtime = Runtime.start(recipe)
    task = build_task(recipe, runtime)
    prepare(runtime, task)
    steps = task.steps

    @contextmanager
    def paced(data_step: int) -> Iterator[Iterator[StepBatch]]:
        def each() -> Iterator[StepBatch]:
            while True:
                pacer()
                yield next(batches)

        with steps(data_step) as batches:
            yield each()

    task.steps = paced  # type: ignore[method-assign]
    run_dir = contest.folder / f"run-zero{zero_stage}-{os.getpid()}"
    with Reporter(runtime, recipe, run_dir, 1, task.totals.steps) as report:
        Loop(runtime, task, run_dir, report, StopRequest()).run()


def rows_of(recipe: MaskedLmRecipe) -> "RowStream":
    """The rows that the recipe's only rank trains on."""
    from dstrain.data.stream import RowStream
    from dstrain.plan.timeline import make_timeline

    timeline = make_timeline(recipe, None)
    assert timeline is not None, "the recipe says how many steps"
    return RowStream(training_stream(recipe, timeline), 0, 1)


def hand_written(contest: Contest, pacer: Pacer, attention: str) -> None:
    """What a good engineer would write for exactly this job, and nothing else."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import BertConfig, BertForMaskedLM

    import dstrain.model.attention  # noqa: F401  (Transformers learns a name)
    from dstrain.runtime.runtime import keep_freed_memory

    keep_freed_memory()
    recipe = contest.recipe
    assert recipe.model.config is not None
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    config = BertConfig(**recipe.model.config.model_dump(), attn_implementation=attention)
    model = BertForMaskedLM(config).to(dtype)
    weights = list(model.parameters())
    masters = weights if dtype == torch.float32 else [weight.detach().float() for weight in weights]
    groups = [
        {"params": [m for m in masters if m.ndim > 1], "weight_decay": 0.01},
        {"params": [m for m in masters if m.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)

    micro_rows, row_tokens = recipe.train.micro_batch_rows, recipe.data.sequence_length
    steps = []
    with rows_of(recipe) as stream:
        for _ in range(8):
            rows = next(stream)
            document = np.cumsum(rows.position_ids == 0, axis=1)
            flat = rows.masked_positions + row_tokens * (np.arange(len(document)) % micro_rows)[:, None]
            arrays = (rows.input_ids, rows.position_ids, document, flat, rows.labels)
            tensors = [torch.from_numpy(array.astype(np.int64)) for array in arrays]
            steps.append(list(zip(*(tensor.split(micro_rows) for tensor in tensors), strict=True)))

    for micro_batches in cycle(steps):
        pacer()
        targets = sum(micro_batch[-1].numel() for micro_batch in micro_batches)
        for input_ids, position_ids, document, flat, labels in micro_batches:
            mask = torch.zeros(len(document), 1, row_tokens, row_tokens, dtype=dtype)
            mask.masked_fill_((document[:, :, None] != document[:, None, :])[:, None], -torch.inf)
            hidden = model.bert(input_ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
            logits = model.cls(hidden.view(-1, hidden.shape[-1])[flat.view(-1)])
            loss = cross_entropy(logits.float(), labels.view(-1), reduction="sum") / targets
            loss.backward()
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if masters is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)


def trainer(contest: Contest, pacer: Pacer, attention: str) -> None:
    """Transformers' own way, as its run_mlm example sets it up."""
    import torch
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    recipe = contest.recipe
    assert recipe.model.config is not None
    rows: list[dict[str, Any]] = []
    with rows_of(recipe) as stream:  # the documents, end to end
        while len(rows) < 4096:
            step = next(stream)
            ids = step.input_ids.astype(np.int64)
            np.put_along_axis(ids, step.masked_positions.astype(np.int64), step.labels.astype(np.int64), axis=1)
            rows += [{"input_ids": row} for row in ids]

    class Paced(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **more: Any) -> None:
            pacer()

    bf16 = recipe.train.precision == "bf16"
    tokenizer = BertTokenizer.from_pretrained(contest.folder / "tokenizer")
    model = BertForMaskedLM(BertConfig(**recipe.model.config.model_dump(), attn_implementation=attention))
    arguments = TrainingArguments(
        output_dir=str(contest.folder / "trainer"),
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16,
        per_device_train_batch_size=recipe.train.micro_batch_rows,
        gradient_accumulation_steps=recipe.train.global_batch_rows // recipe.train.micro_batch_rows,
        max_steps=10**6,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        dataloader_num_workers=2,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=recipe.data.masking.rates[0])
    Trainer(model, arguments, data_collator=collator, train_dataset=rows, callbacks=[Paced()]).train()  # type: ignore[arg-type]
