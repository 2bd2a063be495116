"""`--allow data-change`: a run that goes on with other data, on two ranks, in one run folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import RankError, run_ranks
from training import training

from dstrain.checkpoint.data_change import DATA_CHANGE, PERMISSION
from dstrain.checkpoint.manifest import Manifest, checkpoint_folder
from dstrain.cli import main
from dstrain.convert.commands import _verified
from dstrain.data.index import CORPUS_INDEX_NAME
from dstrain.data.ledger import LEDGER_NAME, read_ledger
from dstrain.data.row_documents import RowDocuments
from dstrain.data.rows import digest_hex
from dstrain.data.stream import RowStream
from dstrain.errors import UserError
from dstrain.plan.streams import training_stream
from dstrain.plan.timeline import make_timeline
from dstrain.proof.account import account
from dstrain.recipe.difference import Difference
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import MaskedLmRecipe, Recipe
from dstrain.rundir.prepare import check_recipe, write_recipe
from dstrain.train.loop import Loop, StopRequest
from dstrain.train.reporting import Reporter

pytestmark = pytest.mark.ranks


def train(rank: int, world_size: int, recipe: Recipe, folder: Path) -> None:
    with training(recipe) as (runtime, task), Reporter(runtime, recipe, folder, 1, task.totals.steps) as report:
        Loop(runtime, task, folder, report, StopRequest()).run()


@pytest.fixture
def go_on(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., None]:
    """Start or resume the one run of a test, as `dstrain run` would."""

    def run(steps: int, *overrides: str, allow: str | None = None) -> None:
        recipe = tiny_recipe(f"train.steps={steps}", "schedule.warmup_steps=0", *overrides)
        check_recipe(tmp_path, recipe, allow)
        write_recipe(tmp_path, recipe, allow)
        run_ranks(2, train, recipe, tmp_path)

    return run


def test_other_data_is_refused_then_allowed_once_recorded_and_accounted_for(
    go_on: Callable[..., None], tmp_path: Path
) -> None:
    go_on(3)
    with pytest.raises(UserError, match=r"data\.seed: 1 → 2\n.*or --allow data-change") as refused:
        go_on(5, "data.seed=2")
    assert "train.steps" not in str(refused.value)
    with pytest.raises(UserError, match=r"hidden_size") as refused:
        go_on(5, "data.seed=2", "model.config.hidden_size=64", allow=DATA_CHANGE)
    assert "data.seed" not in str(refused.value), "that alone would be allowed"

    go_on(5, "data.seed=2", "train.global_batch_rows=16", allow=DATA_CHANGE)
    manifest = Manifest.read(checkpoint_folder(tmp_path, 5))
    changed = [Difference("data.seed", 1, 2), Difference("train.global_batch_rows", 8, 16)]
    assert manifest.data_changes == [
        {"step": 3, "data_step": 3, "first_row": 24, "changed": [difference.to_json() for difference in changed]}
    ]
    assert (manifest.data_step, manifest.data_origin, manifest.next_row) == (5, (3, 24), 56)
    found = account(tmp_path)
    assert found.problems == []
    assert (found.first_step, found.last_step, found.rows) == (1, 5, (0, 55))
    assert [(one.after_step, one.first_row, list(one.changed)) for one in found.data_changes] == [(3, 24, changed)]
    assert [_verified(checkpoint_folder(tmp_path, step)) for step in (3, 5)] == [[], []]

    go_on(6, "data.seed=2", "train.global_batch_rows=16")  # the permission is used up, and not needed
    assert Manifest.read(checkpoint_folder(tmp_path, 6)).data_changes == manifest.data_changes
    assert (tmp_path / PERMISSION).exists()
    with pytest.raises(UserError, match=r"data\.seed: 2 → 3"):
        go_on(7, "data.seed=3", "train.global_batch_rows=16")
    assert account(tmp_path).problems == []


def test_new_data_begins_at_its_beginning_and_is_read_on_after_a_restart(
    go_on: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of the new data are those of a run of it alone, but for their numbers and so their masks."""
    go_on(2)
    go_on(4, "data.seed=2", allow=DATA_CHANGE)
    go_on(6, "data.seed=2")
    recipe = _recipe_of(tmp_path)
    assert isinstance(recipe, MaskedLmRecipe)
    timeline = make_timeline(recipe, None)
    assert timeline is not None
    documents = RowDocuments(training_stream(recipe, timeline))
    moved = RowDocuments(training_stream(recipe, timeline, (2, 16)))
    for step in range(4):
        there, here = documents.of_step(0, 1, step), moved.of_step(0, 1, step + 2)
        assert [(piece.row + 16, piece.key, piece.offset) for piece in there] == [
            (piece.row, piece.key, piece.offset) for piece in here
        ]
    assert main(["ledger", str(tmp_path), "--json"]) == 0
    documents = json.loads(capsys.readouterr().out.splitlines()[-1])["documents"]
    assert (documents["first_row"], documents["remade_steps"]) == (16, [3, 6])
    assert [source["tokens"] for source in documents["sources"]] == [4 * 8 * 32]
    ledger = {entry.step: entry for entry in read_ledger(tmp_path / LEDGER_NAME)}
    with RowStream(training_stream(recipe, timeline, (2, 16)), 0, 1) as stream:
        for step, rows in zip((3, 4, 5, 6), stream, strict=False):
            assert (rows.step, digest_hex(rows.digest)) == (step - 1, ledger[step].digest)


def test_shards_that_changed_under_an_unchanged_recipe_need_it_too_and_paths_do_not_count(
    go_on: Callable[..., None], tmp_path: Path, tiny_corpus: Path
) -> None:
    go_on(2)
    shards = sorted((tiny_corpus / "train").glob("*.tar"))
    same, less = tmp_path / "moved" / "renamed", tmp_path / "less"
    shutil.copytree(tiny_corpus / "train", same)
    for shard in shards:  # other names in the same order
        for file in same.glob(f"{shard.name}*"):
            file.unlink()
        shutil.copyfile(shard, same / f"part-{shard.name}")
    (same / CORPUS_INDEX_NAME).unlink()
    tokenizer = tmp_path / "tokenizer-elsewhere"
    shutil.copytree(_recipe_of(tmp_path).tokenizer, tokenizer)
    assert main(["shards", "index", str(same), "--tokenizer", str(tokenizer)]) == 0
    go_on(3, f"data.train={same}", f"tokenizer={tokenizer}")
    assert Manifest.read(checkpoint_folder(tmp_path, 3)).data_changes == []

    less.mkdir()
    for shard in shards[1:]:
        shutil.copyfile(shard, less / shard.name)
    assert main(["shards", "index", str(less), "--tokenizer", str(tokenizer)]) == 0
    with pytest.raises(UserError, match=r"data\.train: [0-9a-f]{12}… → [0-9a-f]{12}…\n.*--allow data-change"):
        go_on(5, f"data.train={less}")
    write_recipe(tmp_path, _recipe_of(tmp_path, f"data.train={less}"))  # as if the files had changed later
    with pytest.raises(RankError, match=r"was saved from other data:\n  data\.train: [0-9a-f]{12}… → "):
        run_ranks(2, train, _recipe_of(tmp_path, "train.steps=5"), tmp_path)
    go_on(5, f"data.train={less}", allow=DATA_CHANGE)
    assert [change["step"] for change in Manifest.read(checkpoint_folder(tmp_path, 5)).data_changes] == [3]
    assert account(tmp_path).problems == []


def _recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", overrides).recipe
