"""What a rank of a debug run calls instead of `dstrain.train.main:run_rank`: the same training, a few steps, looked at.

    RUN/debug.json            written by `dstrain run`: how many steps, and which rank has a debugger
    RUN/debug-report.json     written here, by rank 0: shapes, memory by part, seconds by phase, operators

Training tells its reporter each phase as it begins, so a reporter that also looks is all that it takes.
"""

import contextlib
import gc
import json
import pdb
import re
import resource
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from dstrain.architectures import frozen_parameters, model_shape, parameters_of
from dstrain.base.environment import RankVariables
from dstrain.base.phases import RankPhase
from dstrain.checkpoint.fragments import resident_fragments
from dstrain.observe.debug_text import ORDERS, REPORT
from dstrain.plan import activation_bytes, batch_plan, corpus_tokens, in_phase, make_timeline, rank_memory
from dstrain.recipe.schema import Recipe
from dstrain.rundir.attempt_files import write_json
from dstrain.runtime.deepspeed_state import partition_tensor
from dstrain.runtime.runtime import Runtime
from dstrain.train import main
from dstrain.train.reporting import Reporter

MOST_OPERATORS = 10
_DEEPEST = 3  # of the names of modules that are shown, in parts; layers are further down


def run_rank(run_dir: Path, attempt: int) -> str:
    """Train a few steps; returns "done". An exception on the chosen rank opens a debugger where it was raised."""
    orders = json.loads((run_dir / ORDERS).read_text())
    torch.autograd.set_detect_anomaly(orders["detect_anomaly"])
    try:
        main.run_rank(run_dir, attempt, _reporter(run_dir, orders["steps"]))
    except Exception as error:
        if RankVariables.require().rank == orders["pdb_rank"]:
            traceback.print_exc()
            print("post mortem; `q` leaves, `w` shows where, `help` lists what there is", file=sys.stderr)
            pdb.post_mortem(error.__traceback__)
        raise
    return "done"


def _reporter(run_dir: Path, steps: int | None) -> type[Reporter]:
    class Debugged(Reporter):
        def __init__(self, runtime: Runtime, recipe: Recipe, folder: Path, attempt: int, total_steps: int) -> None:
            super().__init__(runtime, recipe, folder, attempt, total_steps)
            self._last = total_steps if steps is None else min(steps, total_steps)
            self._look = Look(runtime, recipe, self._last) if runtime.rank == 0 else None

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            super().__exit__(kind, error, trace)
            if self._look is not None:
                with contextlib.suppress(RuntimeError):  # of a device that has failed
                    self._look.end()
                write_json(run_dir / REPORT, self._look.as_json())

        def phase(self, phase: RankPhase, **status: Any) -> None:
            super().phase(phase, **status)
            if self._look is not None:
                self._look.phase(phase)

        def progress(self, step: int) -> None:
            super().progress(step)
            if self._look is not None:
                self._look.made(step)
            if step >= self._last:
                signal.raise_signal(signal.SIGUSR1)  # as a user would stop it: at the step's end, with a checkpoint

    return Debugged


class Look:
    """Watches rank 0: its first micro-batch for shapes and activations, its last step for operators, all for time."""

    def __init__(self, runtime: Runtime, recipe: Recipe, last_step: int) -> None:
        timeline = make_timeline(recipe, corpus_tokens(recipe))
        phase = None if timeline is None else timeline.phase_at(0)  # a few steps see no other
        self._batch = batch_plan(recipe, runtime.world_size, phase)
        self._runtime, self._last = runtime, last_step
        self._recipe = recipe if phase is None else in_phase(recipe, phase)
        self._module: nn.Module = runtime.engine.module
        self._model = next(module for module in self._module.modules() if isinstance(module, PreTrainedModel))
        self._phase, self._since, self._step = RankPhase.LOAD, time.perf_counter(), 0
        self._seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # first step, the others
        self._first_forward = ExitStack()
        self._inputs: dict[str, str] = {}
        self._outputs: dict[str, str] = {}
        self._activations: dict[int, int] = {}  # address of the storage → bytes
        self._memory: dict[str, int] = {}
        self._profile: Any = None
        self._operators: list[dict[str, Any]] = []
        if last_step == 1:
            self._start_profile()

    # ------------------------------------------------------------ what the training tells

    def phase(self, phase: RankPhase) -> None:
        """A phase begins, and the one before it has ended."""
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)
        now = time.perf_counter()
        if self._profile is None or self._last == 1:  # a profiled step takes longer
            self._seconds["save" if self._phase.is_step_of_save else self._phase.value][self._step > 0] += (
                now - self._since
            )
        if phase is RankPhase.FORWARD and not self._inputs:
            self._watch_forward()
        elif phase is RankPhase.BACKWARD:
            self._first_forward.close()
        elif phase is RankPhase.STEP and self._step == self._last - 1:
            self._memory = self._measured()
        self._phase, self._since = phase, time.perf_counter()

    def made(self, step: int) -> None:
        """A step is made."""
        self.phase(RankPhase.BETWEEN_STEPS)
        self._step = step
        if step == self._last:
            self.end()
        elif step == self._last - 1:
            self._start_profile()
        self._since = time.perf_counter()

    def end(self) -> None:
        """Look no longer for operators, or for shapes if an error came first."""
        self._first_forward.close()
        if self._profile is None:
            return
        self._profile.__exit__(None, None, None)
        averages = self._profile.key_averages()
        self._profile = None
        on_device = self._runtime.device.type == "cuda"
        name = "self_device_time_total" if on_device else "self_cpu_time_total"
        total = sum(getattr(operator, name) for operator in averages)
        largest = sorted(averages, key=lambda operator: -getattr(operator, name))[:MOST_OPERATORS]
        self._operators = [
            {
                "name": operator.key,
                "calls": operator.count,
                "seconds": getattr(operator, name) / 1e6,
                "share": getattr(operator, name) / max(total, 1),
            }
            for operator in largest
        ]

    # ------------------------------------------------------------ looking

    def _start_profile(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._runtime.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.__enter__()

    def _watch_forward(self) -> None:
        """Until the forward pass has ended: shapes of what goes in and out, and what is kept for the backward pass."""
        stack, own = self._first_forward, _storages([*self._module.parameters(), *self._module.buffers()])

        def keep(tensor: Tensor) -> Tensor:
            for address, size in _storages([tensor]).items():
                if address not in own:
                    self._activations[address] = size
            return tensor.detach()

        def enter(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._inputs = {name: _shape(value) for name, value in named.items() if isinstance(value, Tensor)}

        stack.enter_context(saved_tensors_hooks(keep, lambda tensor: tensor))
        handle = self._module.register_forward_pre_hook(enter, with_kwargs=True)
        stack.callback(handle.remove)
        for name, module in self._module.named_modules():
            if name and (len(name.split(".")) <= _DEEPEST or re.search(r"layers?\.\d+$", name)):
                stack.callback(module.register_forward_hook(self._hook(name)).remove)

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            shapes = [_shape(tensor) for tensor in _tensors(output)]
            self._outputs[name] = ", ".join(shapes) or type(output).__name__

        return look

    @torch.no_grad()
    def _measured(self) -> dict[str, int]:
        """Bytes of what lives when the backward passes of a step are over, by part."""
        parameters = list(self._module.parameters())
        partitions = [part for parameter in parameters if (part := partition_tensor(parameter)) is not None]
        weights = _storages([*parameters, *partitions])
        states = [view for part in resident_fragments(self._runtime, self._model) for view in part.states.values()]
        optimizer = {address: size for address, size in _storages(states).items() if address not in weights}
        tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
        gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
        alive = _storages(tensor for tensor in [*tensors, *gradients] if tensor.device.type != "meta")
        known = weights.keys() | optimizer.keys()
        return {
            "weights": sum(weights.values()),
            "optimizer": sum(optimizer.values()),
            "gradients and buffers": sum(size for address, size in alive.items() if address not in known),
        }

    # ------------------------------------------------------------ telling

    def as_json(self) -> dict[str, Any]:
        """Everything that was seen."""
        cuda = self._runtime.device.type == "cuda"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if cuda:
            peak = torch.cuda.max_memory_allocated(self._runtime.device)
        first = {phase: spent[0] for phase, spent in self._seconds.items()}
        later = {phase: spent[1] for phase, spent in self._seconds.items()}
        return {
            "device": str(self._runtime.device),
            "batch": str(self._batch),
            "steps": self._step,
            "inputs": self._inputs,
            "outputs": self._outputs,
            "memory_bytes": self._memory | ({"activations": sum(kept)} if (kept := self._activations.values()) else {}),
            "planned_bytes": self._planned(),
            "peak_bytes": peak,
            "peak_is_of": "the device" if cuda else "the whole process",
            "first_step_seconds": first,
            "later_seconds": later,
            "timed_later_steps": max(0, self._step - 2),  # neither the first nor the profiled one
            "operators": self._operators,
        }

    def _planned(self) -> dict[str, int]:
        recipe, world = self._recipe, self._runtime.world_size
        shape = model_shape(recipe.model)
        checkpointing, on_cpu = recipe.model.activation_checkpointing, self._runtime.device.type == "cpu"
        activations = activation_bytes(recipe, shape, checkpointing=checkpointing, on_cpu=on_cpu)
        count, frozen = (
            sum(parameters_of(recipe.model, shape, recipe.head).values()),
            frozen_parameters(recipe.model, shape),
        )
        memory = rank_memory(recipe, count, activations, world, recipe.train.zero.stage, frozen)
        return {
            "weights": memory.weights,
            "optimizer": memory.optimizer,
            "gradients and buffers": memory.gradients + memory.buffers,
            "activations": memory.activations,
            "total": memory.total,
        }


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address → bytes of the memory behind tensors, each once."""
    found = {}
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        except (RuntimeError, NotImplementedError):  # a tensor without memory: fake, sparse, functional
            continue
    found.pop(0, None)
    return found


def _shape(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} ({', '.join(map(str, tensor.shape))})" if tensor.dim() else f"{kind} scalar"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []
