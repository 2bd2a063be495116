import contextlib
import io
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from dstrain.cli import parse
from dstrain.data.writer import write_text_shards
from dstrain.errors import CorpusError, UserError
from dstrain.rundir import prepare
from dstrain.supervise.local import run_command

RECIPE = """\
name: tiny
task: masked_lm
model: {architecture: bert, config: {vocab_size: 256, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
        intermediate_size: 64, max_position_embeddings: 32}}
tokenizer: tokenizer
data: {train: corpus, sequence_length: 32, lanes: 4}
train: {global_batch_rows: 8, micro_batch_rows: 2, steps: 10, precision: fp32}
optimizer: {learning_rate: 1e-3}
"""


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Path) -> Namespace:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
    write_text_shards(tmp_path / "corpus", ["a text"] * 8)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return parse(["run", "tiny.yaml"])


def dry_run(arguments: Namespace) -> str:
    arguments.dry_run = True
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert run_command(arguments) == 0
    return output.getvalue()


def test_a_dry_run_shows_the_batch_and_the_command_and_writes_nothing(arguments: Namespace, tmp_path: Path) -> None:
    arguments.procs_per_node = 2
    before = sorted(tmp_path.iterdir())
    text = dry_run(arguments)
    assert text.startswith(
        "# 2 ranks × 2 rows × 2 accumulation = 8 rows = 256 tokens\n# attempt 1, no checkpoint yet; "
    )
    assert " -m dstrain.agent.agent --run-dir runs/tiny --attempt 1 " in text
    assert text.endswith(" --ranks 2 --shutdown-timeout 600\n")
    assert sorted(tmp_path.iterdir()) == before


def test_more_ranks_than_lanes_are_refused_before_anything_is_written(arguments: Namespace, tmp_path: Path) -> None:
    arguments.procs_per_node = 9
    with pytest.raises(UserError, match=r"9 ranks cannot train tiny: .*; use 1 to 4 ranks"):
        run_command(arguments)
    assert not (tmp_path / "runs").exists()


def test_the_folder_of_another_model_is_refused_key_by_key(arguments: Namespace, tmp_path: Path) -> None:
    assert prepare.main(["tiny.yaml", "--run-dir", "runs/tiny"]) == 0
    (tmp_path / "runs/tiny/ledger.jsonl").write_text('{"step": 1}\n')
    recipe_before = (tmp_path / "runs/tiny/recipe.yaml").read_text()
    arguments.overrides = ["model.config.hidden_size=64", "model.config.num_hidden_layers=2", "train.steps=20"]
    with pytest.raises(UserError) as error:
        run_command(arguments)
    assert str(error.value) == (
        "runs/tiny holds a run of another recipe, or of other data; what it was trained on must not change:\n"
        "  model.config.hidden_size: 32 → 64\n"
        "  model.config.num_hidden_layers: 1 → 2\n"
        "give another --run-dir to start a new run, or what there was to resume this one"
    )
    assert (tmp_path / "runs/tiny/recipe.yaml").read_text() == recipe_before


def test_a_folder_in_which_nothing_was_trained_yet_takes_a_corrected_recipe(arguments: Namespace) -> None:
    assert prepare.main(["tiny.yaml", "--run-dir", "runs/tiny"]) == 0
    assert prepare.main(["tiny.yaml", "--run-dir", "runs/tiny", "data.lanes=8"]) == 0


def test_a_resume_may_change_how_it_runs(arguments: Namespace, tmp_path: Path) -> None:
    assert prepare.main(["tiny.yaml", "--run-dir", "runs/tiny"]) == 0
    (tmp_path / "runs/tiny/ledger.jsonl").write_text('{"step": 1}\n')
    assert prepare.main(["tiny.yaml", "train.zero.stage=2", "train.steps=20", "--run-dir", "runs/tiny"]) == 0
    assert "steps: 20" in (tmp_path / "runs/tiny/recipe.yaml").read_text()


def test_a_run_folder_that_is_a_file_is_refused(arguments: Namespace, tmp_path: Path) -> None:
    arguments.run_dir = "tiny.yaml"
    with pytest.raises(UserError, match=r"--run-dir tiny\.yaml is a file"):
        run_command(arguments)


def test_prepare_prints_the_next_attempt_or_the_mistake(
    arguments: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs/tiny/attempts/0041").mkdir(parents=True)
    assert prepare.main(["tiny.yaml", "--run-dir", "runs/tiny"]) == 0
    assert capsys.readouterr().out == "42\n"
    assert prepare.main(["tiny.yaml", "train.step=1", "--run-dir", "runs/tiny"]) == 2
    assert "train.step" in capsys.readouterr().err


def test_shards_without_an_index_get_one_before_the_ranks_start(arguments: Namespace, tmp_path: Path) -> None:
    for index in (tmp_path / "corpus").glob("*.json"):
        index.unlink()
    assert prepare.main(["tiny.yaml", "--run-dir", "runs/tiny"]) == 0
    assert (tmp_path / "corpus" / "train-000000.tar.idx.json").is_file()


def test_a_broken_corpus_is_found_before_the_ranks_start(arguments: Namespace, tmp_path: Path) -> None:
    shard = tmp_path / "corpus" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    with pytest.raises(CorpusError, match=r"train-000000\.tar"):
        run_command(arguments)
    assert not (tmp_path / "runs" / "tiny" / "attempts").exists()
