"""One rank of one contestant of checkpoint.py: trains, saves and loads, and writes what it measured as JSON.

    dstrain            `Saving`, as the loop uses it: beside training, and with checkpoint.async=false
    deepspeed          engine.save_checkpoint and load_checkpoint
    accelerate         accelerator.save_state and load_state, which call DeepSpeed's and add some files
    dcp                torch.distributed.checkpoint.save and load, of this rank's flat fp32 pieces; flushes its files
    dcp-async          its async_save, as its documentation has it
    dcp-staged         with the stager that keeps its memory and copies beside training, until the optimizer steps

All have the same model, optimizer and ZeRO stage, prepared by dstrain's runtime.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from dstrain.checkpoint.fragments import resident_fragments
from dstrain.checkpoint.load import choose, load
from dstrain.plan.timeline import make_timeline
from dstrain.recipe.load import load_recipe
from dstrain.runtime import runtime
from dstrain.runtime.runtime import Runtime
from dstrain.train.main import prepare
from dstrain.train.reporting import Reporter
from dstrain.train.saving import Saving
from dstrain.train.state import TrainState

BLOCK_BYTES = 1 << 24
TOKENS, ROWS = 128, 2
WARM_UP_STEPS = 4  # after which the peak of memory is training's own
SIZES = {"110M": (768, 12, 12), "400M": (1024, 29, 16), "4M": (128, 2, 2)}  # hidden size, layers, heads
RECIPE = """\
name: bench
task: masked_lm
model: {{architecture: bert, attention: sdpa, config: {{vocab_size: 30522, hidden_size: {0}, num_hidden_layers: {1},
  num_attention_heads: {2}, intermediate_size: {3}, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}}}}
tokenizer: .
data: {{train: ., sequence_length: 128, lanes: 4}}
train: {{global_batch_rows: 4, micro_batch_rows: 2, steps: 1000000, precision: bf16, zero: {{stage: {4}}}}}
optimizer: {{learning_rate: 1e-5}}
checkpoint: {{keep_last: 1, async: {5}}}
log: {{tensorboard: false}}
"""


class Lm(nn.Module):
    """Loss of predicting every token, summed."""

    def __init__(self, model: BertForMaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss * ids.numel()


@dataclass
class Found:
    """Seconds by round, and bytes of this rank."""

    step: list[float] = field(default_factory=list)  # a training step with nothing beside it
    raw_write: list[float] = field(default_factory=list)  # the same bytes, one file, flushed
    stall: list[float] = field(default_factory=list)  # that training stood still
    lost: list[float] = field(default_factory=list)  # by which training came later, slower steps included
    total: list[float] = field(default_factory=list)  # until the call, or what goes on beside, is over
    on_disk: list[float] = field(default_factory=list)  # … and everything is flushed
    raw_read: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    verify: list[float] = field(default_factory=list)
    own_bytes: int = 0
    saved_bytes: int = 0  # of all ranks
    extra_memory_bytes: int = 0  # by which the peak grew over the whole of it
    parameters: int = 0


class Rank:
    """A rank that is ready to train."""

    def __init__(self, size: str, stage: int, beside: bool, folder: Path) -> None:
        hidden, layers, heads = SIZES[size]
        recipe_file = folder / f"recipe-{os.environ['RANK']}.yaml"
        recipe_file.write_text(RECIPE.format(hidden, layers, heads, 4 * hidden, stage, str(beside).lower()))
        self.folder, recipe = folder, load_recipe(recipe_file, check_files=False).recipe
        runtime.keep_freed_memory = lambda: None  # that heap's peak grows by itself, for it fragments
        self.runtime = Runtime.start(recipe)
        torch.manual_seed(0)
        assert recipe.model.config is not None
        config = BertConfig(**recipe.model.config.model_dump())
        model: Any = BertForMaskedLM._from_config(config, dtype=torch.bfloat16)  # in fp32 it would leave a hole
        timeline = make_timeline(recipe, None)
        assert timeline is not None, "the recipe says how many steps"
        self.task: Any = SimpleNamespace(
            model=model,
            module=Lm(model),
            totals=SimpleNamespace(steps=timeline.total_steps, timeline=timeline),
            identity=lambda: {"global_batch_rows": 4},
        )
        prepare(self.runtime, self.task)
        self.ids = torch.randint(0, 30522, (ROWS, TOKENS))
        self.state = TrainState()

    def step(self, before_step: Callable[[], object] = lambda: None) -> None:
        """Forward, backward, and the optimizer."""
        self.runtime.backward(self.runtime.engine(self.ids), 2 * self.ids.numel(), is_last=True)
        before_step()
        self.runtime.apply_step(1e-5)
        self.state = TrainState(self.state.step + 1, self.state.step + 1)

    def together(self, action: Callable[[], object]) -> float:
        """Seconds that something takes until the last rank has done it."""
        self.runtime.barrier()
        began = time.perf_counter()
        action()
        self.runtime.barrier()
        return time.perf_counter() - began

    def pieces(self) -> dict[str, Tensor]:
        """All that this rank has to save."""
        fragments = resident_fragments(self.runtime, self.task.model)
        return {f"{self.runtime.rank}/{key}": tensor for one in fragments for key, tensor in one.pieces()}


class Contestant:
    """How one of them saves. `begin` blocks for as long as it has to."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.folder = rank, rank.folder / "saved"

    def begin(self) -> None: ...

    def before_step(self) -> None: ...

    def done(self) -> bool:
        return True

    def finish(self) -> None: ...

    def seconds(self) -> float | None:
        """From `begin` until it was over, where that is not when `begin` returned."""
        return None

    def load(self) -> None: ...


class Dstrain(Contestant):
    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self.report = Reporter(rank.runtime, rank.runtime.recipe, self.folder, 1, 1_000_000)
        self.metrics: dict[str, Any] = {}
        self.report.say = lambda _: None  # type: ignore[method-assign]
        self.report.metrics = self.metrics.update  # type: ignore[method-assign]
        self.saving = Saving(rank.runtime, rank.task, self.folder, self.report)

    def begin(self) -> None:
        self.saving.begin(self.rank.state, {})

    def before_step(self) -> None:
        self.saving.let_step()

    def done(self) -> bool:
        assert not self.saving.look(self.rank.state.step)
        return self.saving.idle

    def finish(self) -> None:
        self.saving.finish()

    def seconds(self) -> float | None:
        return self.metrics["save_seconds"]

    def choose(self) -> None:
        self.source = choose(self.rank.runtime, self.folder)

    def load(self) -> None:
        assert self.source is not None
        load(self.rank.runtime, self.source, resident_fragments(self.rank.runtime, self.rank.task.model))


class DeepSpeed(Contestant):
    def begin(self) -> None:
        self.rank.runtime.engine.save_checkpoint(str(self.folder), tag="newest")

    def load(self) -> None:
        self.rank.runtime.engine.load_checkpoint(str(self.folder), tag="newest")


class Accelerate(Contestant):
    def begin(self) -> None:
        self.rank.runtime.accelerator.save_state(str(self.folder), safe_serialization=True)

    def load(self) -> None:
        self.rank.runtime.accelerator.load_state(str(self.folder))


class Dcp(Contestant):
    def begin(self) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self.rank.pieces(), checkpoint_id=self.folder)

    def load(self) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(self.rank.pieces(), checkpoint_id=self.folder)


class DcpAsync(Dcp):
    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self.group = dist.new_group(backend="gloo")
        self.stager: Any = None

    def begin(self) -> None:
        import torch.distributed.checkpoint as dcp

        self.began = time.perf_counter()
        options = {"async_stager": self.stager, "process_group": self.group}
        response: Any = dcp.async_save(self.rank.pieces(), checkpoint_id=self.folder, **options)
        self.staged = getattr(response, "staging_completion", None)
        self.future = getattr(response, "upload_completion", response)
        self.future.add_done_callback(self.note_end)

    def before_step(self) -> None:
        if self.staged is not None:
            self.staged.result()

    def note_end(self, _: object) -> None:
        self.ended = time.perf_counter()

    def done(self) -> bool:
        return bool(self.future.done())

    def finish(self) -> None:
        self.future.result()

    def seconds(self) -> float | None:
        return self.ended - self.began


class DcpStaged(DcpAsync):
    def __init__(self, rank: Rank) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(rank)
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False
            )
        )


CONTESTANTS: dict[str, tuple[type[Contestant], bool]] = {
    "dstrain": (Dstrain, False),
    "dstrain-async": (Dstrain, True),
    "deepspeed": (DeepSpeed, False),
    "accelerate": (Accelerate, False),
    "dcp": (Dcp, False),
    "dcp-async": (DcpAsync, True),
    "dcp-staged": (DcpStaged, True),
}


def write_raw(path: Path, size: int, block: memoryview) -> None:
    """One file, in blocks, flushed."""
    with path.open("wb", buffering=0) as file:
        for first in range(0, size, BLOCK_BYTES):
            file.write(block[: min(BLOCK_BYTES, size - first)])
        os.fsync(file.fileno())


def read_raw(path: Path, block: memoryview) -> None:
    """One file, in blocks, into the same memory."""
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def forget(folder: Path) -> None:
    """Have the page cache hold nothing of the files of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_bytes() -> int:
    """Most memory that this process has had."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(name: str, size: str, stage: int, rounds: int, folder: Path) -> Found:
    """Everything about one contestant."""
    kind, beside = CONTESTANTS[name]
    rank, found = Rank(size, stage, beside, folder), Found()
    for _ in range(WARM_UP_STEPS):
        rank.step()
    found.parameters = sum(parameter.numel() for parameter in rank.task.model.parameters())
    found.own_bytes = sum(piece.numel() * piece.element_size() for piece in rank.pieces().values())
    raw, block = folder / f"raw-{rank.runtime.rank}", memoryview(os.urandom(BLOCK_BYTES))
    room = memoryview(bytearray(BLOCK_BYTES))
    contestant = kind(rank)
    (folder / "saved").mkdir(exist_ok=True)
    before = peak_bytes()
    for _ in range(rounds):
        rank.together(os.sync)
        found.raw_write.append(rank.together(lambda: write_raw(raw, found.own_bytes, block)))
        found.step += [rank.together(rank.step) for _ in range(2)]
        save_once(rank, contestant, found)
    found.extra_memory_bytes = peak_bytes() - before
    found.saved_bytes = sum(path.stat().st_size for path in contestant.folder.rglob("*") if path.is_file())
    gc.collect()
    for _ in range(rounds):
        forget(folder)
        found.raw_read.append(rank.together(lambda: read_raw(raw, room)))
        if isinstance(contestant, Dstrain):
            forget(folder)
            found.verify.append(rank.together(contestant.choose))
        forget(folder)
        found.load.append(rank.together(contestant.load))
    return found


def save_once(rank: Rank, contestant: Contestant, found: Found) -> None:
    """Save, train beside it for as long as it lasts, and flush."""
    runtime, steps = rank.runtime, 0
    step_seconds = sum(found.step[-2:]) / 2
    rank.together(os.sync)
    began = time.perf_counter()
    contestant.begin()
    stall = time.perf_counter() - began

    def wait() -> None:
        nonlocal stall
        waited = time.perf_counter()
        contestant.before_step()
        stall += time.perf_counter() - waited

    while not all(runtime.gather_json(contestant.done())):
        rank.step(wait)
        steps += 1
    contestant.finish()
    runtime.barrier()
    over = time.perf_counter() - began
    found.lost.append(over - steps * step_seconds)
    found.stall.append(stall)
    found.total.append(contestant.seconds() or over)
    found.on_disk.append(found.total[-1] + rank.together(os.sync))


def main() -> None:
    """`python checkpoint_contestants.py NAME SIZE STAGE ROUNDS FOLDER`, with a rank's environment."""
    name, size, stage, rounds, folder = sys.argv[1:]
    found = measure(name, size, int(stage), int(rounds), Path(folder))
    (Path(folder) / f"found-{os.environ['RANK']}.json").write_text(json.dumps(asdict(found)))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
