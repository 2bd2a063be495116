"""Every task on examples, on 1, 2 and 3 ranks: the same rows, losses and gradients, however few rows a rank has."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from labelled import write_examples
from numpy.typing import NDArray
from ranks import run_ranks
from searched import recipe_text, write_queries
from test_heads import HEADS
from test_heads import write_recipe as write_head
from test_text_to_text import RECIPE as TEXT_TO_TEXT
from test_text_to_text import STACKS
from training import Pieces, relative_difference, state_pieces, train_batch, training, whole

from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe

pytestmark = pytest.mark.ranks
# Adam's first moment after one step with beta1 = 0 is the gradient itself.
GRADIENT = ("train.clip_grad_norm=null", "optimizer.betas=[0.0, 0.999]")
NO_DROPOUT = {
    "bert": ("model.config.hidden_dropout_prob=0", "model.config.attention_probs_dropout_prob=0"),
    "roberta": ("model.config.hidden_dropout_prob=0", "model.config.attention_probs_dropout_prob=0"),
    "modernbert": (),
    "bart": ("model.config.dropout=0",),
}
Step = tuple[list[int], list[int], Pieces, float]


@pytest.fixture(scope="module")
def recipe_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A recipe for each task and its data, in steps of 4 or 8 rows."""
    folder = write_examples(tmp_path_factory.mktemp("heads"))
    files = {name: write_head(folder, name) for name in HEADS}
    words = ["red", "green", "blue", "apple", "leaf", "sky", "of", "the"]
    for split in ("train", "valid"):
        texts = [" ".join(words[(n * k + 1) % 8] for k in range(1, 3 + 2 * n % 15)) for n in range(10)]
        (folder / f"{split}.en").write_text("".join(f"{text}\n" for text in texts))
        (folder / f"{split}.de").write_text("".join(f"{' '.join(text.split()[::-1][:9])}\n" for text in texts))
    files["text to text"] = folder / "text-to-text.yaml"
    files["text to text"].write_text(TEXT_TO_TEXT.format(folder=folder, architecture="bart", model=STACKS))
    searched = write_queries(tmp_path_factory.mktemp("searched"))
    for task in ("retrieval", "ranking"):
        files[task] = searched / f"{task}.yaml"
        files[task].write_text(recipe_text(searched, task=task))
    return files


def first_steps(rank: int, world: int, recipes: list[Recipe]) -> list[Step]:
    """On a rank, of each recipe's first step: its rows, how many micro-batches count, its gradient, and the loss."""
    found = []
    for recipe in recipes:
        with training(recipe) as (runtime, task), task.steps(0) as batches:
            (batch,) = task.completed([next(batches)])
            loss, applied = train_batch(runtime, batch, 1e-3)
            assert applied
            counts = [len(micro_batch.row_numbers) for micro_batch in batch.micro_batches]
            found.append((batch.row_numbers.tolist(), counts, state_pieces(runtime, task, "exp_avg"), loss))
    return found


def test_one_step_on_any_ranks(recipe_files: dict[str, Path]) -> None:
    def recipes(stage: int, micro_batch_rows: int) -> list[Recipe]:
        split = (f"train.zero.stage={stage}", f"train.micro_batch_rows={micro_batch_rows}", *GRADIENT)
        loaded = []
        for path in recipe_files.values():
            architecture = load_recipe(path).recipe.model.architecture
            loaded.append(load_recipe(path, [*split, *NO_DROPOUT[architecture]]).recipe)
        return loaded

    cases = [(1, 0, 8), (2, 2, 3), (3, 3, 1)]
    by_case = [run_ranks(world, first_steps, recipes(stage, rows)) for world, stage, rows in cases]
    unequal = set()
    for number, name in enumerate(recipe_files):
        expected: tuple[list[int], dict[str, NDArray[np.float32]], float] | None = None
        for ranks in by_case:
            rows, counts, pieces, losses = zip(*(steps[number] for steps in ranks), strict=True)
            assert len({len(of_rank) for of_rank in counts}) == 1, "as many passes on every rank"
            if len({sum(of_rank) for of_rank in counts}) > 1:
                unequal.add(name)
            all_rows, gradient = sorted(chain.from_iterable(rows)), whole(list(pieces))
            if expected is None:
                expected = all_rows, gradient, losses[0]
            assert all_rows == expected[0], name
            assert relative_difference(gradient, expected[1]) < 1e-5, name
            assert losses == pytest.approx([expected[2]] * len(ranks), rel=1e-6), name
    assert unequal == set(recipe_files), "no rank had fewer rows than another"
