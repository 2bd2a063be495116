"""Whether a run's folder takes a recipe: by what lies where it points to, and by what has been trained on."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from dstrain.checkpoint.manifest import MANIFEST, Manifest, _written, checkpoint_folder
from dstrain.data.writer import write_text_shards
from dstrain.errors import CheckpointError, UserError
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import MaskedLmRecipe
from dstrain.rundir.prepare import check_recipe, identity_of, main, write_recipe

RECIPE = """\
name: tiny
task: masked_lm
model: {architecture: bert, config: {vocab_size: 256, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
        intermediate_size: 64, max_position_embeddings: 64}}
tokenizer: tokenizer
data:
  sources:
    web: {shards: web}
    code: {shards: code}
  sequence_length: 32
phases:
  - {name: short, steps: 10, data: {sources: {web: 1}}}
  - {name: long, steps: 10, train: {global_batch_rows: 24}, data: {sequence_length: 64}}
train: {global_batch_rows: 8, micro_batch_rows: 2, precision: fp32}
optimizer: {learning_rate: 1e-3}
"""


@dataclass(frozen=True)
class Project:
    """A folder with a recipe, its data, and a run that has come to some step."""

    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs/tiny"

    def recipe(self, *overrides: str) -> MaskedLmRecipe:
        recipe = load_recipe(self.folder / "tiny.yaml", overrides).recipe
        assert isinstance(recipe, MaskedLmRecipe)
        return recipe

    def edit(self, old: str, new: str) -> None:
        text = (self.folder / "tiny.yaml").read_text()
        assert old in text
        (self.folder / "tiny.yaml").write_text(text.replace(old, new))

    def save(self, step: int) -> Path:
        """As a run would that has done `step` steps of the recipe."""
        write_recipe(self.run_dir, self.recipe())
        identity = json.loads(json.dumps(identity_of(self.recipe())))
        folder = checkpoint_folder(self.run_dir, step)
        folder.mkdir(parents=True)
        manifest = Manifest(step, step, step, 0, 1e-3, {}, identity, {}, {}, {}, {})
        (folder / MANIFEST).write_text(manifest.text())
        return folder

    def refused(self, *overrides: str, allow: str | None = None) -> list[str]:
        """The differences that a resume is refused for."""
        try:
            check_recipe(self.run_dir, self.recipe(*overrides), allow)
        except UserError as error:
            head, *differences, remedy = str(error).splitlines()
            assert head.startswith(f"{self.run_dir} holds a run of another recipe, or of other data")
            assert ("--allow data-change" in remedy) == (allow is None and "model" not in "".join(differences))
            return [difference.strip() for difference in differences]
        return []


@pytest.fixture
def project(tmp_path: Path, tiny_tokenizer: Path, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Project:
    folder = tmp_path / "project"
    shutil.copytree(tiny_tokenizer, folder / "tokenizer")
    write_text_shards(folder / "web", tiny_texts[:60], shard_bytes=1 << 13)
    write_text_shards(folder / "code", tiny_texts[60:100])
    (folder / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(folder)  # which its paths are relative to
    return Project(folder)


def test_a_truncated_shard_is_found_before_a_run_is_started(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [str(project.folder / "tiny.yaml"), "--run-dir", str(project.run_dir)]
    assert main(start) == 0
    shard = sorted((project.folder / "web").glob("*.tar"))[-1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1024])
    assert main(start) == 2
    error = capsys.readouterr().err
    assert f"/{shard.name}: {len(content) - 1024} bytes, but its index expects {len(content)}" in error
    assert "dstrain shards check " in error


# ------------------------------------------------------------------ paths and names do not count


def test_a_moved_project_goes_on_without_a_flag(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.save(12)
    moved = Project(tmp_path / "elsewhere" / "renamed")
    moved.folder.parent.mkdir()
    project.folder.rename(moved.folder)
    monkeypatch.chdir(moved.folder)
    assert moved.refused() == []
    write_recipe(moved.run_dir, moved.recipe())
    assert str(moved.folder / "web") in (moved.run_dir / "recipe.yaml").read_text()


def test_renamed_folders_shards_sources_and_tokenizers_are_the_same(project: Project, tmp_path: Path) -> None:
    project.save(12)
    (project.folder / "web").rename(tmp_path / "mount")
    for number, shard in enumerate(sorted((tmp_path / "mount").glob("*.tar"))):
        shard.rename(shard.with_name(f"part-{number:03d}.tar"))
    for index in (tmp_path / "mount").glob("*.json"):
        index.unlink()
    (project.folder / "tokenizer").rename(tmp_path / "vocabulary")
    project.edit("web: {shards: web}", f"crawl: {{shards: {tmp_path / 'mount'}}}")
    project.edit("{web: 1}", "{crawl: 1}")
    assert project.refused(f"tokenizer={tmp_path / 'vocabulary'}") == []


def test_another_pretrained_folder_is_no_other_recipe_since_weights_are_the_checkpoints(project: Project) -> None:
    for name in ("first", "second"):
        shutil.copytree(project.folder / "tokenizer", project.folder / name)
        (project.folder / name / "config.json").write_text('{"model_type": "bert", "vocab_size": 256}')
    config = RECIPE[RECIPE.index("config: {") : RECIPE.index("}}") + 1]
    project.edit(config, "pretrained: first")
    project.save(12)
    assert project.refused("model.pretrained=second") == []
    assert "model.config.hidden_size: null → 24" in project.refused(
        "model.pretrained=null", "model.config.hidden_size=24", "model.config.vocab_size=256"
    )


# ------------------------------------------------------------------ what changed


def test_shards_that_changed_are_refused_and_named_by_phase_and_source(project: Project, tiny_texts: list[str]) -> None:
    project.save(12)
    shutil.rmtree(project.folder / "web")
    write_text_shards(project.folder / "web", tiny_texts[1:60])
    differences = project.refused()
    assert [difference.split(": ")[:2] for difference in differences] == [
        ["phase 1 (short)", "data.sources.web"],
        ["phase 2 (long)", "data.sources.web"],
    ]
    assert project.refused(allow="data-change") == []


@pytest.mark.slow
def test_a_phase_that_has_not_begun_may_change_and_one_that_has_may_not(
    project: Project, tiny_texts: list[str]
) -> None:
    folder = project.save(10)
    write_text_shards(project.folder / "books", tiny_texts[100:120])
    project.edit("    code: {shards: code}\n", "    code: {shards: code}\n    books: {shards: books, weight: 0.5}\n")
    assert project.refused() == [], "a source that comes with the second phase"
    project.edit("sequence_length: 64}", "sequence_length: 48}")
    assert project.refused() == []
    shutil.rmtree(folder)
    project.edit("sequence_length: 48}", "sequence_length: 64}")
    project.save(11)
    project.edit("sequence_length: 64}", "sequence_length: 48, sources: {web: 3, code: 1}}")
    assert project.refused() == [
        "phase 2 (long): data.sequence_length: 64 → 48",
        "phase 2 (long): data.sources.web.weight: 0.4 → 0.75",
        "phase 2 (long): data.sources.code.weight: 0.4 → 0.25",
        "phase 2 (long): data.sources.books.weight: 0.2 → 0",
    ]


def test_a_default_that_follows_the_batches_is_refused_with_what_to_write(project: Project) -> None:
    project.save(5)
    project.edit("global_batch_rows: 24", "global_batch_rows: 20")
    assert project.refused() == ["data.lanes: 8 → 4 (write data.lanes: 8)"]
    assert project.refused("data.lanes=4") == ["data.lanes: 8 → 4 (write data.lanes: 8)"]


def test_what_is_of_the_model_is_no_matter_of_data(project: Project) -> None:
    project.save(5)
    assert project.refused("data.seed=1", "model.config.hidden_size=64") == [
        "model.config.hidden_size: 32 → 64",
        "data.seed: 0 → 1",
    ]
    assert project.refused("data.seed=1", "model.config.hidden_size=64", allow="data-change") == [
        "model.config.hidden_size: 32 → 64"
    ]


# ------------------------------------------------------------------ checkpoints


def test_a_damaged_checkpoint_is_passed_over_and_an_older_law_is_not(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.save(5)
    newest = project.save(6)
    (newest / MANIFEST).write_text("{")
    assert project.refused() == []
    assert project.refused("data.seed=1") == ["data.seed: 0 → 1"]
    other = asdict(Manifest.read(checkpoint_folder(project.run_dir, 5))) | {"format": 3}
    (newest / MANIFEST).write_text(_written(other))
    with pytest.raises(CheckpointError, match="is of another law of the data"):
        check_recipe(project.run_dir, project.recipe())
    assert main([str(project.folder / "tiny.yaml"), "--run-dir", str(project.run_dir)]) == 2
    error = capsys.readouterr().err
    assert "start anew with another --run-dir, or use the version of dstrain that wrote it" in error
    assert error.count("\n") == 1


def test_without_a_checkpoint_nothing_is_fixed_but_the_model(project: Project) -> None:
    write_recipe(project.run_dir, project.recipe())
    (project.run_dir / "ledger.jsonl").write_text('{"step": 1}\n')
    assert project.refused("data.seed=1") == []
    assert project.refused("model.config.hidden_size=64") == ["model.config.hidden_size: 32 → 64"]
