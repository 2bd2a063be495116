"""The one module that knows Accelerate, DeepSpeed and the environment of a rank."""

import ctypes
import json
import socket
import sys
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from dstrain.base import environment
from dstrain.base.ports import free_port
from dstrain.optimizers import OPTIMIZERS, Optimizer
from dstrain.plan import BatchPlan, batch_plan, deepspeed_config
from dstrain.plan.engine import clips_itself
from dstrain.plan.timeline import PhasePlan
from dstrain.recipe.schema import Recipe
from dstrain.runtime import deepspeed_state
from dstrain.runtime.insides import inside, library_error, require_file, require_insides

PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


@dataclass
class Runtime:
    """This rank, its device, and the small collectives that the loop needs. Made by `Runtime.start`."""

    recipe: Recipe
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    batch: BatchPlan
    control: dist.ProcessGroup | None  # gloo: counts and flags never wait for the accelerator
    saving: dist.ProcessGroup | None  # gloo: votes of a save, from its thread; one group's collectives have one order
    accelerator: Any
    engine: Any = None
    applied_steps: int = 0  # updates since the run began

    @classmethod
    def start(cls, recipe: Recipe) -> "Runtime":
        """Join the process group that the launcher described (RANK, WORLD_SIZE, MASTER_ADDR, …; alone without them).

        Raises:
            RecipeError: the recipe cannot run on this many ranks.
            LibraryError: a library lacks what this package uses inside of it.
            RuntimeError: Accelerate or DeepSpeed set up something else than the recipe asks for.
        """
        quiet_libraries()
        environment.set_defaults({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"})
        environment.set_defaults({"MASTER_PORT": str(free_port())})
        variables = environment.RankVariables.require()
        rank, world_size, local_rank = variables.rank, variables.world_size, variables.local_rank
        batch = batch_plan(recipe, world_size)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "gloo":
            keep_freed_memory()

        _spare_deepspeed()
        require_insides()
        from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(recipe, world_size))
        # Not `cpu=True`: that makes Accelerate ignore the DeepSpeed plugin without a word.
        accelerator = Accelerator(
            gradient_accumulation_steps=batch.accumulation,
            deepspeed_plugin=plugin,
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=PROCESS_GROUP_TIMEOUT)],
        )
        # Transformers would build models piecewise under stage 3, with other initial weights than under the rest.
        unset_hf_deepspeed_config()
        control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")
        saving = dist.new_group(backend="gloo", timeout=PROCESS_GROUP_TIMEOUT)
        assert control is not None
        runtime = cls(recipe, rank, local_rank, world_size, accelerator.device, batch, control, saving, accelerator)
        runtime._require("the distributed type", accelerator.distributed_type.value, "DEEPSPEED")
        runtime._require("the number of ranks", accelerator.num_processes, world_size)
        runtime._require("the rank", accelerator.process_index, rank)
        runtime._require("the backend", dist.get_backend(), backend)
        return runtime

    @classmethod
    def offline(cls, recipe: Recipe) -> "Runtime":
        """One rank without a process group, for commands that build a task and train nothing: no call is collective."""
        quiet_libraries()
        return cls(recipe, 0, 0, 1, torch.device("cpu"), batch_plan(recipe, 1), None, None, None)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Hand module and optimizer to DeepSpeed, and check that what comes back is what the recipe asked for.

        A collective call.

        Raises:
            LibraryError: DeepSpeed keeps weights or optimizer states otherwise than this package knows.
            RuntimeError: DeepSpeed set up something else than the recipe asks for.
        """
        if self.recipe.train.compile:
            module.compile()
        self.engine, _ = self.accelerator.prepare(module, optimizer)
        # Without ZeRO in bf16, DeepSpeed makes the states by a step on zero gradients: Adam would count one too many.
        self.inner_optimizer.state.clear()
        train = self.recipe.train
        if self.world_size == 1 and train.zero.stage == 0:
            deepspeed_state.skip_all_reduce(self.engine)
        if train.zero.stage == 0 and train.precision == "bf16":
            deepspeed_state.use_faster_overflow_check(self.engine.optimizer)
        self._require("the ZeRO stage", int(self.engine.zero_optimization_stage()), train.zero.stage)
        self._require("bf16", bool(self.engine.bfloat16_enabled()), train.precision == "bf16")
        self._require("fp16", bool(self.engine.fp16_enabled()), False)
        self._require("accumulation", self.engine.gradient_accumulation_steps(), self.batch.accumulation)
        self._require("the micro-batch", self.engine.train_micro_batch_size_per_gpu(), self.batch.micro_batch_rows)
        clip = 0.0 if clips_itself(self.recipe) else (train.clip_grad_norm or 0.0)
        self._require("gradient clipping", float(self.engine.gradient_clipping()), clip)
        self._require_layout()

    def _require_layout(self) -> None:
        """Before the first step: what checkpoints are made of is where `deepspeed_state` looks, all of it."""
        stage, precision = self.recipe.train.zero.stage, self.recipe.train.precision
        elements = deepspeed_state.require_layout(self.engine, stage, precision, self.rank)
        found, copies = int(self.all_reduce_sum([elements])[0]), 1 if stage else self.world_size
        if found != (trained := deepspeed_state.trained_elements(self.engine) * copies):
            problem = f"has {found:,} of {trained:,} trained elements where they belong under ZeRO stage {stage}"
            raise library_error("deepspeed", problem, "checkpoints")

    def enter_phase(self, phase: PhasePlan) -> BatchPlan:
        """Tell DeepSpeed how the batch of a phase is split over the ranks."""
        batch = batch_plan(self.recipe, self.world_size, phase)
        rows = self.world_size * batch.micro_batch_rows * batch.accumulation
        self.engine.set_train_micro_batch_size(batch.micro_batch_rows)
        self.engine.set_train_batch_size(rows)
        self._require("accumulation", self.engine.gradient_accumulation_steps(), batch.accumulation)
        self._require("the micro-batch", self.engine.train_micro_batch_size_per_gpu(), batch.micro_batch_rows)
        self._require("the batch", self.engine.train_batch_size(), rows)
        return batch

    def backward(self, loss_sum: Tensor, global_targets: int, *, is_last: bool) -> None:
        """Backpropagate a micro-batch's summed loss, so that the step's gradient is that of sum ÷ global targets.

        DeepSpeed averages over ranks, which this undoes. It is told not to divide by the number of micro-batches, and
        which of them is the last of a step: its own count would be wrong behind the border of a phase.
        """
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss_sum * (self.world_size / max(global_targets, 1)), scale_wrt_gas=False)
        if not is_last:
            self.engine.step()  # only counts the micro-batch

    def apply_step(self, learning_rate: float) -> bool:
        """Step the optimizer. False (the same on all ranks) if the gradients were not finite: then nothing changed."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_share"] if self.applied_steps >= group["opens_at"] else 0.0
        self.count_steps(opened_from=max(self.applied_steps, 1))
        self.engine.step()
        applied = bool(self.engine.was_step_applied())
        self.applied_steps += applied
        return applied

    def count_steps(self, *, opened_from: int = 0) -> None:
        """Have the optimizer count the steps of each group from that on at which it opens (`opens_at`), if it counts.

        Args:
            opened_from: only of groups that open after so many updates or more.
        """
        states = self.inner_optimizer.state
        for group, stepped in deepspeed_state.stepped_tensors(self.engine.optimizer, self.recipe.train.zero.stage):
            state = states.get(stepped, {})
            if group["opens_at"] >= opened_from and "step" in state:
                state["step"].fill_(max(0, self.applied_steps - group["opens_at"]))

    @property
    def optimizer(self) -> Optimizer:
        """What the recipe's optimizer says of itself."""
        return OPTIMIZERS[self.recipe.optimizer.name]

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """Torch's optimizer, which DeepSpeed wraps, except in fp32 without ZeRO."""
        return deepspeed_state.inner_optimizer(self.engine.optimizer)

    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self.engine.get_global_grad_norm())

    # ------------------------------------------------------------ small collectives

    def all_reduce_sum(self, values: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Sum int64 values over ranks, wrapping modulo 2**64."""
        tensor = torch.tensor(np.asarray(values, dtype=np.int64))
        dist.all_reduce(tensor, group=self.control)
        return tensor.numpy()

    def all_reduce_sum_float(self, values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum float64 values over ranks."""
        tensor = torch.tensor(np.asarray(values, dtype=np.float64))
        dist.all_reduce(tensor, group=self.control)
        return tensor.numpy()

    def all_reduce_sum_tensor(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks in place, on its device."""
        dist.all_reduce(tensor)
        return tensor

    def gather_json(self, value: Any) -> list[Any]:
        """What every rank has to say, by rank."""
        return _gather_json(value, self.control)

    def gather_votes(self, value: Any) -> list[Any]:
        """As `gather_json`, over connections of its own: for the one thread that saves, whatever training does."""
        return _gather_json(value, self.saving)

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.gather_json(value if self.rank == 0 else None)[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self.control)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def host(self) -> str:
        """This node's name, as in log and status files."""
        return socket.gethostname()

    def _require(self, what: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            raise RuntimeError(f"rank {self.rank}: {what} is {found!r} after set-up, the recipe asks for {wanted!r}")


def _gather_json(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """A value of every rank, by rank. JSON, not pickle: nothing received is ever executed."""
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([mine.numel()]), group=group)
    longest = int(max(sizes))
    padded = torch.cat([mine, torch.zeros(longest - mine.numel(), dtype=torch.uint8)])
    received = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(received, padded, group=group)
    return [json.loads(bytes(r[: int(n)].tolist())) for r, n in zip(received, sizes, strict=True)]


def quiet_libraries() -> None:
    """Keep libraries from filling logs and terminals with what nobody can act on. Before they are used."""
    if not torch.cuda.is_available():
        environment.set_defaults({"DS_ACCELERATOR": "cpu"})
    environment.set_defaults({"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})
    environment.set_defaults({"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "DS_LOG_LEVEL": "warning"})
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other


def _spare_deepspeed() -> None:
    """Keep DeepSpeed from two things at start-up that training never uses.

    On CPU it compiles an all-reduce for inference: 20 s, a C++ compiler, and a lock file that a killed rank leaves
    behind for every later run to wait on. And ZeRO asks of every optimizer whether it is Muon, whose import compiles
    kernels with inductor; a class that nothing is an instance of answers that at once.
    """
    import deepspeed.ops

    inside(deepspeed.ops, "__compatible_ops__", "keeping an operator for inference from being compiled")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    require_file(deepspeed, "runtime/zero/muon/muon_optimizer.py", "sparing the compilation of Muon's kernels")
    muon = types.ModuleType("deepspeed.runtime.zero.muon.muon_optimizer")
    muon.MuonWithAuxAdam = type("MuonWithAuxAdam", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault(muon.__name__, muon)


def keep_freed_memory() -> None:
    """Let the C library reuse large blocks, where it would give each back to the system and have it zeroed anew.

    A training step on a CPU allocates the same activations and gradients every time: the page faults were a tenth of
    its time. The settings are glibc's, mallopt(3); other C libraries have none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
            mallopt(parameter, value)
