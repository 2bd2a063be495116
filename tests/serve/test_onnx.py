"""ONNX: the graph computes what the model computes, at any shape, and predicts through the same command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dstrain.cli import main
from dstrain.corpus.train_tokenizer import train_wordpiece, write_tokenizer
from dstrain.predict.items import Item
from dstrain.predict.loaded import GRAPH
from dstrain.predict.onnx import largest_difference, load_with_head
from dstrain.predict.onnx_model import OnnxModel
from dstrain.serve.agreement import agreement

pytestmark = pytest.mark.slow

TEXTS = ["red apple", "green leaf of the tree", "the blue sky " * 12, "apple"]
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 64,
}


def model_folder(folder: Path, architecture: str = "Bert", head: str = "SequenceClassification", **keys: Any) -> Path:
    """A random model with a head, as Transformers saves it; its labels depend on the text."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    write_tokenizer(train_wordpiece(TEXTS * 3, 45), folder, lowercase=True)
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    keys = SIZES | {"max_position_embeddings": 80, "initializer_range": 0.3, "id2label": {0: "fruit", 1: "sky"}} | keys
    keys |= special | {"local_attention": 8} if architecture == "ModernBert" else {}
    config = getattr(transformers, f"{architecture}Config")(**keys)
    getattr(transformers, f"{architecture}For{head}")(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("Bert", "SequenceClassification"),
        ("Roberta", "TokenClassification"),
        ("ModernBert", "SequenceClassification"),
        ("Bert", "QuestionAnswering"),
    ],
)
def test_a_graph_computes_what_its_model_computes(tmp_path: Path, architecture: str, head: str) -> None:
    folder = model_folder(tmp_path / "model", architecture, head)
    assert main(["export", str(folder), "--onnx", "--out", str(tmp_path / "onnx")]) == 0
    model, graph = load_with_head(folder), OnnxModel(tmp_path / "onnx", tmp_path / "onnx" / GRAPH)
    assert largest_difference(model, graph) < 1e-4
    ids = torch.randint(5, 64, (5, 70))
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    found = graph(input_ids=ids, attention_mask=torch.ones_like(ids))
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, atol=2e-4, rtol=2e-4)
    with torch.no_grad():  # the comparison would notice another model
        weight = next(iter(model.parameters()))
        weight.add_(0.1 * torch.randn(weight.shape))
    assert largest_difference(model, graph) > 1e-4


def test_predictions_are_the_same_and_8_bits_are_smaller_with_their_loss_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder(tmp_path / "model", hidden_size=128, intermediate_size=512)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    labelled = tmp_path / "labelled.jsonl"
    assert main(["predict", str(folder), str(tmp_path / "texts.txt")]) == 0
    plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    labelled.write_text("".join(json.dumps({"text": p["text"], "label": p["label"]}) + "\n" for p in plain))

    assert main(["export", str(folder), "--onnx", "--out", str(tmp_path / "onnx")]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "onnx"), str(tmp_path / "texts.txt")]) == 0
    graph = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["label"] for line in graph] == [line["label"] for line in plain]
    for mine, other in zip(graph, plain, strict=True):
        assert mine["probability"] == pytest.approx(other["probability"], abs=1e-4)

    options = ["--onnx", "--int8", "--measure", str(labelled), "--out", str(tmp_path / "int8")]
    assert main(["export", str(folder), *options]) == 0
    said = capsys.readouterr().out
    assert "of 4 inputs" in said
    assert "its numbers differ by " in said
    assert "accuracy: fp32 1.0000, int8 " in said
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("onnx", "int8")]
    assert sizes[1] < 0.5 * sizes[0]


def test_what_8_bits_cost_is_said_of_any_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model", head="TokenClassification", id2label={0: "O", 1: "B-sky"})
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    options = ["--onnx", "--int8", "--out", str(tmp_path / "int8"), "--measure"]
    (tmp_path / "other.csv").write_text("sentence\nred apple\n")
    assert main(["export", str(folder), *options, str(tmp_path / "other.csv")]) == 2
    assert "other.csv:2: has no field 'text'" in capsys.readouterr().err
    (tmp_path / "none.txt").write_text("\n\n")
    assert main(["export", str(folder), *options, str(tmp_path / "none.txt")]) == 2
    assert f"{tmp_path}/none.txt:1: empty" in capsys.readouterr().err
    assert not (tmp_path / "int8").exists(), "nothing is written where the loss cannot be measured"
    assert main(["export", str(folder), *options, str(tmp_path / "texts.txt")]) == 0
    assert "int8 answers as fp32 does on " in capsys.readouterr().out


class Says:
    """A model that gives known answers."""

    fields: tuple[str, ...] = ("text",)
    tokens_field: str | None = None

    def __init__(self, answers: list[dict[str, Any]]) -> None:
        self._answers = answers

    def answers(self, values: Sequence[tuple[Any, ...]], batch_rows: int) -> list[dict[str, Any]]:
        return self._answers


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (
            [{"label": "a", "probability": 0.6}, {"label": "b", "probability": 0.8}],
            [{"label": "a", "probability": 0.3}, {"label": "a", "probability": 0.4}],
            ["50.00% of 2 inputs", "by 0.35, where those of fp32 are 0.71", "fp32 1.0000, int8 0.5000"],
        ),
        ([{"embedding": [3.0, 4.0]}], [{"embedding": [3.0, 3.0]}], ["by 0.71, where those of fp32 are 3.5"]),
        (
            [{"labels": [{"label": "x", "probability": 0.9}]}, {"labels": []}],
            [{"labels": [{"label": "x", "probability": 0.7}]}, {"labels": [{"label": "y", "probability": 0.6}]}],
            ["50.00% of 2 inputs"],
        ),
        (
            [{"answer": "sky", "start": 1, "end": 4, "score": 2.0, "n_best": [{"answer": "sky", "score": 2.0}]}],
            [{"answer": "sky", "start": 1, "end": 4, "score": 1.0, "n_best": []}],
            ["100.00% of 1 inputs", "by 1, where those of fp32 are 2"],
        ),
        ([{"summary": "A.", "numbers": [0]}], [{"summary": "B.", "numbers": [1]}], ["0.00% of 1 inputs"]),
    ],
)
def test_agreement(before: list[dict[str, Any]], after: list[dict[str, Any]], lines: list[str]) -> None:
    items = [Item("file:1", ("text",), given={"label": answer.get("label")}) for answer in before]
    found = agreement(Says(before), Says(after), items, "label")
    assert len(found) == len(lines)
    assert all(expected in line for expected, line in zip(lines, found, strict=True)), found


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model")
    model = load_with_head(folder)
    with torch.no_grad():
        next(iter(model.parameters()))[:] = float("nan")
    model.save_pretrained(folder)
    assert main(["export", str(folder), "--onnx", "--out", str(tmp_path / "onnx")]) == 2
    assert "differs by nan from the model's" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_cannot_be_exported_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model")
    for options, says in (
        (["--onnx", "--int8"], "--measure FILE"),
        (["--onnx", "--measure", "x.csv"], "give --int8 as well"),
        (["--int8", "--measure", "x.csv"], "--int8 needs --onnx"),
        ([], "is a Transformers folder already"),
        (["--onnx", "--out", str(folder)], "exists and is not an empty folder"),
    ):
        assert main(["export", str(folder), *options]) == 2
        assert says in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--onnx"]) == 2
    assert "no config.json" in capsys.readouterr().err
    (folder / "model.onnx").write_bytes(b"not a graph")
    (tmp_path / "texts.txt").write_text("red apple")
    assert main(["predict", str(folder), str(tmp_path / "texts.txt")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
