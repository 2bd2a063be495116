"""ONNX: the graph computes what the model computes, at any shape, and predicts through the same command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dstrain.cli import main
from dstrain.serve.onnx import OnnxModel, largest_difference, load_with_head
from dstrain.tokenizer import train_wordpiece, write_tokenizer

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
    model, graph = load_with_head(folder), OnnxModel(tmp_path / "onnx")
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
    assert f"of 4 texts of {labelled}" in said
    assert "accuracy: fp32 1.0000, int8 " in said
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("onnx", "int8")]
    assert sizes[1] < 0.5 * sizes[0]


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
