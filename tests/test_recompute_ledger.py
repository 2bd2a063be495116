"""The data order, said a second time in tools/recompute_ledger.py, gives the rows that training gets."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

from dstrain.data.ledger import LEDGER_NAME, LedgerEntry, LedgerWriter, compare_ledgers, read_ledger
from dstrain.data.rows import digest_hex
from dstrain.data.stream import RowStream
from dstrain.proof.training_data import TrainingData
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import MaskedLmRecipe, Recipe
from dstrain.recipe.show import resolved_yaml

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).resolve().parent.parent / "tools" / "recompute_ledger.py"
PHASES = """
phases:
  - {{name: short, steps: 9}}
  - {{name: long, steps: 5, data: {{sequence_length: 64, masking: {{rate: {{from: 0.4, to: 0.1}}}}}},
     train: {{global_batch_rows: 16}}}}
  - {{name: other, steps: 200, data: {{sources: {{a: 1, b: 4}}}}}}
"""


@pytest.fixture(scope="module")
def program() -> ModuleType:
    specification = importlib.util.spec_from_file_location("recompute_ledger", PROGRAM)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["recompute_ledger"] = module  # dataclasses look themselves up there
    specification.loader.exec_module(module)
    return module


def trained(recipe: Recipe, steps: int) -> list[LedgerEntry]:
    """The ledger of `steps` steps, as a rank that is alone would write it."""
    assert isinstance(recipe, MaskedLmRecipe)
    with RowStream(TrainingData.open(recipe).spec, 0, 1) as stream:
        return [
            LedgerEntry(rows.step + 1, (int(rows.row_numbers[0]), int(rows.row_numbers[-1])), digest_hex(rows.digest))
            for rows in islice(stream, steps)
        ]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.masking.unit=span", "data.lanes=4", "data.shuffle_window=2"),
        ("data.pairs.objective=sentence_order", "data.pairs.tokens=32", "data.lanes=2"),
    ],
)
def test_two_implementations_of_the_law_agree_over_epochs(
    program: ModuleType, tiny_recipe: Callable[..., Recipe], overrides: tuple[str, ...]
) -> None:
    recipe = tiny_recipe("train.steps=150", *overrides)
    assert isinstance(recipe, MaskedLmRecipe)
    data = TrainingData.open(recipe)
    assert 2 * data.corpora[0].total_tokens < 150 * 8 * 32  # some epochs
    entries = trained(recipe, 150)
    assert list(islice(program.global_batches(data), 150)) == [(entry.rows, entry.digest) for entry in entries]


def test_they_agree_over_phases_and_sources(
    program: ModuleType, tiny_recipe: Callable[..., Recipe], tiny_corpus: Path, tmp_path: Path
) -> None:
    sources = f"{{a: {{shards: {tiny_corpus}/train, weight: 3}}, b: {{shards: {tiny_corpus}/valid, weight: 1}}}}"
    text = MIXTURE.format(sources=sources, tokenizer=tiny_recipe().tokenizer) + PHASES.format()
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    assert isinstance(recipe, MaskedLmRecipe)
    entries = trained(recipe, 60)
    batches = islice(program.global_batches(TrainingData.open(recipe)), 60)
    assert list(batches) == [(entry.rows, entry.digest) for entry in entries]


MIXTURE = """\
name: mixture
task: masked_lm
model:
  architecture: bert
  config: {{vocab_size: 256, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64,
            max_position_embeddings: 64}}
tokenizer: {tokenizer}
data: {{sources: {sources}, sequence_length: 32, lanes: 4, seed: 1}}
train: {{global_batch_rows: 8, micro_batch_rows: 2, precision: fp32}}
optimizer: {{learning_rate: 1e-3}}
"""


def test_a_run_that_was_fed_other_rows_is_found_out(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe("train.steps=6")
    run, again = tmp_path / "run", tmp_path / "again"
    run.mkdir()
    (run / "recipe.yaml").write_text(resolved_yaml(recipe))
    entries = trained(recipe, 6)
    with LedgerWriter(run / LEDGER_NAME) as ledger:
        for entry in entries:
            fed = "0" * 32 if entry.step == 4 else entry.digest
            ledger.append(LedgerEntry(entry.step, entry.rows, fed))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(run), "--out", str(again)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("6 steps read anew on one process, without a model")
    assert list(read_ledger(again / LEDGER_NAME)) == entries[::-1]
    comparison = compare_ledgers(run / LEDGER_NAME, again / LEDGER_NAME)
    assert (comparison.common_steps, comparison.first_difference) == (6, 4)
