"""A Transformers folder with a head, loaded: what `dstrain ckpt export` wrote, or another program."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from dstrain.architectures import architecture_of
from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.errors import UserError
from dstrain.recipe.definition import TASKS, ExampleTaskDefinition, imported
from dstrain.recipe.messages import RENAMED_KEYS
from dstrain.tasks.batching import Ids, batches_by_length, padded
from dstrain.tasks.example_task import SETTINGS
from dstrain.tasks.retrieval import POOLING

GRAPH = "model.onnx"  # in a folder that `dstrain export --onnx` wrote
ENDLESS = 2**31 - 1  # T5's positions are relative


@dataclass(frozen=True)
class Loaded:
    """A Transformers folder with a head, and what `dstrain ckpt export` wrote down of its recipe's data."""

    task: str
    model: Any  # Transformers' own, or a graph that answers as it does
    encoder: DocumentTokenizer
    length: int
    data: dict[str, Any]
    pooling: str = "mean"  # of a bi-encoder

    @property
    def separators(self) -> int:
        """[SEP]s between two texts."""
        return architecture_of(self.model.config).separators

    @torch.inference_mode()
    def batches(
        self, rows: Sequence[Ids], second_starts: Sequence[int], batch_rows: int
    ) -> Iterator[tuple[list[int], Any]]:
        """What the model makes of rows, those of like length together: the places of a batch's rows, and its outputs.

        Args:
            rows: ids of each.
            second_starts: where the second text of each begins; none of single texts.
            batch_rows: most rows that share a batch.
        """
        types = getattr(self.model.config, "type_vocab_size", 0) > 1 and len(second_starts) > 0
        for places in batches_by_length(rows, batch_rows):
            starts = [second_starts[place] for place in places] if types else ()
            part = [rows[place] for place in places]
            yield places, self.model(**padded(part, self.encoder.pad_id, self.length, starts, multiple=1))


def transformers_folder(model: Path) -> Path:
    """The Transformers folder that MODEL stands for: itself, or the `export` in a run's folder.

    Raises:
        UserError: it is a run's folder without an export.
    """
    if not (model / "recipe.yaml").is_file() or (model / "config.json").is_file():
        return model
    export = model / "export"
    if not (export / "config.json").is_file():
        raise UserError(f"{model} is a run that was not exported yet; run: dstrain ckpt export {model} --out {export}")
    return export


def load(folder: Path) -> Loaded:
    """Load the model of a Transformers folder in fp32.

    Raises:
        UserError: there is none in it, or one without a head that predicts (its predictions would be random).
    """
    remedy = "give a folder that `dstrain ckpt export` wrote from a fine-tuning run"
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; {remedy}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, so it is no Transformers folder; {remedy}")
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        names = config.architectures or []
        task = _task_of(folder, names)
        if task is None:
            raise UserError(f"{folder} holds {' or '.join(names) or 'a model'} without a classification head; {remedy}")
        definition = TASKS[task]
        if (folder / GRAPH).is_file():
            from dstrain.predict.onnx_model import OnnxModel

            model: Any = OnnxModel(folder, folder / GRAPH)
        else:
            auto_model = imported(definition.auto_model)
            model = auto_model.from_pretrained(folder, config=config, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} cannot be loaded: {error}; {remedy}") from error
    data = _settings(folder).get("data", {})
    encoder = load_document_tokenizer(folder, text_to_text=definition.writes_text)
    return Loaded(task, model, encoder, longest_text(folder, model), data, _pooling(folder))


def _task_of(folder: Path, names: Sequence[str]) -> str | None:
    """The task whose head a model has: the one that the export says, if it may be, or the usual one."""
    told = str(_settings(folder).get("task"))
    if told in TASKS and _may_be_of(TASKS[told], folder, names):
        return told
    usual = (task for task, definition in TASKS.items() if definition.is_default)
    return next((task for task in usual if _may_be_of(TASKS[task], folder, names)), None)


def _may_be_of(definition: ExampleTaskDefinition, folder: Path, names: Sequence[str]) -> bool:
    needed = definition.required_file
    return any(name.endswith(definition.model_classes) for name in names) and (
        needed is None or (folder / needed).is_file()
    )


def _pooling(folder: Path) -> str:
    try:
        means = json.loads((folder / POOLING).read_bytes())
    except (OSError, ValueError):
        return "mean"
    return "cls" if means.get("pooling_mode_cls_token") else "mean"


def longest_text(folder: Path, model: Any) -> int:
    """Tokens of the longest text that the model takes: as training cut them, and no more than it has positions."""
    reads = getattr(model.config, "encoder", model.config)  # of a pair, the side that reads
    positions = int(getattr(reads, "max_position_embeddings", ENDLESS))
    positions -= architecture_of(reads).unused_positions
    try:
        trained = json.loads((folder / "tokenizer_config.json").read_bytes()).get("model_max_length")
    except (OSError, ValueError):
        trained = None
    return min(positions, trained) if isinstance(trained, int) else positions


def _settings(folder: Path) -> dict[str, Any]:
    """The recipe's `task` and `data` as the export wrote them down; nothing where another program made the folder."""
    try:
        settings: dict[str, Any] = json.loads((folder / SETTINGS).read_bytes())
        task, data = settings["task"], dict(settings["data"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SETTINGS} is damaged: {error}; export the run again") from error
    for key in RENAMED_KEYS.keys() & data.keys():
        raise UserError(f"{folder / SETTINGS}: {key} is now called {RENAMED_KEYS[key]}; rename it there")
    return {"task": task, "data": data}


def data_keys(loaded: Loaded, section: type[Any]) -> dict[str, Any]:
    """Keys of a recipe's `data` that prediction goes by; the files of training are not needed any more."""
    kept = {key: value for key, value in loaded.data.items() if key in section.model_fields}
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()}
    return {"sequence_length": loaded.length, **lists, "train": "-"}
