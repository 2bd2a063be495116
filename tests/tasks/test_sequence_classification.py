"""Sequence classification: rows and scores are the same for any rank count."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from labelled import EXAMPLES, RECIPE, ROWS, write_examples

from dstrain.plan import batch_plan
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import ClassificationRecipe, Loss
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.batching import Cut, encoded, encoded_pairs, padded
from dstrain.tasks.epochs import epoch_order
from dstrain.tasks.scores import label_scores, label_set_scores, number_scores
from dstrain.tasks.sequence_classification import Classifier, SequenceClassification


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("classification"))


def task(folder: Path, rank: int = 0, world: int = 1, architecture: str = "bert") -> SequenceClassification:
    path = folder / f"{architecture}.yaml"
    path.write_text(RECIPE.format(folder=folder, architecture=architecture))
    recipe = load_recipe(path).recipe
    assert isinstance(recipe, ClassificationRecipe)
    return SequenceClassification(recipe, runtime(recipe, rank, world))


def runtime(recipe: Any, rank: int, world: int) -> Runtime:
    """What the task reads of a rank; its sums are over this rank alone."""
    alone = SimpleNamespace(
        rank=rank,
        world_size=world,
        device=torch.device("cpu"),
        batch=batch_plan(recipe, world),
        all_reduce_sum=np.asarray,
        all_reduce_sum_float=np.asarray,
    )
    return cast(Runtime, alone)


def rows_of_step(one: SequenceClassification, step: int) -> list[int]:
    lengths = [len(row.ids) for row in one.rows["train"]]
    orders = [epoch_order(3, epoch, lengths, ROWS, 50) for epoch in range(4)]
    return [int(orders[r // EXAMPLES][r % EXAMPLES]) for r in range(step * ROWS, (step + 1) * ROWS)]


@given(
    st.integers(0, 50), st.lists(st.integers(2, 99), min_size=1, max_size=200), st.integers(1, 16), st.integers(1, 9)
)
def test_an_epoch_goes_through_every_example_once(epoch: int, lengths: list[int], rows: int, groups: int) -> None:
    assert sorted(epoch_order(1, epoch, lengths, rows, groups)) == list(range(len(lengths)))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(epoch_order(seed, epoch, [5] * 100, 8, 2)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_global_batches_are_of_like_length_even_across_the_start_of_an_epoch() -> None:
    lengths = np.random.default_rng(0).integers(2, 500, 1003).tolist()
    spread = []
    for epoch in (0, 1, 2):  # 1003 = 125 × 8 + 3
        line = epoch_order(0, epoch, lengths, 8, 50)
        first = -epoch * 1003 % 8
        batches = np.asarray(lengths)[line[first : first + (1003 - first) // 8 * 8]].reshape(-1, 8)
        spread.append(float(np.ptp(batches, axis=1).mean()))
    assert max(spread) < 20  # a random batch spreads over 390 of the 498 lengths


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
def test_a_step_has_the_same_rows_for_any_ranks_and_from_any_start(folder: Path, world: int) -> None:
    whole = np.zeros((4, 2), np.int64)
    for rank in range(world):
        one = task(folder, rank, world)
        with one.steps(0) as stream:
            batches = [next(stream) for _ in range(4)]
        with one.steps(2) as stream:
            resumed = next(stream)
        assert np.array_equal(resumed.digest, batches[2].digest)
        for step, batch in enumerate(batches):
            whole[step] += batch.digest
            assert batch.row_numbers.tolist() == list(range(step * ROWS + rank, (step + 1) * ROWS, world))
            counted = [micro for micro in batch.micro_batches if len(micro.row_numbers)]
            assert batch.targets == len(batch.row_numbers) == sum(len(micro.inputs["labels"]) for micro in counted)
            most_rows = math.ceil(ROWS / world)
            assert len(batch.micro_batches) == math.ceil(most_rows / 2), "as many on every rank"
            assert max(len(micro.inputs["labels"]) for micro in batch.micro_batches) <= 2
            labels = torch.cat([micro.inputs["labels"] for micro in counted]).tolist()
            colours = ["red", "green", "blue"]
            expected = [colours[n % 3] for n in rows_of_step(one, step)[rank::world]]
            assert [one.labels[label] for label in labels] == expected
    alone = task(folder)
    with alone.steps(0) as stream:
        assert np.array_equal(whole, [next(stream).digest for _ in range(4)])


def test_texts_are_cut_to_the_row_and_padded_no_further_than_the_longest(folder: Path) -> None:
    with task(folder).steps(0) as stream:
        micro_batches = [micro.inputs for _ in range(3) for micro in next(stream).micro_batches]
    widths = {micro["input_ids"].shape[1] for micro in micro_batches}
    assert widths == {8, 16}
    for micro in micro_batches:
        lengths = micro["attention_mask"].sum(dim=1)
        assert int(lengths.max()) > micro["input_ids"].shape[1] - 8
        for ids, length in zip(micro["input_ids"], lengths.tolist(), strict=True):
            assert (ids[0], ids[length - 1]) == (2, 3)
            assert not ids[length:].any()


def test_the_length_of_a_run_in_epochs_is_counted_in_examples(folder: Path) -> None:
    totals = task(folder).totals
    assert totals.steps == 9  # 3 × 22 examples in steps of 8
    assert 0 < totals.tokens(0) < ROWS * 16
    assert totals.tokens_before(9) == 9 * totals.tokens(0)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_padding_changes_no_loss_and_the_loss_is_a_sum(folder: Path, architecture: str) -> None:
    one = task(folder, architecture=architecture)
    one.module.eval()
    with torch.no_grad(), one.steps(0) as stream:
        for micro in (each.inputs for each in next(stream).micro_batches):
            together, right = one.module(**micro)
            separately = torch.stack(
                [
                    torch.stack(
                        one.module(
                            input_ids=micro["input_ids"][i : i + 1, : int(micro["attention_mask"][i].sum())],
                            attention_mask=micro["attention_mask"][i : i + 1, : int(micro["attention_mask"][i].sum())],
                            labels=micro["labels"][i : i + 1],
                        )
                    )
                    for i in range(2)
                ]
            ).sum(dim=0)
            torch.testing.assert_close(torch.stack([together, right]), separately, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.slow
def test_every_held_out_example_is_scored_once_by_any_ranks(folder: Path, world: int) -> None:
    """The ranks' shares, added up as the collective would, give what one process gives; passes are equally many."""
    expected = evaluated(folder, 0, 1)
    shares = [evaluated(folder, rank, world) for rank in range(world)]
    assert len({share["passes"] for share in shares}) == 1
    logits = sum(share["sums"][1] for share in shares)
    np.testing.assert_allclose(logits, expected["sums"][1], atol=1e-6)
    assert all(np.count_nonzero(logits.reshape(7, -1), axis=1))
    assert sum(share["loss"] for share in shares) == pytest.approx(expected["loss"], rel=1e-6)


def evaluated(folder: Path, rank: int, world: int) -> dict[str, Any]:
    one = task(folder, rank, world)
    one.module.eval()
    seen: dict[str, Any] = {"passes": 0, "sums": []}

    def counting(**inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen["passes"] += 1
        return one.module(**inputs)  # type: ignore[no-any-return]

    context = one.runtime

    def summed(values: Any) -> Any:
        seen["sums"].append(np.asarray(values))
        return seen["sums"][-1]

    context.all_reduce_sum_float = summed  # type: ignore[method-assign]
    with torch.no_grad():
        metrics = one.evaluate(context, cast(torch.nn.Module, counting))
    return seen | {"loss": metrics["loss"], "report": metrics["report"]}


def test_the_report_counts_texts_that_were_trained_on(folder: Path) -> None:
    report = evaluated(folder, 0, 1)["report"]
    assert report["rows"] == 7
    assert report["texts_also_in_train"] == 7
    assert sum(map(sum, report["confusion"])) == 7


def test_scores_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import classification_report

    generator = np.random.default_rng(0)
    true, logits = generator.integers(0, 4, 200), generator.normal(size=(200, 5))
    logits[:, 3] = -9  # never predicted
    scores = label_scores(["a", "b", "c", "d", "never"], true, logits)
    predicted = logits.argmax(axis=1)
    names = ["a", "b", "c", "d", "never"]
    expected = classification_report(
        true, predicted, labels=range(5), target_names=names, output_dict=True, zero_division=0
    )
    for label, mine in scores["report"]["labels"].items():
        theirs = expected[label]
        assert (mine["precision"], mine["recall"], mine["f1"], mine["rows"]) == pytest.approx(
            (theirs["precision"], theirs["recall"], theirs["f1-score"], theirs["support"])
        )
    assert scores["macro_f1"] == pytest.approx(expected["macro avg"]["f1-score"])
    assert scores["weighted_f1"] == pytest.approx(expected["weighted avg"]["f1-score"])
    assert scores["accuracy"] == scores["micro_f1"] == pytest.approx(float((true == predicted).mean()))
    assert scores["report"]["confusion"][1][2] == int(((true == 1) & (predicted == 2)).sum())
    assert "auroc" not in scores, "a label that never occurs has no AUROC"


def test_scores_of_two_labels_of_sets_and_of_numbers_by_hand() -> None:
    true = np.array([0, 0, 1, 1])
    two = label_scores(["no", "yes"], true, np.array([[2.0, 0], [1, 2], [3, 1], [0, 4]]))
    assert two["auroc"] == 0.625  # of the differences -2, 1 (no) and -2, 4 (yes), 2 pairs are in order and 1 is a tie
    assert (two["accuracy"], two["matthews"]) == (0.5, 0.0)
    sets = label_set_scores(["a", "b"], np.array([[1, 0], [0, 0], [1, 0]]), np.array([[1.0, -1], [-1, -1], [-2, -1]]))
    assert (sets["accuracy"], sets["auroc"]) == (pytest.approx(2 / 3), 0.5)
    assert sets["report"]["labels"]["a"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "rows": 2}
    line = number_scores(np.array([1.0, 2, 3]), np.array([2.0, 4, 6]))
    assert (line["pearson"], line["spearman"], line["mean_absolute_error"]) == (pytest.approx(1), pytest.approx(1), 2.0)
    assert "pearson" not in number_scores(np.array([1.0, 2]), np.array([3.0, 3]))


def test_pairs_are_cut_at_the_longer_one(folder: Path) -> None:
    from dstrain.data.tokens import load_document_tokenizer

    encoder = load_document_tokenizer(folder / "tokenizer")
    ((row, second),) = encoded_pairs(encoder, [("red " * 9, "sky")], 8, 2)
    red, sky = (encoder.encode(word)[1:-1].tolist() for word in ("red", "sky"))
    kept = 8 - 4 - len(sky)
    assert row.tolist() == [2, *(red * 9)[:kept], 3, 3, *sky, 3]
    assert second == kept + 3
    inputs = padded([row, row[:5]], 0, 16, [second, 5])
    assert inputs["token_type_ids"].tolist() == [[int(second <= at) for at in range(8)], [0] * 8]


def test_balanced_labels_weigh_alike_and_smoothing_spreads_a_label(folder: Path) -> None:
    one = task(folder)
    one._recipe = one._recipe.model_copy(update={"loss": Loss(class_weights="balanced")})
    counts = {label: sum(example.target == label for example in one.splits.train) for label in one.labels}
    weights = one._class_weights()
    assert [round(float(w) * counts[label], 4) for w, label in zip(weights, one.labels, strict=True)] == [7.3333] * 3
    head = Classifier(one.model.eval(), torch.tensor([3.0, 1.0, 1.0]), 0.3)
    loss, _ = head(labels=torch.tensor([0]), input_ids=torch.tensor([[2, 9, 3]]))
    expected = -(torch.tensor([0.8, 0.1, 0.1]) * head.outputs[0].log_softmax(0)).sum() * 3
    assert float(loss.detach()) == pytest.approx(float(expected))


def test_a_head_for_other_labels_is_refused_and_its_order_kept(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification as auto

    from dstrain.architectures.bert import BertModel
    from dstrain.errors import UserError
    from dstrain.model.encoder import labels_of_head

    model = BertModel(architecture="bert", pretrained=str(tmp_path))
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "yes", "1": "no"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert labels_of_head(model, auto, ["no", "yes"]) == ["yes", "no"]
    with pytest.raises(UserError, match=r"has a head of 2 labels \(yes, no\), and the examples have 3 \(a, b, c\)"):
        labels_of_head(model, auto, ["a", "b", "c"])
    with pytest.raises(UserError, match="has a head of 2 labels"):
        labels_of_head(model, auto, ["a", "b"])
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"]}))
    assert labels_of_head(model, auto, ["a", "b", "c"]) == ["a", "b", "c"]


def test_what_is_cut_is_said(folder: Path) -> None:
    assert task(folder).notes[-1].endswith("texts fill data.sequence_length=16; longer ones were cut")


def test_a_text_without_any_token_is_two_special_tokens(folder: Path) -> None:
    from dstrain.data.tokens import load_document_tokenizer

    assert [ids.tolist() for ids in encoded(load_document_tokenizer(folder / "tokenizer"), ["\x00"], 16)] == [[2, 3]]


@pytest.mark.parametrize("length", [4, 7, 16])
def test_a_long_text_loses_its_end_its_middle_or_its_start(folder: Path, length: int) -> None:
    from dstrain.data.tokens import load_document_tokenizer

    encoder = load_document_tokenizer(folder / "tokenizer")
    whole = next(iter(encoder.encode_many(["red green blue apple leaf sky of the " * 3]))).tolist()
    kept = {cut: encoded(encoder, ["red green blue apple leaf sky of the " * 3], length, cut) for cut in get_args(Cut)}
    front, back = (length - length // 2), length // 2
    assert kept["end"][0].tolist() == [*whole[: length - 1], whole[-1]]
    assert kept["start"][0].tolist() == [whole[0], *whole[1 - length :]]
    assert kept["middle"][0].tolist() == [*whole[:front], *whole[-back:]]
    for cut in get_args(Cut):
        assert encoded(encoder, ["red sky"], 16, cut)[0].tolist() == encoded(encoder, ["red sky"], 16)[0].tolist()


def test_prediction_cuts_where_training_did(folder: Path, tmp_path: Path) -> None:
    """A classifier that was trained on ends calls a text by its end."""
    from transformers import BertConfig, BertForSequenceClassification

    from dstrain.predict.predictors import TextClassifier

    torch.manual_seed(0)
    recipe = task(folder)._recipe
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"truncation_side": "start"})})
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=128, max_position_embeddings=40, initializer_range=0.5, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    SequenceClassification.save_extras(recipe, tmp_path)
    long, other = "red " * 40 + "sky " * 40, "green " * 40 + "sky " * 40
    logits = TextClassifier(tmp_path)._logits([(long,), (other,), ("sky " * 40,), ("red " * 40,)], 4)
    assert torch.allclose(logits[0], logits[1])
    assert torch.allclose(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[3])
