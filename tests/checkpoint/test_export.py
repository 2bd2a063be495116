"""Exports of runs on two ranks under ZeRO-3, used as anybody's Transformers would use them."""

import contextlib
import ctypes
import gc
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_ranks import job
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from synthetic import synthetic_manifest
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from dstrain.architectures.bert import BertConfig, BertModel
from dstrain.architectures.modernbert import ModernBertConfig, ModernBertModel
from dstrain.architectures.roberta import RobertaConfig, RobertaModel
from dstrain.base.durable import write_durably
from dstrain.checkpoint.files import write_safetensors
from dstrain.checkpoint.fragments import fragment_key, saved_tensors, share
from dstrain.checkpoint.load import Pieces
from dstrain.checkpoint.manifest import MANIFEST, Manifest, checkpoint_folder, committed
from dstrain.cli import main
from dstrain.convert import export
from dstrain.errors import CheckpointError
from dstrain.recipe.schema import ClassificationRecipe, Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.train.state import model_config

pytestmark = pytest.mark.ranks
SMALL = {"vocab_size": 256, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
MODELS = {
    "bert": BertModel(architecture="bert", config=BertConfig(**SMALL, num_hidden_layers=2, max_position_embeddings=32)),
    "roberta": RobertaModel(
        architecture="roberta", config=RobertaConfig(**SMALL, num_hidden_layers=2, max_position_embeddings=34)
    ),
    "modernbert": ModernBertModel(  # 32 tokens and windows of 8: four layers, two of them with windows
        architecture="modernbert",
        config=ModernBertConfig(
            **SMALL, num_hidden_layers=4, max_position_embeddings=32, local_attention=8, global_attn_every_n_layers=2
        ),
    ),
}


@pytest.fixture(scope="module")
def recipes(tiny_recipe: Callable[..., Recipe]) -> dict[str, Recipe]:
    base = tiny_recipe("train.zero.stage=3", "train.precision=fp32", "optimizer.learning_rate=0.01")
    return {name: base.model_copy(update={"model": model}) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def runs(recipes: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Folder with a run of each architecture, and the loss that its engine has on the probe rows."""
    folder = tmp_path_factory.mktemp("runs")
    for name, recipe in recipes.items():
        (folder / name).mkdir()
        (folder / name / "recipe.yaml").write_text(resolved_yaml(recipe))
    return folder, run_ranks(2, train_save_probe, recipes, folder)[0]


def train_save_probe(rank: int, world_size: int, recipes: dict[str, Recipe], folder: Path) -> dict[str, float]:
    probes = {}
    for name, recipe in recipes.items():
        run = job(recipe)
        run.train(4)
        run.save(folder / name)
        run.runtime.engine.eval()
        probes[name] = run.probe()
    return probes


def test_memory_is_bounded_by_a_shard_however_big_the_model(
    runs: tuple[Path, dict[str, float]], recipes: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.export(committed(runs[0] / "bert")[0], tmp_path / "small")  # whatever is imported
    monkeypatch.setattr("dstrain.checkpoint.files.DIGEST_BYTES", 1 << 20)  # what is read ahead is a few blocks
    checkpoint, model_bytes = big_checkpoint(tmp_path / "run", recipes["bert"])
    monkeypatch.setattr(export, "SHARD_BYTES", model_bytes // 8)
    with peak_of_memory() as grown:
        export.export(checkpoint, tmp_path / "big")
    assert len(list((tmp_path / "big").glob("model-*.safetensors"))) >= 8
    assert model_bytes // 16 < max(grown) < model_bytes // 3, (max(grown), model_bytes)


def big_checkpoint(run_dir: Path, recipe: Recipe) -> tuple[Path, int]:
    """A checkpoint of random weights as a run of two ranks would leave it, and the bytes of the model."""
    config = transformers.BertConfig(hidden_size=384, num_hidden_layers=10, intermediate_size=1536, vocab_size=2048)
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(config)
    tensors = saved_tensors(model)
    folder, files = checkpoint_folder(run_dir, 1), {}
    folder.mkdir(parents=True)
    for rank in range(2):
        pieces = []
        for name, tensor in tensors.items():
            start, stop = share(tensor.numel(), rank, 2)
            pieces.append((fragment_key(name, "weight", start), torch.randn(stop - start) * 0.02))
        files[f"rank-{rank:05d}.safetensors"] = write_safetensors(
            folder / f"rank-{rank:05d}.safetensors", pieces
        ).entry()
    manifest = replace(
        synthetic_manifest(1, files),
        model_config=model_config(model),
        parameters={name: {"shape": list(tensor.shape), "states": ["weight"]} for name, tensor in tensors.items()},
    )
    write_durably(folder / MANIFEST, manifest.text())
    (run_dir / "recipe.yaml").write_text(resolved_yaml(recipe))
    return folder, sum(tensor.numel() * 4 for tensor in tensors.values())


@contextlib.contextmanager
def peak_of_memory() -> Iterator[list[int]]:
    """By how many bytes this process grows, again and again: without what is of files, which the kernel may drop."""

    def anonymous() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def look() -> None:
        while not over.wait(0.002):
            grown.append(anonymous() - before)

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what comes
    over, before, grown = threading.Event(), anonymous(), [0]
    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield grown
    finally:
        over.set()
        looking.join()


def test_what_transformers_reads_otherwise_than_it_was_written_is_refused(
    runs: tuple[Path, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(shard: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        name = "bert.embeddings.LayerNorm.weight"
        save_file({key: tensor + (key == name) * 1e-7 for key, tensor in shard.items()}, file, metadata)

    monkeypatch.setattr(export, "save_file", other)
    with pytest.raises(CheckpointError, match=r"reads other values of bert\.embeddings\.LayerNorm\.weight"):
        export.export(committed(runs[0] / "bert")[0], tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_export_is_what_was_trained(
    name: str, runs: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, probes = runs
    out = tmp_path / "model"
    assert main(["ckpt", "export", str(folder / name), "--out", str(out)]) == 0
    (checkpoint,) = committed(folder / name)
    assert capsys.readouterr().out.startswith(f"{checkpoint} → {out}\nlogits of the trained and of the exported model")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    assert not list(tmp_path.glob(".*"))

    model = AutoModelForMaskedLM.from_pretrained(out).eval()
    assert model.dtype == torch.float32
    assert type(model).__name__ == json.loads((out / "config.json").read_text())["architectures"][0]
    pieces, stored = Pieces(checkpoint, Manifest.read(checkpoint)), load_file(out / "model.safetensors")
    for parameter, tensor in model.named_parameters():
        saved = torch.empty(tensor.numel())
        pieces.read_into(saved, parameter, "weight", 0)
        assert torch.equal(saved, tensor.detach().view(-1)), parameter
    assert stored.keys() <= dict(model.state_dict()).keys()

    # The loss of the training engine under ZeRO-3 on the same rows, each of which is one document.
    rows = torch.randint(5, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, [1, 5, 9, 20]]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 256), rows[:, [1, 5, 9, 20]].reshape(-1), reduction="sum"
    )
    assert float(loss) == pytest.approx(probes[name], rel=1e-5)


def test_a_model_bigger_than_a_shard_is_exported_in_several(
    runs: tuple[Path, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(runs[0] / "bert")
    assert main(["ckpt", "export", run, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr("dstrain.convert.export.SHARD_BYTES", 40_000)
    assert main(["ckpt", "export", run, "--out", str(tmp_path / "shards")]) == 0
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {name: load_file(tmp_path / "shards" / name) for name in set(index.values())}
    assert len(shards) > 2
    assert all(sum(tensor.nbytes for tensor in shard.values()) <= 40_000 for shard in shards.values())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert index.keys() == whole.keys()
    assert all(torch.equal(shards[file][name], whole[name]) for name, file in index.items())
    assert len({path.stat().st_mode for path in (tmp_path / "shards").iterdir()}) == 1


def test_the_exported_folder_serves_a_pipeline(
    runs: tuple[Path, dict[str, float]], recipes: dict[str, Recipe], tmp_path: Path
) -> None:
    assert main(["ckpt", "export", str(committed(runs[0] / "bert")[0]), "--out", str(tmp_path / "model")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["pad_token_id"], config["vocab_size"]) == (tokenizer.pad_token_id, len(tokenizer))
    fill = pipeline("fill-mask", model=str(tmp_path / "model"), device=-1)
    assert len(fill(f"a word {tokenizer.mask_token} another")) == 5


def test_refused_without_harm(
    runs: tuple[Path, dict[str, float]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("here")
    run = str(runs[0] / "roberta")
    assert main(["ckpt", "export", run, "--out", str(taken)]) == 2
    assert capsys.readouterr().err == (
        f"error: {taken} exists and is not an empty folder; remove it, or give another --out\n"
    )
    assert main(["ckpt", "export", run, "--out", str(taken / "mine" / "model")]) == 2
    assert "Not a directory" in capsys.readouterr().err
    monkeypatch.setattr("dstrain.convert.export.LARGEST_DIFFERENCE", 0.0)
    assert main(["ckpt", "export", run, "--out", str(tmp_path / "model")]) == 2
    assert "a logit of the exported model differs from the trained model's by" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert [path.name for path in taken.iterdir()] == ["mine"]


def test_a_classifier_is_exported_with_its_labels(tiny_tokenizer: Path, tiny_texts: list[str], tmp_path: Path) -> None:
    rows = [f"{text},{'long' if len(text) > 150 else 'short'}" for text in tiny_texts]
    for name, part in (("train", rows[:200]), ("valid", rows[200:])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *part]) + "\n")
    recipe = ClassificationRecipe.model_validate(
        {
            "name": "labels",
            "task": "sequence_classification",
            "model": MODELS["bert"].model_dump(),
            "tokenizer": str(tiny_tokenizer),
            "data": {
                "train": str(tmp_path / "train.csv"),
                "valid": str(tmp_path / "valid.csv"),
                "sequence_length": 24,
            },
            "train": {"global_batch_rows": 8, "micro_batch_rows": 4, "steps": 4, "precision": "bf16"},
            "optimizer": {"name": "adamw", "learning_rate": 0.01},
        }
    )
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(resolved_yaml(recipe))
    run_ranks(1, train_and_save, recipe, run_dir)
    (tmp_path / "train.csv").unlink()  # what was trained on is not needed any more
    assert main(["ckpt", "export", str(run_dir)]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "export")
    assert model.config.id2label == {0: "long", 1: "short"}
    assert model.config.label2id == {"long": 0, "short": 1}
    assert AutoTokenizer.from_pretrained(run_dir / "export").model_max_length == 24


def train_and_save(rank: int, world_size: int, recipe: Recipe, folder: Path) -> None:
    run = job(recipe)
    run.train(2)
    run.save(folder)
