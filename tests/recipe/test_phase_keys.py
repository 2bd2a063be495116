"""Sources and phases of a recipe: what is read, and what is refused with which words."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_support import VALID, write

from dstrain.data.line import FEWEST_WINDOW_BLOCKS, WINDOW_BLOCKS
from dstrain.errors import RecipeError
from dstrain.recipe.data import MaskedLmData
from dstrain.recipe.files import missing_files
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import MaskedLmRecipe, default_lanes

ROOT = Path(__file__).parents[2]
PHASED = """\
name: example
task: masked_lm
model:
  architecture: modernbert
  config: {hidden_size: 128, num_attention_heads: 2, max_position_embeddings: 256}
tokenizer: tok
data:
  sources:
    web: {shards: web, weight: 3, valid: held-out}
    code: {shards: "code-{0..3}.tar", when_exhausted: drop}
  sequence_length: 128
train:
  global_batch_rows: 96
  micro_batch_rows: 5
optimizer:
  learning_rate: 3e-4
schedule: {warmup_steps: 50}
phases:
  - {name: first, steps: 40}
  - name: second
    tokens: 600_000
    data: {sequence_length: 256, masking: {rate: {from: 0.3, to: 0.15}}, sources: {code: 1}}
    train: {global_batch_rows: 64, micro_batch_rows: 3}
    optimizer: {learning_rate: 1e-4}
    schedule: {name: one_minus_sqrt, warmup_steps: 3}
    model: {global_rope_theta: 160_000}
"""


def load(folder: Path, text: str, *overrides: str) -> MaskedLmRecipe:
    recipe = load_recipe(write(folder, text), overrides, check_files=False).recipe
    assert isinstance(recipe, MaskedLmRecipe)
    return recipe


def mistakes(folder: Path, *overrides: str, text: str = PHASED) -> list[str]:
    path = write(folder, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, check_files=False)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_sources_and_phases_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load(tmp_path, PHASED)
    web, code = recipe.data.training_sources.values()
    assert (web.shards, web.weight, web.valid) == (f"{tmp_path}/web", 3.0, f"{tmp_path}/held-out")
    assert (code.shards, code.weight, code.when_exhausted) == (f"{tmp_path}/code-{{0..3}}.tar", 1.0, "drop")
    first, second = recipe.phases
    assert (first.steps, first.data.sequence_length, first.schedule) == (40, None, None)
    assert second.data.sources == {"code": 1.0}
    assert second.schedule is not None and second.schedule.name == "one_minus_sqrt"
    assert recipe.lanes == 32
    assert load(tmp_path, PHASED, "train.global_batch_rows=80", "phases.0.train.global_batch_rows=64").lanes == 16


def test_data_train_is_one_source(tmp_path: Path) -> None:
    sources = load(tmp_path, VALID).data.training_sources
    assert [(name, source.shards) for name, source in sources.items()] == [("train", f"{Path.cwd()}/shards")]


def test_values_of_sources_and_phases_are_overridden_one_by_one(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        PHASED,
        "data.sources.code.weight=0.2",
        "data.sources.books={shards: books}",
        "phases.1.tokens=null",
        "phases.1.steps=17",
        "phases.0.data.masking.rate=0.4",
    )
    assert recipe.data.sources is not None
    assert {name: source.weight for name, source in recipe.data.sources.items()} == {"web": 3, "code": 0.2, "books": 1}
    assert [phase.steps for phase in recipe.phases] == [40, 17]
    assert recipe.phases[0].data.masking.rate == 0.4


def test_a_recipe_replaces_the_phases_of_its_base_and_keeps_its_sources(tmp_path: Path) -> None:
    write(tmp_path, PHASED, "base.yaml")
    text = "base: base.yaml\ndata: {sources: {code: null, books: {shards: books}}}\nphases: [{steps: 60}]\n"
    recipe = load(tmp_path, text)
    assert recipe.data.sources is not None and list(recipe.data.sources) == ["web", "books"]
    assert [phase.steps for phase in recipe.phases] == [60]
    without = load(tmp_path, "base: base.yaml\nphases: []\ntrain: {steps: 60}\n")
    assert (without.phases, without.train.steps) == ((), 60)


def test_every_source_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    missing = missing_files(load(tmp_path, PHASED))
    assert [sentence.split("=")[0] for sentence in missing] == [
        "tokenizer",
        "data.sources.web.shards",
        "data.sources.web.valid",
    ]
    with pytest.raises(RecipeError, match=r"recipe\.yaml:9: data\.sources\.web\.valid=held-out does not exist"):
        load_recipe("recipe.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=x"], "data.train=x is given beside data.sources; set it to null and name the corpus in"),
        (
            ["data.sources=null", "phases.1.data.sources=null"],
            "data.train is missing; give a corpus, or several by name in data.sources",
        ),
        (
            ["data.sources={web: null, code: null}", "phases.1.data.sources=null"],
            "data.sources names no source; write NAME: {shards: …, weight: …} below it",
        ),
        (["data.sources.code.weight=-1"], "data.sources.code.weight=-1 must be at least 0"),
        (["data.sources.code.shards=null"], "data.sources.code.shards is missing; add it"),
        (
            ["data.sources.code.weights=1"],
            "data.sources.code.weights is an unknown key; did you mean data.sources.code.weight?",
        ),
        (["data.sources.code=1"], "data.sources.code=1 must be a section; write its keys below it, indented"),
        (
            ["data.sources={a b: {shards: x}}", "phases.1.data.sources=null"],
            "data.sources.a b must be named by letters",
        ),
        (
            ["data.sources.code.when_exhausted=ends"],
            "data.sources.code.when_exhausted=ends is not one of repeat, stop, drop",
        ),
        (
            ["phases=[]", "train.steps=99", "data.sources.web.weight=0", "data.sources.code.weight=0"],
            "weights of 0 only",
        ),
        (["phases=[]", "train.epochs=2"], "train.epochs=2 is of which of the 2 data.sources? Each has its own epochs;"),
        (["evaluate.every_steps=9", "data.sources.web.valid=null"], "evaluate.every_steps=9 needs data.valid"),
        (
            ["evaluate.every_steps=10", "checkpoint.keep_best.metric=loss.code"],
            "checkpoint.keep_best.metric=loss.code is of a source 'code' without held-out data; set "
            "data.sources.code.valid; sources that have it: web",
        ),
        (
            ["train.steps=9"],
            "train.steps=9 is given beside phases, whose sum is the run's length; set it to null, or phases to []",
        ),
        (["train.tokens=9"], "train.tokens=9 is given beside phases"),
        (["phases=[]"], "train.steps is missing: the run has no length; give exactly one of train.steps,"),
        (["phases.0.tokens=9"], "phases.0.steps=40 is given beside phases.0.tokens=9; keep one of them"),
        (["phases.0.steps=null"], "phases.0.steps and phases.0.tokens are both missing; give one of them"),
        (["phases.0.steps=0"], "phases.0.steps=0 must be more than 0"),
        (["phases.0.stepz=1"], "phases.0.stepz is an unknown key; did you mean phases.0.steps?"),
        (
            ["phases.0.learning_rate=1"],
            "phases.0.learning_rate is an unknown key; did you mean phases.0.optimizer.learning_rate?",
        ),
        (
            ["phases.2.steps=1"],
            "phases.2.steps=1: phases is a list, and its entries are numbered from 0 to 1; use one of",
        ),
        (["phases.0.name=second"], "phases.1.name=second is the name of phases.0 too; give it another name"),
        (["phases.0.data.sequence_length=257"], "phases.0.data.sequence_length=257 is longer than"),
        (["data.lanes=48"], "phases.1.train.global_batch_rows=64 is not a multiple of data.lanes=48; use 48 or 96, or"),
        (
            ["phases.1.data.sources={wed: 1}"],
            "phases.1.data.sources names wed, and data.sources has web, code; use one",
        ),
        (["phases.1.data.sources.code=0"], "phases.1.data.sources has no weight above 0; give one of them a weight"),
        (["phases.1.data.sources={web: many}"], "phases.1.data.sources.web=many is text and must be a number"),
        (
            ["phases.1.data.masking.rate={from: 1.5, to: 0.1}"],
            "phases.1.data.masking.rate.from=1.5 must be less than 1",
        ),
        (["phases.0.data.masking.rate={from: 0.1}"], "phases.0.data.masking.rate.to is missing; add it"),
        (
            ["data.masking.rate=[0.1, 0.2]"],
            "data.masking.rate=[0.1, 0.2] must be a number; write one",
        ),
        (["phases.1.schedule.warmup_steps=37"], "phases.1.schedule.warmup_steps=37 never ends within the 37 steps"),
        (
            ["schedule.warmup_steps=77"],
            "schedule.warmup_steps=77 never ends within the 77 steps that it is counted over",
        ),
        (["phases.1.schedule.name=plateau"], "phases.1.schedule.name=plateau is not one of linear, cosine,"),
        (
            ["phases.1.schedule.warmup_fraction=0.1"],
            "phases.1.schedule.warmup_steps=3 is given beside phases.1.schedule.",
        ),
        (["model.architecture=bert"], "phases.1.model changes rotary positions, and bert has none; delete it, or use"),
        (["phases=3"], "phases=3 must be a list; write it as [a, b, …]"),
    ],
)
def test_one_mistake_is_one_clear_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    lines = mistakes(tmp_path, *overrides)
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_mistakes_of_a_phase_name_its_line(tmp_path: Path) -> None:
    text = PHASED.replace("sequence_length: 256", "sequence_length: 300")
    assert mistakes(tmp_path, text=text) == [
        "recipe.yaml:22: phases.1.data.sequence_length=300 is longer than model.config.max_position_embeddings=256; "
        "use at most 256, or raise max_position_embeddings"
    ]


def test_positions_that_a_phase_adds_are_there_from_then_on(tmp_path: Path) -> None:
    longer = ["phases.1.data.sequence_length=512", "phases.1.tokens=null", "phases.1.steps=50"]
    added = "model: {max_position_embeddings: 512}"
    load(tmp_path, PHASED, *longer, "phases.0.model.max_position_embeddings=512")
    load(tmp_path, PHASED.replace("model: {global_rope_theta: 160_000}", added), *longer)
    (line,) = mistakes(tmp_path, *longer, "phases.1.model.max_position_embeddings=511")
    assert "phases.1.data.sequence_length=512 is longer than phases.1.model.max_position_embeddings=511" in line


def test_pairs_have_to_fit_the_rows_of_every_phase(tmp_path: Path) -> None:
    overrides = [
        "data.pairs={objective: sentence_order, tokens: 128}",
        "phases=[{steps: 3, data: {sequence_length: 64}}]",
    ]
    (line,) = mistakes(tmp_path, *overrides, "train.steps=null", text=VALID)
    assert "data.pairs.tokens=128 is more than phases.0.data.sequence_length=64; use at most 64" in line


def test_a_pretrained_model_has_positions_for_every_phase(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 130}')
    path = write(tmp_path, VALID)
    phases = "phases=[{steps: 3}, {steps: 3, data: {sequence_length: 256}}]"
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["model.config=null", f"model.pretrained={tmp_path}", "train.steps=null", phases])
    assert "phases.1.data.sequence_length=256 is longer than the pretrained model's max_position_embeddings=130" in str(
        caught.value
    )


def test_the_guides_example_is_a_recipe(tmp_path: Path) -> None:
    guide = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    (example,) = [part.split("```")[0] for part in guide.split("```yaml\n")[1:] if "phases:" in part.split("```")[0]]
    recipe = load(tmp_path, example.replace("tiny-modernbert.yaml", f"{ROOT}/recipes/debug/tiny-modernbert.yaml"))
    assert [phase.name for phase in recipe.phases] == ["warm-up", "main", "long"]
    assert recipe.lanes == 8


def test_the_reference_names_the_default_window() -> None:
    assert MaskedLmData.__doc__ is not None
    words = " ".join(MaskedLmData.__doc__.split())
    assert f"as many as make {WINDOW_BLOCKS:,} over all lanes, and at least {FEWEST_WINDOW_BLOCKS}" in words


def test_other_tasks_have_no_phases_and_no_sources(tmp_path: Path) -> None:
    path = ROOT / "recipes/finetune/mr.yaml"
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["phases=[{steps: 3}]", "data.sources={a: {shards: x}}"], check_files=False)
    assert sorted(line.split(" is an ")[0].split(": ")[1] for line in str(caught.value).splitlines()) == [
        "data.sources",
        "phases",
    ]


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=4))
def test_default_lanes_divide_every_batch_and_leave_a_lane_several_rows(batches: list[int]) -> None:
    lanes = default_lanes(batches)
    assert all(rows % lanes == 0 for rows in batches)
    most = min(max(math.gcd(*batches) // 4, 64), 1024)
    assert lanes <= most
    assert not any(all(rows % more == 0 for rows in batches) for more in range(lanes + 1, most + 1))


def test_small_batches_have_a_lane_for_each_row() -> None:
    assert [default_lanes([rows]) for rows in (1, 24, 64, 128, 256, 512, 4096, 8192)] == [
        *(1, 24, 64, 64, 64, 128, 1024, 1024)
    ]
