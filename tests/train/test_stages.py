"""What ZeRO stages must share: initial weights, clipping, decay, and that a step which is not finite never happened."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import RankError, run_ranks
from training import (
    Pieces,
    Poison,
    RecipeMaker,
    model_weights,
    poisoned,
    relative_difference,
    state_pieces,
    train_batch,
    train_steps,
    training,
    whole,
)

from dstrain.recipe.schema import Recipe
from dstrain.runtime.runtime import Runtime

pytestmark = pytest.mark.ranks
STAGES = (0, 1, 2, 3)


# ------------------------------------------------------------------ initial weights and clipping


def initial_weights(rank: int, world: int, recipes: list[Recipe]) -> list[dict[str, NDArray[np.float32]]]:
    results = []
    for recipe in recipes:
        with training(recipe) as (runtime, task):
            results.append(model_weights(runtime, task))
    return results


def test_the_same_initial_weights_under_every_stage(tiny_recipe: RecipeMaker) -> None:
    recipes = [tiny_recipe(f"train.zero.stage={stage}") for stage in STAGES] + [tiny_recipe("train.seed=4")]
    for first, *others, other_seed in run_ranks(2, initial_weights, recipes):
        for weights in others:
            assert all(np.array_equal(weights[name], first[name]) for name in first)
        assert not any(np.array_equal(other_seed[name], first[name]) for name in first if first[name].ndim > 1)


def clipped_gradients(rank: int, world: int, recipes: list[Recipe]) -> list[tuple[Pieces, float]]:
    results = []
    for recipe in recipes:
        with training(recipe) as (runtime, task):
            train_steps(runtime, task, 1)
            results.append((state_pieces(runtime, task, "exp_avg"), runtime.grad_norm()))
    return results


def test_clipping_is_the_same_under_every_stage(tiny_recipe: RecipeMaker) -> None:
    """Above the limit the gradient keeps its direction and gets the limit's norm; the norm of before is reported."""
    beta = "optimizer.betas=[0.0, 0.999]"  # the first moment is then the gradient that was applied
    cases = [(stage, precision) for precision in ("fp32", "bf16") for stage in STAGES]
    limits = (("null", "fp32", 0), *(("0.05", precision, stage) for stage, precision in cases))
    recipes = [
        tiny_recipe(f"train.clip_grad_norm={limit}", f"train.precision={precision}", f"train.zero.stage={stage}", beta)
        for limit, precision, stage in limits
    ]
    by_rank = run_ranks(2, clipped_gradients, recipes)
    free, *clipped = [whole([pieces for pieces, _ in ranks]) for ranks in zip(*by_rank, strict=True)]
    free_norm = math.sqrt(sum(float(np.square(g.astype(np.float64)).sum()) for g in free.values()))
    assert free_norm > 0.2
    expected = {name: g * np.float32(0.05 / free_norm) for name, g in free.items()}
    for (_, precision, stage), gradient in zip(limits[1:], clipped, strict=True):
        tolerance = 1e-5 if precision == "fp32" else 2e-2
        assert relative_difference(gradient, expected) < tolerance, (precision, stage)
    for norms in ([norm for _, norm in results] for results in by_rank):
        assert norms == pytest.approx([free_norm] * len(norms), rel=1e-2)
        assert norms[:5] == pytest.approx([free_norm] * 5, rel=1e-5)


# ------------------------------------------------------------------ decay


def decays(rank: int, world: int, recipes: list[Recipe]) -> list[dict[str, float]]:
    """The factor by which a step of almost no learning changes each parameter."""
    results = []
    for recipe in recipes:
        with training(recipe) as (runtime, task):
            before = model_weights(runtime, task)
            train_steps(runtime, task, 1, learning_rate=0.1)
            after = model_weights(runtime, task)
            results.append(
                {name: float(after[name].sum() / before[name].sum()) for name in before if before[name].any()}
            )
    return results


def test_matrices_decay_and_vectors_do_not(tiny_recipe: RecipeMaker) -> None:
    # With eps this large Adam itself moves nothing: what moves is decayed, by 1 - 0.1 × 0.5.
    recipes = [
        tiny_recipe(f"train.zero.stage={stage}", "optimizer.weight_decay=0.5", "optimizer.eps=1e9") for stage in STAGES
    ]
    for factors in run_ranks(1, decays, recipes)[0]:
        assert {name for name, factor in factors.items() if factor == pytest.approx(0.95, abs=1e-3)} == {
            name for name in factors if "LayerNorm" not in name
        }
        assert all(factors[name] == pytest.approx(1.0, abs=1e-6) for name in factors if "LayerNorm" in name)


# ------------------------------------------------------------------ steps that are not finite


STATES = ("weight", "exp_avg", "exp_avg_sq")
GOOD: dict[int, str] = {}


def states_after(rank: int, world: int, recipes: list[Recipe], steps: list[tuple[int, dict[int, str]]]) -> list[Any]:
    """Train the (batch, poison of the last rank's micro-batches) given; return which were applied, and the state."""
    results = []
    for recipe in recipes:
        with training(recipe, Poison) as (runtime, task), task.steps(0) as batches:
            kept = [next(batches) for _ in range(2)]
            applied = [
                train_batch(runtime, poisoned(kept[index], poison if rank == world - 1 else GOOD), 1e-3)[1]
                for index, poison in steps
            ]
            results.append((applied, {state: state_pieces(runtime, task, state) for state in STATES}))
    return results


def test_a_step_that_is_not_finite_leaves_no_trace(tiny_recipe: RecipeMaker) -> None:
    cases = list(itertools.product(("fp32", "bf16"), STAGES))
    recipes = [tiny_recipe(f"train.precision={precision}", f"train.zero.stage={stage}") for precision, stage in cases]
    bad_steps = [(1, {1: "loss"}), (1, {0: "gradient"})]
    disturbed = run_ranks(2, states_after, recipes, [(0, GOOD), *bad_steps, (1, GOOD)])
    undisturbed = run_ranks(2, states_after, recipes, [(0, GOOD), (1, GOOD)])
    for rank in range(2):
        for case, (applied, state), (_, expected) in zip(cases, disturbed[rank], undisturbed[rank], strict=True):
            assert applied == [True, False, False, True], (rank, case)
            for name in STATES:
                assert state[name].keys() == expected[name].keys()
                assert all(np.array_equal(state[name][key], expected[name][key]) for key in state[name]), (case, name)


# ------------------------------------------------------------------ what the runtime refuses


def tampered(rank: int, world: int, recipe: Recipe, changes: list[dict[str, Any]]) -> list[str]:
    """Start with a DeepSpeed configuration that is not the recipe's, and say what was noticed."""
    import dstrain.runtime.runtime as module

    honest = module.deepspeed_config
    messages = []
    for change in changes:
        module.deepspeed_config = lambda recipe, world: honest(recipe, world) | change  # noqa: B023
        try:
            with training(recipe):
                messages.append("nothing")
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def test_what_is_not_as_the_recipe_asks_is_noticed(tiny_recipe: RecipeMaker) -> None:
    changes: list[dict[str, Any]] = [
        {"zero_optimization": {"stage": 2}},
        {"bf16": {"enabled": True}},
        {"gradient_clipping": 7.0},
        {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8},
        {},
    ]
    found = run_ranks(1, tampered, tiny_recipe("train.zero.stage=1"), changes)[0]
    assert found == [
        "rank 0: the ZeRO stage is 2 after set-up, the recipe asks for 1",
        "rank 0: bf16 is True after set-up, the recipe asks for False",
        "rank 0: gradient clipping is 7.0 after set-up, the recipe asks for 1.0",
        "rank 0: accumulation is 8 after set-up, the recipe asks for 4",
        "nothing",
    ]


def start_only(rank: int, world: int, recipe: Recipe) -> None:
    Runtime.start(recipe)


def test_more_ranks_than_lanes_are_refused_before_anything_starts(tiny_recipe: RecipeMaker) -> None:
    with pytest.raises(RankError, match=r"RecipeError: 3 ranks cannot train tiny: data\.lanes=2 is the most"):
        run_ranks(3, start_only, tiny_recipe("data.lanes=2"))


# ------------------------------------------------------------------ set-up


def attention_in_use(rank: int, world: int, recipes: list[Recipe]) -> list[str]:
    names = []
    for recipe in recipes:
        with training(recipe) as (_, task):
            names.append(task.model.config._attn_implementation)
    return names


def test_attention_is_chosen_when_the_device_is_known(tiny_recipe: RecipeMaker) -> None:
    wanted = {"fp32": "sdpa", "bf16": "sdpa" if torch.cuda.is_available() else "matmul"}
    recipes = [tiny_recipe(f"train.precision={precision}") for precision in wanted]
    asked = tiny_recipe("train.precision=bf16", "model.attention=eager")
    assert run_ranks(1, attention_in_use, [*recipes, asked]) == [[*wanted.values(), "eager"]]
