"""Saved under any ZeRO stage on 2 ranks, loaded under any on 1, 2 and 4: the same state to the bit, the same run."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_ranks import Job, Piece, job
from numpy.typing import NDArray
from ranks import run_ranks

from dstrain.checkpoint.load import Pieces
from dstrain.checkpoint.manifest import Manifest, committed
from dstrain.checkpoint.verify import verify
from dstrain.recipe.schema import Recipe

pytestmark = pytest.mark.ranks
SAVED_STEP, MORE_STEPS = 4, 4
State = dict[tuple[str, str], NDArray[np.float32]]  # (parameter, state) → all its elements


@dataclass(frozen=True)
class Case:
    """A way to train."""

    recipe: Recipe
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Saved:
    """What a run on 2 ranks had when it saved, and how it went on."""

    state: State
    probe: float
    rows: list[str]
    losses: list[float]


@pytest.fixture(scope="module")
def cases(tiny_recipe: Callable[..., Recipe]) -> dict[str, Case]:
    offload = ("train.zero.offload_optimizer=cpu",)
    return {
        **{f"fp32-{s}": Case(tiny_recipe(f"train.zero.stage={s}")) for s in range(4)},
        **{f"bf16-{s}": Case(tiny_recipe(f"train.zero.stage={s}", "train.precision=bf16")) for s in range(4)},
        **{f"offload-{s}": Case(tiny_recipe(f"train.zero.stage={s}", *offload)) for s in (1, 2)},
        "offload-3": Case(tiny_recipe("train.zero.stage=3", *offload, "train.zero.offload_params=cpu")),
        **{
            f"frozen-{s}": Case(
                tiny_recipe(f"train.zero.stage={s}", "train.precision=bf16"), ("embeddings", "layer.0.attention")
            )
            for s in range(4)
        },
    }


SAVERS = [*(f"fp32-{s}" for s in range(4)), "bf16-0", "bf16-2", "bf16-3", "offload-1", "offload-2", "offload-3"]
SAVERS += ["frozen-1", "frozen-3"]


def loaders(saver: str) -> list[str]:
    kind, stage = saver.split("-")
    if kind == "offload":
        return ["fp32-0", f"offload-{int(stage) % 3 + 1}"]
    return [f"{kind}-{s}" for s in range(4)]


def save_on_rank(rank: int, world_size: int, cases: dict[str, Case], folder: Path) -> dict[str, Any]:
    results = {}
    for name in SAVERS:
        run = job(cases[name].recipe, cases[name].frozen)
        if name == SAVERS[0]:
            run.read_rows(SAVED_STEP + MORE_STEPS)
        run.train(SAVED_STEP)
        run.save(folder / name)
        probe = run.probe()
        resident, full = run.resident(), deepspeed_view(run)
        after = run.train(MORE_STEPS)
        results[name] = (resident, full, probe, after)
    return results


def load_on_rank(
    rank: int, world_size: int, cases: dict[str, Case], folder: Path, saved: dict[str, Saved]
) -> dict[tuple[str, str], Any]:
    results = {}
    for name in SAVERS:
        for loader in loaders(name):
            run = job(cases[loader].recipe, cases[loader].frozen).resume(folder / name)
            assert run.state.step == run.state.data_step == SAVED_STEP
            resident = run.resident()
            wrong = [
                (parameter, state, offset)
                for parameter, state, offset, elements in resident
                if not np.array_equal(saved[name].state[parameter, state][offset : offset + len(elements)], elements)
            ]
            held = [(parameter, state, offset, len(elements)) for parameter, state, offset, elements in resident]
            if name == loader:
                run.save(folder / f"{name}-again-{world_size}")
            results[name, loader] = (wrong, held, run.probe(), run.train(MORE_STEPS))
    return results


def deepspeed_view(run: Job) -> State:
    """The same state through DeepSpeed's own accessors, of trained parameters under ZeRO. A collective call."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    stage = run.runtime.recipe.train.zero.stage
    if stage == 0:
        return {}
    optimizer = run.runtime.engine.optimizer
    if stage < 3:  # it links the moments of the first parameter group only
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    view: State = {}
    for name, parameter in run.task.model.named_parameters():
        if parameter.requires_grad:
            tensors = {"weight": safe_get_full_fp32_param(parameter)}
            tensors |= {s: safe_get_full_optimizer_state(parameter, s) for s in ("exp_avg", "exp_avg_sq")}
            view |= {(name, state): tensor.float().view(-1).numpy().copy() for state, tensor in tensors.items()}
    return view


def assembled(ranks: Iterable[list[Piece]]) -> State:
    """Join what ranks hold; replicated elements must agree, and none may be missing."""
    parts: dict[tuple[str, str], dict[int, NDArray[np.float32]]] = {}
    for pieces in ranks:
        for parameter, state, offset, elements in pieces:
            known = parts.setdefault((parameter, state), {})
            assert offset not in known or np.array_equal(known[offset], elements), (parameter, state)
            known[offset] = elements
    state = {}
    for key, pieces_of in parts.items():
        reached = 0
        for offset in sorted(pieces_of):
            assert offset == reached, f"{key}: elements {reached} to {offset}"
            reached += len(pieces_of[offset])
        state[key] = np.concatenate([pieces_of[offset] for offset in sorted(pieces_of)])
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def saved(cases: dict[str, Case], folder: Path) -> dict[str, Saved]:
    ranks = run_ranks(2, save_on_rank, cases, folder)
    found = {}
    for name in SAVERS:
        state = assembled(results[name][0] for results in ranks)
        for key, elements in ranks[0][name][1].items():
            assert np.array_equal(state[key], elements), f"{name}: {key} is not what DeepSpeed says it is"
        assert len({results[name][2] for results in ranks}) == 1
        losses, rows = zip(*ranks[0][name][3], strict=True)
        found[name] = Saved(state, ranks[0][name][2], list(rows), list(losses))
    return found


def test_saved_runs_are_what_they_should_be(saved: dict[str, Saved]) -> None:
    trained, frozen = saved["bf16-3"].state, saved["frozen-3"].state
    assert {state for _, state in trained} == {"weight", "exp_avg", "exp_avg_sq"}
    assert trained.keys() > frozen.keys()
    assert ("bert.embeddings.word_embeddings.weight", "weight") in frozen
    assert ("bert.embeddings.word_embeddings.weight", "exp_avg") not in frozen
    assert not any("decoder.weight" in parameter for parameter, _ in trained), "tied, so saved once"
    assert all(np.any(elements) for (_, state), elements in trained.items() if state == "exp_avg_sq")
    assert len({math.prod(elements.shape) for elements in trained.values()}) > 3
    for stage in (1, 2, 3):
        assert np.isclose(saved[f"fp32-{stage}"].losses, saved["fp32-0"].losses, atol=1e-6, rtol=0).all()
        assert saved[f"fp32-{stage}"].rows == saved["fp32-0"].rows


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_checkpoint_goes_on_under_any_topology(
    world_size: int, cases: dict[str, Case], folder: Path, saved: dict[str, Saved]
) -> None:
    ranks = run_ranks(world_size, load_on_rank, cases, folder, saved)
    for name, loader in ranks[0]:
        expected, results = saved[name], [found[name, loader] for found in ranks]
        label = f"{name} on 2 ranks → {loader} on {world_size}"
        assert not any(wrong for wrong, *_ in results), label
        assert covered(held for _, held, _, _ in results) == {k: len(v) for k, v in expected.state.items()}, label
        same_stage = world_size == 2 and name == loader
        exactly = {"rel_tol": 0.0, "abs_tol": 0.0}
        fp32 = not name.startswith(("bf16", "frozen"))
        assert all(math.isclose(probe, expected.probe, **exactly) for _, _, probe, _ in results), label
        losses, rows = zip(*results[0][3], strict=True)
        assert list(rows) == expected.rows, label
        worst = max(abs(a - b) for a, b in zip(losses, expected.losses, strict=True))
        assert worst <= (0.0 if same_stage else 1e-5 if fp32 else 5e-4), label
        if name == loader:
            (again,) = committed(folder / f"{name}-again-{world_size}")
            assert verify(again) == [], label
            assert differing(again, expected.state) == [], label


def differing(checkpoint: Path, expected: State) -> list[tuple[str, str]]:
    """The states that a checkpoint does not hold to the bit."""
    pieces, wrong = Pieces(checkpoint, Manifest.read(checkpoint)), []
    for (parameter, state), elements in expected.items():
        read = torch.empty(len(elements))
        pieces.read_into(read, parameter, state, 0)
        if not np.array_equal(read.numpy(), elements):
            wrong.append((parameter, state))
    return wrong


def covered(ranks: Iterable[list[tuple[str, str, int, int]]]) -> dict[tuple[str, str], int]:
    """How many elements of each state the ranks hold, counting an element once."""
    stretches: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for held in ranks:
        for parameter, state, offset, numel in held:
            stretches.setdefault((parameter, state), set()).add((offset, numel))
    return {key: sum(numel for _, numel in found) for key, found in stretches.items()}
