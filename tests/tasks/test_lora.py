"""Adapters: trained and resumed exactly across ZeRO stages, without their base in checkpoints; merged by the export."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled import write_examples
from ranks import run_ranks
from safetensors.numpy import load_file
from test_heads import HEADS, live, write_recipe
from transformers import AutoModelForTokenClassification

from dstrain.checkpoint.manifest import Manifest
from dstrain.cli import main
from dstrain.plan.text import make_plan
from dstrain.recipe.load import load_recipe

pytestmark = pytest.mark.ranks

LORA = ["model.lora={rank: 2, alpha: 3.0, dropout: 0.1}", "optimizer.weight_decay=0.1"]
SPLITS = {  # ranks; ZeRO stages of the half and of the whole
    "answers": (1, 2, 1),
    "pairs": (1, 2, 1),
    "sentences": (2, 1, 2),
    "sets": (1, 0, 0),
    "tags": (2, 3, 3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("lora"))


def whole_and_parts(
    rank: int, world: int, path: Path, folder: Path, overrides: list[str], stages: tuple[int, int]
) -> list[Any]:
    """The weights of a run under the last of two ZeRO stages, and of one that began under the first of them."""
    first, last = ([*overrides, f"train.zero.stage={stage}"] for stage in stages)
    (whole,) = live(rank, world, path, folder / "whole", [6], last)
    (half,) = live(rank, world, path, folder / "parts", [3], first)
    (resumed,) = live(rank, world, path, folder / "parts", [6], last)
    return [whole, half, resumed]


@pytest.mark.parametrize("name", HEADS)
def test_adapters_resume_exactly_and_are_merged(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, runs = write_recipe(folder, name), folder / f"{name}-runs"
    runs.mkdir()
    world, *stages = SPLITS[name]
    ranks = run_ranks(world, whole_and_parts, path, runs, LORA, stages)
    whole, half, _ = ranks[0]
    assert all(whole == rank[2] for rank in ranks)
    trained = {key for key in whole if half[key] != whole[key]}
    assert {key for key in whole if ".lora_" in key} <= trained
    assert not any(".layer" in key and ".lora_" not in key for key in trained)
    assert not any("embeddings" in key for key in trained)
    manifest = Manifest.read(runs / "parts" / "checkpoints" / "step-0000000003")
    assert trained <= manifest.parameters.keys()
    assert all(len(about["states"]) == 3 for about in manifest.parameters.values()), "no frozen base"
    recipe = load_recipe(path, LORA).recipe
    plan = make_plan(recipe, 1, None)
    assert plan.total_parameters == sum(int(np.size(value)) for value in whole.values())
    sizes = {key: int(np.size(value)) for key, value in whole.items()}
    assert plan.trained_parameters == sum(sizes[key] for key in manifest.parameters)
    saved = sum(about["bytes"] for about in manifest.files.values())
    assert plan.checkpoint_bytes < saved < plan.checkpoint_bytes + 10_000 + 300 * len(manifest.parameters)
    assert main(["ckpt", "verify", str(runs / "whole")]) == 0
    assert main(["ckpt", "export", str(runs / "whole")]) == 0
    exported = load_file(runs / "whole" / "export" / "model.safetensors")
    assert not any("lora" in key for key in exported)
    for key, values in whole.items():
        if ".lora_A." in key:
            low, high = np.array(values), np.array(whole[key.replace("lora_A", "lora_B")])
            base = np.array(whole[key.replace("lora_A.default", "base_layer")])
            merged = exported[key.replace(".lora_A.default", "").removeprefix("model." if name != "tags" else "")]
            assert np.allclose(merged, base + 1.5 * high @ low, atol=1e-6)
            assert not np.allclose(merged, base, atol=1e-6)
    capsys.readouterr()


def test_adapters_of_another_base_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(folder, "tags")
    overrides = [f"model.pretrained={folder}/base", "model.config=null", "model.dropout=0.2", *LORA]
    ((_,),) = run_ranks(1, live, path, folder / "from-config", [3], [])
    assert main(["ckpt", "export", str(folder / "from-config"), "--out", str(folder / "base")]) == 0
    ((half,),) = run_ranks(1, live, path, folder / "adapted", [3], overrides)
    assert main(["ckpt", "export", str(folder / "adapted")]) == 0
    merged = AutoModelForTokenClassification.from_pretrained(folder / "adapted" / "export")
    assert merged.config.attention_dropout == merged.config.mlp_dropout == 0.2
    weight = merged.model.layers[0].attn.Wqkv.weight.detach().numpy()
    assert not np.allclose(weight, np.array(half["model.layers.0.attn.Wqkv.base_layer.weight"]))
    other = AutoModelForTokenClassification.from_pretrained(folder / "base")
    with torch.no_grad():
        other.model.embeddings.tok_embeddings.weight[7, 3] += 1e-3
    other.save_pretrained(folder / "base")
    capsys.readouterr()
    assert main(["ckpt", "export", str(folder / "adapted"), "--out", str(folder / "again")]) == 2
    assert "holds adapters of another model than model.pretrained=" in capsys.readouterr().err
    with pytest.raises(AssertionError, match=r"was saved from other data:\n  base: "):
        run_ranks(1, live, path, folder / "adapted", [6], overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.frozen_layers=1", "is given beside model.lora, which freezes every layer"),
        ("model.lora.target_modules=[q_proj]", "holds 'q_proj', and no linear layer of modernbert ends so"),
        ("model.dropout=0.1", "is for model.pretrained"),
    ],
)
def test_what_adapters_do_not_go_with(
    folder: Path, override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(folder, "tags")
    assert main(["plan", str(path), "model.lora.rank=2", override]) == 2
    assert words in capsys.readouterr().err
