"""Models that write text, trained for real: planned, resumed and exported exactly, on any ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled import write_examples
from ranks import run_ranks
from test_heads import answered_in_threads, live, logged, measured
from training import model_weights, train_steps, training

from dstrain.cli import main
from dstrain.data.ledger import compare_ledgers
from dstrain.data.tokens import load_document_tokenizer
from dstrain.errors import RecipeError, UserError
from dstrain.model.text_to_text import build_text_to_text
from dstrain.plan.text import make_plan
from dstrain.predict.onnx import export_onnx
from dstrain.recipe.definition import definition_of
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import SequenceToSequenceRecipe
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.sequence_to_sequence import NOTHING, SequenceToSequence, Writer

pytestmark = pytest.mark.ranks

RECIPE = """
name: tiny
model: {{architecture: {architecture}, {model}}}
tokenizer: {folder}/tokenizer
data: {{train: "{folder}/train.{{en,de}}", valid: "{folder}/valid.{{en,de}}", source_field: en, target_field: de,
  sequence_length: 16, target_length: 12, seed: 3}}
train: {{global_batch_rows: 4, micro_batch_rows: 2, steps: 6, precision: fp32}}
optimizer: {{learning_rate: 1e-2}}
schedule: {{name: constant}}
checkpoint: {{every_steps: 3}}
log: {{tensorboard: false, every_steps: 1}}
loss: {{label_smoothing: 0.1}}
decoding: {{num_beams: 2, no_repeat_ngram_size: 3, min_new_tokens: 3}}
task: sequence_to_sequence
"""
STACKS = """config: {vocab_size: 128, d_model: 16, max_position_embeddings: 40, encoder_layers: 1, decoder_layers: 2,
  encoder_attention_heads: 2, decoder_attention_heads: 4, encoder_ffn_dim: 32, decoder_ffn_dim: 24}"""
BERT = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "t5": ("t5", "config: {vocab_size: 128, d_model: 16, d_kv: 6, d_ff: 32, num_layers: 2, num_heads: 2}"),
    "bart": ("bart", STACKS),
    "marian": ("marian", STACKS),
    "two-berts": (
        "encoder-decoder",
        f"decoder_layers: 1, config: {json.dumps(BERT | {'max_position_embeddings': 40})}",
    ),
    "warm-bert": ("encoder-decoder", "decoder_layers: 1, pretrained: {folder}/bert"),
    "warm-roberta": ("encoder-decoder", "pretrained: {folder}/roberta"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parallel files, a tokenizer, and encoders to start from."""
    root = write_examples(tmp_path_factory.mktemp("pairs"))
    words = ["red", "green", "blue", "apple", "leaf", "sky", "of", "the"]
    for split, lines in (("train", 10), ("valid", 7)):
        texts = [" ".join(words[(n * k + 1) % 8] for k in range(1, 3 + 2 * n % 15)) for n in range(lines)]
        (root / f"{split}.en").write_text("".join(f"{text}\n" for text in texts))
        (root / f"{split}.de").write_text("".join(f"{' '.join(text.split()[::-1][:9])}\n" for text in texts))
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(1)
    BertModel(BertConfig(**BERT, max_position_embeddings=40)).save_pretrained(root / "bert")
    RobertaForMaskedLM(
        RobertaConfig(
            **BERT, max_position_embeddings=42, type_vocab_size=1, pad_token_id=0, bos_token_id=2, eos_token_id=3
        )
    ).save_pretrained(root / "roberta")
    return root


def write_recipe(folder: Path, name: str) -> Path:
    architecture, model = MODELS[name]
    path = folder / f"{name}.yaml"
    path.write_text(
        RECIPE.format(folder=folder, architecture=architecture, model=model.replace("{folder}", str(folder)))
    )
    return path


def whole_and_in_parts(rank: int, world: int, recipe_file: Path, folder: Path, name: str) -> tuple[Any, Any]:
    (whole,) = live(rank, world, recipe_file, folder / f"{name}-whole", [6], [])
    *_, resumed = live(rank, world, recipe_file, folder / f"{name}-parts", [3, 6], [])
    return whole, resumed


@pytest.mark.parametrize("name", [name for name in MODELS if name != "two-berts"])  # those two are in "warm-bert"
def test_a_model_is_planned_resumed_and_exported_exactly(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(folder, name)
    ((whole, resumed),) = run_ranks(1, whole_and_in_parts, path, folder, name)
    assert whole == resumed
    ledgers = [(folder / f"{name}-{run}" / "ledger.jsonl").read_text() for run in ("whole", "parts")]
    assert ledgers[0] == ledgers[1]
    assert make_plan(load_recipe(path).recipe, 1, None).total_parameters == sum(
        int(np.size(value)) for value in whole.values()
    )
    evaluation = next(line for line in reversed(logged(folder / f"{name}-whole")) if "valid_loss" in line)
    assert {f"valid_{metric}" for metric in ("loss", "bleu", "chrf", "baseline_bleu")} <= evaluation.keys()
    assert measured(evaluation) <= definition_of("sequence_to_sequence").measures.keys()
    assert main(["ckpt", "export", str(folder / f"{name}-whole")]) == 0
    capsys.readouterr()
    source = folder / "valid.en"
    for rows in ("1", "3"):
        assert main(["predict", str(folder / f"{name}-whole"), str(source), "--batch-rows", rows]) == 0
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["en"] for line in said] == source.read_text().splitlines()
        judged = (folder / f"{name}-whole" / "predictions-valid.jsonl").read_text().splitlines()
        assert [line["de"] for line in said] == [json.loads(line)["predicted"] for line in judged]
    assert answered_in_threads(folder / f"{name}-whole", source), "as `dstrain serve` does"
    in_parts = folder / "parts.jsonl"
    in_parts.write_text("".join(json.dumps({"en": line["en"].split()}) + "\n" for line in said))
    assert main(["predict", str(folder / f"{name}-whole"), str(in_parts)]) == 0
    parts_said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["de"] for line in parts_said] == [line["de"] for line in said], "a source may be a list of sentences"
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    export = folder / f"{name}-whole" / "export"
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForSeq2SeqLM.from_pretrained(export)
    longest = source.read_text().splitlines()[-1]
    ids = model.generate(**tokenizer([longest], return_tensors="pt", truncation=True, return_token_type_ids=False))
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == said[-1]["de"], "Transformers alone writes the same"


def evaluations_of(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in logged(run_dir) if "valid_loss" in line]


def test_a_run_moves_to_other_ranks_and_evaluates_the_same_there(folder: Path) -> None:
    """Two ranks under ZeRO-3, then one without: the rows, losses and scores of one rank all along."""
    path = write_recipe(folder, "bart")
    plain = ["model.config.dropout=0", "optimizer.learning_rate=3e-3", "evaluate.every_steps=3"]
    run_ranks(1, live, path, folder / "alone", [6], plain)
    run_ranks(2, live, path, folder / "moved", [3], [*plain, "train.zero.stage=3"])
    run_ranks(1, live, path, folder / "moved", [6], plain)
    ledgers = compare_ledgers(folder / "alone" / "ledger.jsonl", folder / "moved" / "ledger.jsonl")
    assert (ledgers.common_steps, ledgers.first_difference) == (6, None)
    for alone, moved in zip(evaluations_of(folder / "alone"), evaluations_of(folder / "moved"), strict=True):
        assert (alone["step"], alone["valid_report"]["signature"]) == (
            moved["step"],
            moved["valid_report"]["signature"],
        )
        for name in ("valid_loss", "valid_bleu", "valid_chrf", "valid_baseline_bleu"):
            assert moved[name] == pytest.approx(alone[name], rel=1e-4), name
    texts = [(folder / run / "predictions-valid.jsonl").read_text() for run in ("alone", "moved")]
    assert texts[0] == texts[1]
    assert all(json.loads(line)["predicted"] for line in texts[0].splitlines())


def evaluated_untrained(rank: int, world: int, recipe_file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the weights of the beginning score and write: the same weights on any number of ranks."""
    with training(load_recipe(recipe_file, ["model.config.init_std=0.5"]).recipe) as (runtime, task):
        runtime.engine.eval()
        with torch.no_grad():
            scores = task.evaluate(runtime, runtime.engine)
        return scores, task.predictions()["valid"]


def test_evaluation_does_not_depend_on_ranks_to_the_last_bit(folder: Path) -> None:
    path = write_recipe(folder, "marian")
    ((alone, said),) = run_ranks(1, evaluated_untrained, path)
    for shared, others in run_ranks(2, evaluated_untrained, path):
        assert others == said
        assert shared.pop("loss") == pytest.approx(alone["loss"], rel=1e-12)  # added up in another order
        assert shared == {name: value for name, value in alone.items() if name != "loss"}


def first_losses(rank: int, world: int, recipe_file: Path, overrides: list[str]) -> tuple[list[float], Any]:
    with training(load_recipe(recipe_file, overrides).recipe) as (runtime, task):
        losses = train_steps(runtime, task, 3)
        return losses, {name: value.ravel().tolist() for name, value in model_weights(runtime, task).items()}


def test_a_step_is_the_same_however_its_rows_are_split(folder: Path) -> None:
    """Sums over target tokens, divided by their number in the global batch: neither padding nor micro-batches weigh."""
    path = write_recipe(folder, "t5")
    plain = "model.config.dropout_rate=0"
    ((losses, weights),) = run_ranks(1, first_losses, path, [plain, "train.micro_batch_rows=4"])
    splits = [(1, ["train.micro_batch_rows=1"]), (2, ["train.micro_batch_rows=2", "train.zero.stage=2"])]
    for world, overrides in splits:
        for others, moved in run_ranks(world, first_losses, path, [plain, *overrides]):
            assert others == pytest.approx(losses, rel=1e-5)
            assert all(np.allclose(moved[name], value, rtol=1e-3, atol=2e-5) for name, value in weights.items())


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "two-berts"])
def test_the_loss_is_that_of_transformers_whatever_is_padded(folder: Path, name: str) -> None:
    recipe = load_recipe(write_recipe(folder, name)).recipe
    assert isinstance(recipe, SequenceToSequenceRecipe)
    encoder = load_document_tokenizer(recipe.tokenizer, text_to_text=True)
    writer = Writer(build_text_to_text(recipe.model, 0, encoder).eval(), 0.0)
    sources, targets = torch.randint(5, 60, (2, 9)), torch.randint(5, 60, (2, 7))
    mask = torch.ones_like(sources)
    mask[1, 4:], targets[1, 3:] = 0, NOTHING
    with torch.no_grad():
        loss, right = writer(labels=targets, input_ids=sources, attention_mask=mask)
        reference = writer.model(labels=targets, input_ids=sources, attention_mask=mask).loss
        alone = [
            writer(labels=targets[:1], input_ids=sources[:1], attention_mask=mask[:1]),
            writer(labels=targets[1:, :3], input_ids=sources[1:, :4], attention_mask=mask[1:, :4]),
        ]
    assert float(loss) == pytest.approx(float(reference) * 10, rel=1e-5)
    assert float(loss) == pytest.approx(sum(float(one) for one, _ in alone), rel=1e-5)
    assert float(right) == sum(float(count) for _, count in alone)


def test_a_decoder_that_begins_otherwise_writes_the_beginning_too(folder: Path, tmp_path: Path) -> None:
    """BART's pretrained decoders begin with </s> and then write <s>: so the targets have it."""
    recipe = load_recipe(write_recipe(folder, "bart")).recipe
    assert isinstance(recipe, SequenceToSequenceRecipe)
    encoder = load_document_tokenizer(recipe.tokenizer, text_to_text=True)
    model = build_text_to_text(recipe.model, 0, encoder)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = encoder.sep_id
    model.save_pretrained(tmp_path / "bart")
    own = load_recipe(folder / "bart.yaml", [f"model.pretrained={tmp_path}/bart", "model.config=null"]).recipe
    written_first, given = (SequenceToSequence(one, Runtime.offline(one)) for one in (own, recipe))
    for longer, shorter in zip(written_first.rows["train"], given.rows["train"], strict=True):
        assert longer.target[0] == encoder.cls_id != shorter.target[0]
        assert longer.target[-1] == shorter.target[-1] == encoder.sep_id
        inside = longer.target[1:-1].tolist()
        assert inside == shorter.target[:-1].tolist()[: len(inside)]


def test_onnx_is_refused_with_one_sentence(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(folder, "t5")).recipe
    assert isinstance(recipe, SequenceToSequenceRecipe)
    build_text_to_text(recipe.model, 0, load_document_tokenizer(recipe.tokenizer, text_to_text=True)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="holds a t5, which writes text in many steps, and only models of one step"):
        export_onnx(tmp_path, tmp_path / "onnx", int8=False)


def test_a_folder_that_does_not_fit_is_refused(folder: Path) -> None:
    recipe = load_recipe(write_recipe(folder, "warm-bert")).recipe
    assert isinstance(recipe, SequenceToSequenceRecipe)
    encoder = load_document_tokenizer(recipe.tokenizer, text_to_text=True)
    section = recipe.model.model_copy(update={"decoder_layers": 3})
    with pytest.raises(UserError, match=r"model\.decoder_layers=3, and \S+ has 2 layers; use at most these"):
        build_text_to_text(section, 0, encoder)
    with pytest.raises(UserError, match="the model knows 128 tokens and the tokenizer 200; give the tokenizer"):
        build_text_to_text(recipe.model, 0, replace(encoder, vocab_size=200))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.frozen_layers=1", "model.frozen_layers=1 is for encoders, and this model has a decoder; use 0"),
        ("data.target_length=41", "data.target_length=41 is longer than model.config.max_position_embeddings=40"),
        ("loss.label_smoothing=1", "loss.label_smoothing=1 leaves nothing of the targets; use less than 1"),
        ("data.target_field=en", "data.source_field=en is data.target_field too; name two different fields"),
        ("model.config.d_model=18", "is not a multiple of model.config.decoder_attention_heads=4; use 16 or 20"),
        ("model.pretrained=bert", "model.config is given beside model.pretrained"),
        ("decoding.num_beams=0", "decoding.num_beams=0"),
        ("decoding.min_new_tokens=12", "leaves no room below data.target_length=12; use at most 11"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(folder: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(folder, "bart"), [override], check_files=False)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["t5", "warm-bert"])
def test_adapters_on_both_sides_are_resumed_exactly_and_merged(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, lora = write_recipe(folder, name), ["model.lora={rank: 2, dropout: 0.1}", "train.zero.stage=2"]
    run = folder / f"{name}-adapted"
    ((whole,),) = run_ranks(1, live, path, run, [6], lora)
    ((half, resumed),) = run_ranks(1, live, path, folder / f"{name}-adapted-parts", [3, 6], lora)
    assert whole == resumed
    changed = {key for key in whole if half[key] != whole[key]}
    assert {key for key in whole if ".lora_" in key} <= changed
    assert not any("embeddings" in key or "shared" in key or "base_layer" in key for key in changed)
    assert main(["ckpt", "export", str(run)]) == 0
    capsys.readouterr()
    assert main(["predict", str(run), str(folder / "valid.en")]) == 0
    said = [json.loads(line)["de"] for line in capsys.readouterr().out.splitlines()]
    judged = [json.loads(line) for line in (run / "predictions-valid.jsonl").read_text().splitlines()]
    assert said == [each["predicted"] for each in judged]
