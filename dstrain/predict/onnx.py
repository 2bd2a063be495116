"""ONNX: a Transformers folder as one graph that onnxruntime runs without torch, good only if it computes the same.

    Transformers folder ─► torch.onnx ─► model.onnx ─► logits agree to 1e-4 on batches of several shapes? ─► folder
                                             └─ --int8: weights as 8-bit integers; what that costs is measured on texts

The folder has config and tokenizer beside model.onnx, so `predict` and `serve` take it as they take any other.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from dstrain.architectures import architecture_of
from dstrain.errors import UserError
from dstrain.model.pooling import AutoEncoder
from dstrain.predict.loaded import GRAPH
from dstrain.predict.onnx_model import OnnxModel
from dstrain.tasks.example_task import SETTINGS
from dstrain.tasks.retrieval import POOLING

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # the last only where the model tells two texts apart by it
LARGEST_DIFFERENCE = 1e-4  # of any output, relative to the largest one where that is above 1
SHAPES = ((1, 2), (1, 9), (3, 33), (2, 128))  # rows, tokens; cut to the model's positions
COPIED = (
    "config.json",
    SETTINGS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    str(POOLING),
)


def export_onnx(folder: Path, out: Path, *, int8: bool) -> float:
    """Write a Transformers folder as ONNX.

    Args:
        folder: of the model, with its head.
        out: where to; it must not exist or be empty.
        int8: whether weights of matrix products become 8-bit integers, scaled by column, after the comparison in fp32.

    Returns:
        The largest difference between an output of the graph in fp32 and of the model.

    Raises:
        UserError: `out` is taken, there is no such model, or the graph computes something else; nothing is left behind.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; remove it, or give another --out")
    model = load_with_head(folder)
    staging = out.with_name(f".staging-{out.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        for name in COPIED:
            if (folder / name).is_file():
                (staging / name).parent.mkdir(exist_ok=True)
                shutil.copy(folder / name, staging / name)
        _write_graph(model, staging / GRAPH)
        difference = largest_difference(model, OnnxModel(staging, staging / GRAPH))
        if not difference <= LARGEST_DIFFERENCE:  # NaN is not either
            raise UserError(
                f"{folder} is not exported: an output of the graph differs by {difference:.2e} from the model's, more "
                f"than {LARGEST_DIFFERENCE:.0e}; this version of torch may translate {model.config.model_type} wrongly"
            )
        if int8:
            _quantize(staging / GRAPH)
        staging.replace(out)
    except OSError as error:
        raise UserError(f"{out}: not exported: {error}; make room there, or give another --out") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return difference


def load_with_head(folder: Path) -> PreTrainedModel:
    """The model of a folder in fp32, of the class that its config names. Raises UserError where there is none."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, so it is no Transformers folder; give one, or an exported run's")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = getattr(transformers, (config.architectures or ["none"])[0], None)
        if (folder / POOLING).is_file():
            kind = AutoEncoder
        if kind is None:
            raise UserError(f"{folder}/config.json names no architecture of this version of Transformers")
        if config.is_encoder_decoder:
            raise UserError(
                f"{folder} holds a {config.model_type}, which writes text in many steps, and only models of one step "
                f"become ONNX; use the Transformers folder with `dstrain predict` and `dstrain serve`"
            )
        model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} cannot be loaded: {error}") from error
    return model.eval()


@torch.inference_mode()
def largest_difference(model: PreTrainedModel, graph: OnnxModel) -> float:
    """Largest difference of any output that is not padding, over batches of several shapes with padded rows."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for rows, tokens in _shapes(model):
        ids = torch.randint(model.config.vocab_size, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, tokens // 2 + 1 :] = 0
        ids[mask == 0] = model.config.pad_token_id or 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        if _has_types(model):
            inputs["token_type_ids"] = torch.randint(2, (rows, tokens), generator=generator)
        here, there = graph(**inputs), model(**inputs)
        for name, expected in _outputs(there).items():
            found = getattr(here, name)
            if expected.shape[:2] == ids.shape:  # one for each token: what padding gets is nobody's business
                found, expected = found[mask == 1], expected[mask == 1]
            scale = max(1.0, float(expected.abs().max()))
            differences.append(float((found - expected).abs().max()) / scale)
    return max(differences)


def _shapes(model: PreTrainedModel) -> Iterator[tuple[int, int]]:
    longest = int(model.config.max_position_embeddings) - architecture_of(model.config).unused_positions
    yield from ((rows, min(tokens, longest)) for rows, tokens in SHAPES)


def _has_types(model: PreTrainedModel) -> bool:
    return getattr(model.config, "type_vocab_size", 0) > 1


def _outputs(outputs: Any) -> dict[str, Tensor]:
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


class _Plain(nn.Module):
    """The model as a function of its inputs in their order, with a tuple of tensors for an answer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_outputs(self.model(**dict(zip(INPUTS, inputs, strict=False)))).values())


def _write_graph(model: PreTrainedModel, path: Path) -> None:
    longest = max(tokens for _, tokens in _shapes(model))
    ids = torch.ones(2, min(24, longest), dtype=torch.int64)
    with torch.inference_mode():
        names = list(_outputs(model(input_ids=ids, attention_mask=ids)))
    free = {
        0: torch.export.Dim("rows", min=1, max=2**16),
        1: torch.export.Dim("tokens", min=2, max=int(model.config.max_position_embeddings)),
    }
    given = list(INPUTS if _has_types(model) else INPUTS[:2])
    with _quiet():
        torch.onnx.export(
            _Plain(model),
            tuple(torch.ones_like(ids) for _ in given),
            str(path),
            dynamo=True,
            input_names=given,
            output_names=names,
            dynamic_shapes={"inputs": tuple(free for _ in given)},
            external_data=False,
            verbose=False,
        )


def _quantize(path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = path.with_name("whole.onnx")
    path.replace(whole)
    with _quiet():
        quantize_dynamic(whole, path, weight_type=QuantType.QInt8, per_channel=True)
    whole.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporter and quantiser warn of their own business."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
