import json
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_support import VALID, write

from dstrain.errors import RecipeError
from dstrain.recipe.load import LoadedRecipe, load_recipe
from dstrain.recipe.schema import MaskedLmRecipe


def load(folder: Path, text: str, *overrides: str) -> LoadedRecipe:
    return load_recipe(write(folder, text), overrides, check_files=False)


def mistakes(folder: Path, text: str, *overrides: str, check_files: bool = False) -> list[str]:
    """Return the report's lines, the folder cut off."""
    path = write(folder, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, check_files=check_files)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def changed(old: str, new: str) -> str:
    assert old in VALID
    return VALID.replace(old, new)


def test_a_valid_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path, VALID).recipe
    assert isinstance(recipe, MaskedLmRecipe)
    assert recipe.optimizer.learning_rate == 3e-4
    assert recipe.data.masking.replace == (0.8, 0.1, 0.1)
    assert recipe.model.config is not None
    assert recipe.model.config.vocab_size == 30522


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    text = """\
name: my run
task: masked_lm
model:
  architecture: bertt
  config: {hidden_size: 100, num_attention_heads: 12}
  activation_checkpointing: yes
tokenizer: nowhere
learning_rate: 3
data:
  train: shards/*.tar
  sequence_length: "128"
  lanes: 64
  masking: {rate: 1.5, replace: [0.8, 0.1]}
  lanes: 3
train:
  global_batch_rows: 500
  micro_batch_rows: 1e3
  precision: no
  stepz: 10
  zero: {stage: 1, offload_params: cpu}
  clip_grad_norm: on
optimizer: {learning_rate: "3e-4", betas: [0.9, 1.0]}
schedule: {warmup_steps: 3, warmup_fraction: 0.1}
evaluate: {every_steps: 100}
checkpoint: {async: on}
log: 3
"""
    here = Path.cwd()
    assert mistakes(tmp_path, text, check_files=True) == [
        "recipe.yaml:1: name=my run must begin with a letter or digit and hold only letters, digits and . _ -; "
        "choose another name",
        "recipe.yaml:4: model.architecture=bertt is not one of bert, modernbert, roberta; use bert",
        "recipe.yaml:5: model.config.hidden_size=100 is not a multiple of model.config.num_attention_heads=12; "
        "use 96 or 108",
        "recipe.yaml:6: model.activation_checkpointing=yes must be true or false (no other word is a boolean here); "
        "write true",
        f"recipe.yaml:7: tokenizer=nowhere is not a folder (looked for {here}/nowhere); correct the path",
        "recipe.yaml:8: learning_rate is an unknown key; did you mean optimizer.learning_rate?",
        f"recipe.yaml:10: data.train=shards/*.tar matches nothing: there is no folder {here}/shards; correct the path",
        'recipe.yaml:11: data.sequence_length="128" is text and must be a whole number; remove the quotes: 128',
        "recipe.yaml:13: data.masking.rate=1.5 must be less than 1; change the value",
        "recipe.yaml:13: data.masking.replace=[0.8, 0.1] is too short; write at least 3 entries",
        "recipe.yaml:14: the key 'lanes' is already set on line 12; delete one of the two",
        "recipe.yaml:15: train.steps is missing: the run has no length; give exactly one of train.steps, train.tokens "
        "and train.epochs",
        "recipe.yaml:16: train.global_batch_rows=500 is not a multiple of data.lanes=64; use 448 or 512, "
        "or data.lanes=null",
        "recipe.yaml:17: train.micro_batch_rows=1e3 must be a whole number, without point or exponent; write 1000",
        "recipe.yaml:18: train.precision=no is not one of fp32, bf16; write one of them (a switch is never meant here)",
        "recipe.yaml:19: train.stepz is an unknown key; did you mean train.steps?",
        "recipe.yaml:20: train.zero.offload_params=cpu needs train.zero.stage=3, and it is 1; use stage 3, or none",
        "recipe.yaml:21: train.clip_grad_norm=on is text and must be a number; write digits, as in 3e-4",
        "recipe.yaml:22: optimizer.betas=[0.9, 1.0] must have both entries below 1; use [0.9, 0.999] or the like",
        'recipe.yaml:22: optimizer.learning_rate="3e-4" is text and must be a number; remove the quotes: 3e-4',
        "recipe.yaml:23: schedule.warmup_steps=3 is given beside schedule.warmup_fraction=0.1; keep one, set the other "
        "to null",
        "recipe.yaml:24: evaluate.every_steps=100 needs data.valid, which is not set; give a validation corpus, or set "
        "evaluate.every_steps to null",
        "recipe.yaml:25: checkpoint.async=on must be true or false (no other word is a boolean here); write true",
        "recipe.yaml:26: log=3 must be a section; write its keys below it, indented",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "steps: 100",
            "steps: 100\ncheckpoint: {every_steps: 30, keep_every: 100}",
            "checkpoint.keep_every=100 is not a multiple of checkpoint.every_steps=30; use 90 or 120",
        ),
        (
            "steps: 100",
            "steps: 100\ncheckpoint: {keep_best: {metric: valid_loss}}",
            "checkpoint.keep_best.metric=valid_loss needs evaluations; set evaluate.every_steps to 1000",
        ),
        (
            "lanes: 64",
            "lanes: 64\n  valid: v\nevaluate: {every_steps: 30}\n"
            "checkpoint: {every_steps: 100, keep_best: {metric: valid_loss}}",
            "not a multiple of evaluate.every_steps=30; set that to 25 or 50",
        ),
        (
            "lanes: 64",
            "lanes: 64\n  valid: v\nevaluate: {every_steps: 50}\ncheckpoint: {keep_best: {metric: f1}}",
            "checkpoint.keep_best.metric=f1 is nothing that evaluations of masked_lm measure; use one of ",
        ),
        (
            "lanes: 64",
            "lanes: 64\n  valid: v\nevaluate: {every_steps: 50}\nearly_stopping: {metric: valid_f1}",
            "early_stopping.metric=valid_f1 is nothing that evaluations of masked_lm measure; use one of ",
        ),
        (
            "lanes: 64",
            "lanes: 64\n  valid: v\nevaluate: {every_steps: 50}\nschedule: {name: plateau, plateau: {metric: f1}}",
            "schedule.plateau.metric=f1 is nothing that evaluations of masked_lm measure; use one of ",
        ),
        ("steps: 100", "steps: 100\n  tokens: 1000000", "one of 2 lengths given (train.steps, train.tokens)"),
        (
            "  config: {hidden_size: 128, num_attention_heads: 2}\n",
            "",
            "model.config and model.pretrained are both missing",
        ),
        ("  config:", "  pretrained: x\n  config:", "model.config is given beside model.pretrained"),
        ("sequence_length: 128", "sequence_length: 513", "max_position_embeddings=512; use at most 512"),
        ("lanes: 64", "masking: {replace: [0.8, 0.1, 0.2]}", "sums to 1.1 and must sum to 1"),
        (
            "steps: 100",
            "steps: 100\n  zero: {offload_optimizer: cpu}",
            "needs train.zero.stage of 1, 2 or 3, and it is 0",
        ),
        (
            "optimizer:",
            "schedule: {warmup_steps: 100}\noptimizer:",
            "never ends within the 100 steps that it is counted over; use at most 99",
        ),
        (
            "optimizer:",
            "schedule: {name: warmup_stable_decay, warmup_fraction: 0.5, decay_fraction: 0.75}\noptimizer:",
            "take more than the whole run; use at most 0.25",
        ),
        ("optimizer:", "schedule: {warmup_fraction: 1.0}\noptimizer:", "leaves no step after the warmup"),
        ("task: masked_lm", "task: masked_ml", "is not one of masked_lm, question_answering, "),
        ("task: masked_lm\n", "", "recipe.yaml:1: task is missing; add one of masked_lm, question_answering"),
        ("  architecture: bert\n", "", "model.architecture is missing; add one of bert, modernbert, roberta"),
        ("  train: shards\n", "", "recipe.yaml:7: data.train is missing; give a corpus, or several"),
        ("lanes: 64", "lanes: 0", "data.lanes=0 must be more than 0"),
        ("lanes: 64", "lanes: true", "data.lanes=true must be a whole number"),
        ("lanes: 64", "lanes: 6.5", "use 6 or 7"),
        ("lanes: 64", "lanes: {a: 1}", "must be a plain value, not a section"),
        ("name: example", "name: 123", 'must be text; write it in quotes: "123"'),
        ("learning_rate: 3e-4", "learning_rate: fast", "is text and must be a number"),
        ("learning_rate: 3e-4", "learning_rate: .inf", "is text and must be a number"),
        ("learning_rate: 3e-4", "learning_rate: 3e-4\n  betas: 0.9", "must be a list"),
        ("learning_rate: 3e-4", "learning_rate: 3e-4\n  betas: [0.9, 0.9, 0.9]", "has 3 entries; write 2"),
        ("lanes: 64", "masking: {rate: 0}", "must be more than 0"),
        ("steps: 100", "steps: 100\n  precision: fp16", "train.precision=fp16 is not one of fp32, bf16; use bf16"),
        ("steps: 100", "steps: 100\n  zero: {stage: '2'}", "is text here; remove the quotes: 2"),
        ("steps: 100", "steps: 100\n  zero: {stage: 4}", "train.zero.stage=4 is not one of 0, 1, 2, 3"),
        ("lanes: 64", "lanes: 64\n  async_: 1", "data.async_ is an unknown key"),
        ("steps: 100", "steps: 100\ncheckpoint: {async_: false}", "did you mean checkpoint.async?"),
        ("steps: 100", "steps: 100\nhang_seconds: 60", "hang_seconds is now called hang_timeout_seconds; write that"),
        ("3e-4", "3e-4\nschedule: {final_ratio: 0.1}", "schedule.final_ratio is now called schedule.min_lr_ratio"),
        ("steps: 100", "steps: 100\nxyzzy: 1", "xyzzy is an unknown key; a recipe has: name, task, model"),
        ("bert\n  config: {", "modernbert\n  config: {type_vocab_size: 1, ", "type_vocab_size is an unknown key"),
        ("{hidden_size: 128, num_attention_heads: 2}", "3", "model.config=3 must be a section"),
    ],
)
def test_one_mistake_is_one_clear_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    lines = mistakes(tmp_path, changed(old, new))
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_roberta_leaves_two_positions_unused(tmp_path: Path) -> None:
    text = changed("architecture: bert", "architecture: roberta").replace("length: 128", "length: 513")
    assert "=514 less the 2 that roberta leaves unused; use at most 512" in mistakes(tmp_path, text)[0]


def test_rotary_heads_are_even(tmp_path: Path) -> None:
    text = changed("architecture: bert", "architecture: modernbert").replace("hidden_size: 128", "hidden_size: 130")
    assert "heads of odd size, and rotary positions turn pairs; use 128 or 132" in mistakes(tmp_path, text)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.architecture=roberta", "data.pairs={objective: next_sentence, tokens: 64}"],
            "data.pairs.objective=next_sentence is not offered for roberta, which has no head for pairs; use none, or "
            "model.architecture: bert",
        ),
        (
            ["model.architecture=modernbert", "data.pairs.objective=sentence_order"],
            "data.pairs.objective=sentence_order is not offered for modernbert, which has no head for pairs",
        ),
        (
            ["data.pairs.objective=sentence_order", "model.config.type_vocab_size=1"],
            "data.pairs.objective=sentence_order needs a token type for each text of a pair, and "
            "model.config.type_vocab_size=1; use none, or a model with 2",
        ),
        (
            ["data.pairs.objective=sentence_order", "model.lora.rank=2"],
            "data.pairs.objective=sentence_order trains the embeddings of token types, which model.lora freezes; use "
            "none, or delete model.lora",
        ),
        (
            ["data.pairs={objective: next_sentence, tokens: 65}"],
            "data.pairs.tokens=65 is more than half of data.sequence_length=128; use at most 64, so that a row has "
            "another pair to exchange with",
        ),
        (
            ["data.pairs={objective: sentence_order, tokens: 129}"],
            "data.pairs.tokens=129 is more than data.sequence_length=128; use at most 128",
        ),
        (
            ["data.pairs={objective: sentence_order, tokens: 31}"],
            "data.pairs.tokens=31 would cut documents in parts of less than 16 tokens; use at least 32",
        ),
        (
            ["data.pairs={objective: next_sentence, tokens: 32}", "data.sequence_length=63"],
            "data.pairs.tokens=32 has no value that fits data.sequence_length=63; raise that, or set "
            "data.pairs.objective to none",
        ),
    ],
)
def test_what_pairs_do_not_go_with(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = write(tmp_path, VALID)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, check_files=False)
    assert len(str(caught.value).splitlines()) == 1
    assert message in str(caught.value)


def test_a_pretrained_model_of_one_token_type_has_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "type_vocab_size": 1}')
    path = write(tmp_path, VALID)
    overrides = ["model.config=null", f"model.pretrained={tmp_path}", "data.pairs={objective: sentence_order}"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert "and the pretrained model's type_vocab_size=1; use none, or a model with 2" in str(caught.value)


def test_a_broken_default_names_itself_and_the_place_of_the_other_key(tmp_path: Path) -> None:
    assert mistakes(tmp_path, changed("hidden_size: 128, ", "").replace("heads: 2", "heads: 7")) == [
        "recipe.yaml:5: model.config.hidden_size=768 (the default) is not a multiple of "
        "model.config.num_attention_heads=7; use 763 or 770"
    ]


# ---------------------------------------------------------------- base


def test_a_base_is_merged_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, changed("hidden_size: 128", "hidden_size: 64"), "base.yaml")
    loaded = load(tmp_path, "base: base.yaml\ntrain: {steps: null, tokens: 1000}\noptimizer: {betas: [0.5, 0.6]}\n")
    recipe = loaded.recipe
    assert (recipe.train.steps, recipe.train.tokens, recipe.train.global_batch_rows) == (None, 1000, 512)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.betas) == (3e-4, (0.5, 0.6))
    assert str(loaded.origins["train.tokens"]) == f"{tmp_path}/recipe.yaml:2"
    assert str(loaded.origins["optimizer.learning_rate"]) == f"{tmp_path}/base.yaml:16"


def test_null_unsets_a_key_or_is_its_value(tmp_path: Path) -> None:
    write(tmp_path, VALID + "on_nan: skip\n", "base.yaml")
    loaded = load(tmp_path, "base: base.yaml\non_nan: null\ndata: {lanes: null}\ntrain: {clip_grad_norm: null}\n")
    assert isinstance(loaded.recipe, MaskedLmRecipe)
    assert loaded.recipe.on_nan == "stop"
    assert loaded.recipe.lanes == 128  # a quarter of the batch
    assert loaded.recipe.train.clip_grad_norm is None
    assert "on_nan" not in loaded.origins
    assert "train.clip_grad_norm" in loaded.origins


def test_mistakes_of_base_and_recipe_come_together(tmp_path: Path) -> None:
    write(tmp_path, changed("lanes: 64", "lanes: sixty-four"), "base.yaml")
    assert mistakes(tmp_path, "base: base.yaml\nname: a/b\n") == [
        "recipe.yaml:2: name=a/b must begin with a letter or digit and hold only letters, digits and . _ -; "
        "choose another name",
        "base.yaml:10: data.lanes=sixty-four is text and must be a whole number; write digits, as in 1000",
    ]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("recipe.yaml", "is this file itself; name another recipe"),
        ("nowhere.yaml", "does not exist"),
        ("[a.yaml, b.yaml]", "must be the path of one recipe"),
    ],
)
def test_a_base_that_cannot_be(tmp_path: Path, base: str, message: str) -> None:
    assert message in mistakes(tmp_path, f"base: {base}\n" + VALID)[0]


def test_a_base_has_no_base(tmp_path: Path) -> None:
    write(tmp_path, "base: recipe.yaml\n" + VALID, "base.yaml")
    lines = mistakes(tmp_path, "base: base.yaml\n")
    assert len(lines) == 1
    assert lines[0].startswith("base.yaml:1: base=recipe.yaml: a recipe that is inherited from")


# ---------------------------------------------------------------- command line


def test_overrides_follow_the_rules_of_yaml(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        VALID,
        "train.zero.stage=2",
        "optimizer.betas=[0.8, 0.9]",
        "optimizer.learning_rate=1e-5",
        "data={lanes: 32}",
    )
    assert isinstance(loaded.recipe, MaskedLmRecipe)
    assert loaded.recipe.train.zero.stage == 2
    assert loaded.recipe.optimizer.betas == (0.8, 0.9)
    assert (loaded.recipe.data.lanes, loaded.recipe.data.sequence_length) == (32, 128)
    assert str(loaded.origins["train.zero.stage"]) == "command line"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "'train.steps' is not an override; write key=value"),
        ("train..steps=1", "is not an override"),
        ("train.steps=", "the value is empty; write train.steps=null to un-set it"),
        ("train.step=5", "train.step is an unknown key; did you mean train.steps?"),
        ("train.steps='5'", 'train.steps="5" is text and must be a whole number; remove the quotes: 5'),
        ("train.compile=yes", "write true"),
        ("train.steps=[1", "train.steps=[1: not valid YAML"),
        ("base=x.yaml", "base belongs in the file"),
        ("data.lanes=48", "is not a multiple of data.lanes=48; use 480 or 528"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    lines = mistakes(tmp_path, VALID, override)
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_an_override_given_twice_is_refused(tmp_path: Path) -> None:
    assert mistakes(tmp_path, VALID, "train.steps=1", "train.steps=2") == [
        "command line: train.steps=2: train.steps is given twice; keep one of them"
    ]


# ---------------------------------------------------------------- files


def make_files(folder: Path, vocabulary: int = 1000) -> str:
    """Create the files that the recipe names below `folder`; return the recipe's text."""
    (folder / "shards").mkdir()
    (folder / "tok").mkdir()
    tokenizer = {"model": {"vocab": {f"t{i}": i for i in range(vocabulary)}}, "added_tokens": [{"id": 3}]}
    (folder / "tok" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return VALID.replace("tokenizer: tok", f"tokenizer: {folder}/tok").replace(
        "train: shards", f"train: {folder}/shards"
    )


def test_files_that_are_there(tmp_path: Path) -> None:
    load_recipe(write(tmp_path, make_files(tmp_path)))


def test_a_vocabulary_too_small_for_the_tokenizer(tmp_path: Path) -> None:
    text = make_files(tmp_path).replace("hidden_size: 128", "vocab_size: 999, hidden_size: 128")
    assert mistakes(tmp_path, text, check_files=True) == [
        "recipe.yaml:5: model.config.vocab_size=999 is smaller than the tokenizer's 1000 tokens; use at least 1000 "
        "(1024 is a multiple of 64, which is faster)"
    ]


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    text = make_files(tmp_path)
    (tmp_path / "tok" / "tokenizer.json").write_text("{")
    assert "has no readable tokenizer.json" in mistakes(tmp_path, text, check_files=True)[0]


def test_patterns_match_files(tmp_path: Path) -> None:
    text = make_files(tmp_path)
    (tmp_path / "shards" / "a-0.tar").touch()
    for pattern in ("*.tar", "a-{0..3}.tar"):
        load_recipe(write(tmp_path, text), [f"data.train={tmp_path}/shards/{pattern}"])
    lines = mistakes(tmp_path, text, f"data.train={tmp_path}/shards/b*.tar", check_files=True)
    assert "matches no file in" in lines[0]
    lines = mistakes(tmp_path, text, "data.train=s3://bucket/shards", check_files=True)
    assert "is a remote location" in lines[0]


def test_a_pretrained_model_of_another_kind(tmp_path: Path) -> None:
    text = make_files(tmp_path).replace(
        "config: {hidden_size: 128, num_attention_heads: 2}", f"pretrained: {tmp_path}/m"
    )
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "roberta", "max_position_embeddings": 66}')
    assert mistakes(tmp_path, text, check_files=True) == [
        "recipe.yaml:4: model.architecture=bert but model.pretrained holds a roberta model; use roberta"
    ]
    lines = mistakes(tmp_path, text, "model.architecture=roberta", check_files=True)
    assert (
        "the pretrained model's max_position_embeddings=66 less the 2 that roberta leaves unused; use at most 64"
        in lines[0]
    )


def test_paths_are_absolute_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    path = write(tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load_recipe(path, ["tokenizer=~/tok", "data.valid=../v-{00..03}.tar"], check_files=False).recipe
    assert recipe.tokenizer == "/home/someone/tok"
    assert recipe.data.train == f"{tmp_path}/shards"
    assert recipe.data.valid == f"{tmp_path.parent}/v-{{00..03}}.tar"


def test_validation_imports_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from dstrain.recipe.load import load_recipe
from dstrain.plan import deepspeed_config
deepspeed_config(load_recipe({write(tmp_path)!r}, check_files=False).recipe, 2)
heavy = {{"torch", "transformers", "deepspeed", "numpy", "webdataset"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
