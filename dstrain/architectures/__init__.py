"""What is known of model architectures: one file for each, and what is worked out from it without building a model.

`ARCHITECTURES` has them by name, those of other installed packages too; docs/extending.md shows how to write one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from dstrain.architectures._architecture import Architecture, EncoderArchitecture, Seq2SeqArchitecture, Shape
from dstrain.architectures._encoder_shape import EncoderShape
from dstrain.architectures._linears import Linears, decoder_linears, is_target, renamed_linears
from dstrain.architectures._packed_rows import PackedRows, additive_mask, document_mask, encode_rows
from dstrain.architectures._sections import Lora, ModelKeys, Unfreezing
from dstrain.architectures._seq2seq_shape import Seq2SeqShape
from dstrain.base.registry import Registry
from dstrain.errors import RecipeError, UserError

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "EncoderArchitecture",
    "EncoderShape",
    "Linears",
    "Lora",
    "ModelKeys",
    "PackedRows",
    "Seq2SeqArchitecture",
    "Seq2SeqShape",
    "Shape",
    "Unfreezing",
    "additive_mask",
    "architecture_of",
    "checked_architecture",
    "decoder_linears",
    "document_mask",
    "dropout_keys",
    "encode_rows",
    "encoder_architecture",
    "frozen_parameters",
    "installed_architectures",
    "installed_encoders",
    "installed_seq2seq",
    "is_target",
    "lora_parameters",
    "lora_targets",
    "model_shape",
    "parameters_of",
    "renamed_linears",
    "seq2seq_architecture",
]

ARCHITECTURES: Registry[Architecture] = Registry("architecture", Architecture, "dstrain.architectures")


def installed_architectures() -> dict[str, Architecture]:
    """All architectures by name, but for broken ones, which `checked_architecture` refuses where a recipe names one."""
    architectures: dict[str, Architecture] = {}
    for name in ARCHITECTURES:
        try:
            architectures[name] = checked_architecture(name)
        except UserError:
            continue
    return architectures


def installed_encoders() -> dict[str, EncoderArchitecture]:
    """Those of `installed_architectures` that are encoders."""
    known = installed_architectures().items()
    return {name: architecture for name, architecture in known if isinstance(architecture, EncoderArchitecture)}


def installed_seq2seq() -> dict[str, Seq2SeqArchitecture]:
    """Those of `installed_architectures` that have a decoder."""
    known = installed_architectures().items()
    return {name: architecture for name, architecture in known if isinstance(architecture, Seq2SeqArchitecture)}


def checked_architecture(name: str) -> Architecture:
    """The architecture of this name.

    Raises:
        UserError: it is another package's, which cannot be imported, or whose recipes could not name it.
    """
    architecture = ARCHITECTURES[name]
    missing = [
        key for key in ("section", "config", "linears", "lora_targets", "dropouts") if not hasattr(architecture, key)
    ]
    if isinstance(architecture, EncoderArchitecture) and not hasattr(architecture, "head_modules"):
        missing.append("head_modules")
    if missing:
        raise UserError(
            f"architecture {name}: {type(architecture).__name__} lacks {', '.join(missing)}; add them to it"
        )
    if architecture.name != name:
        raise UserError(
            f"architecture {name} is registered under another name than its section allows, {architecture.name}; "
            f"give the entry point and the section's Literal one name"
        )
    return architecture


class _Other(Architecture):
    """Stands for a model of Transformers that no recipe can have, and says of it what holds for most."""

    def shape(self, config: Mapping[str, Any]) -> Shape:
        """See `Architecture`."""
        raise UserError(
            f"dstrain knows no architecture {config.get('model_type')}; use one of {', '.join(ARCHITECTURES)}"
        )


def architecture_of(config: Any) -> Architecture:
    """That of a model by its Transformers config; one with all defaults where no recipe can have such a model."""
    return ARCHITECTURES.get(config.model_type) or _Other()


def encoder_architecture(name: str) -> EncoderArchitecture:
    """The encoder of this name, which a valid recipe or a model built of one has."""
    architecture = ARCHITECTURES[name]
    assert isinstance(architecture, EncoderArchitecture), f"{name} is no encoder"
    return architecture


def seq2seq_architecture(name: str) -> Seq2SeqArchitecture:
    """The encoder with a decoder of this name, which a valid recipe or a model built of one has."""
    architecture = ARCHITECTURES[name]
    assert isinstance(architecture, Seq2SeqArchitecture), f"{name} has no decoder"
    return architecture


def model_shape(model: ModelKeys) -> Shape:
    """Return the shape of a recipe's model: of its config, or of the folder that its weights come from.

    Raises:
        RecipeError: the folder has no readable config.json.
    """
    if model.config is not None:
        config = model.config.model_dump()
    else:
        assert model.pretrained is not None
        config = _pretrained_config(Path(model.pretrained)) | dropout_keys(model)
    return ARCHITECTURES[model.architecture].recipe_shape(model, config)


def dropout_keys(model: ModelKeys) -> dict[str, float]:
    """The keys of a Transformers config that `model.dropout` sets; none where it is null."""
    return {} if model.dropout is None else dict.fromkeys(ARCHITECTURES[model.architecture].dropouts, model.dropout)


def parameters_of(model: ModelKeys, shape: Shape, objective: str, labels: int = 2) -> dict[str, int]:
    """Return the shape's parameters by part and, where the recipe's model has some, those of its `adapters`."""
    counts = shape.parameters(objective, labels)
    return counts if model.lora is None else counts | {"adapters": lora_parameters(shape, model.lora)}


def frozen_parameters(model: ModelKeys, shape: Shape) -> int:
    """Return the exact number of parameters that are not trained: embeddings and layers, by frozen_layers or lora."""
    if isinstance(shape, Seq2SeqShape):
        total = sum(shape.parameters("sequence_to_sequence").values())
        return shape.fixed if model.lora is None else total - shape.top_parameters
    layers = shape.layers if model.lora is not None else model.frozen_layers
    return shape.frozen_parameters(layers) if layers else 0


def lora_targets(architecture: str, lora: Lora) -> tuple[str, ...]:
    """What the names of linear layers with an adapter end in."""
    return lora.target_modules or ARCHITECTURES[architecture].lora_targets


def lora_parameters(shape: Shape, lora: Lora) -> int:
    """Return the parameters of all adapters: for each linear layer, rank × (its inputs + its outputs)."""
    targets, total = lora_targets(shape.architecture, lora), 0
    for layers, linears in zip(shape.layer_counts, ARCHITECTURES[shape.architecture].linears, strict=True):
        for name, (inputs, outputs, times) in linears.items():
            if is_target(name, targets) and shape.has_linear(name):
                total += layers * (int(getattr(shape, inputs)) + times * int(getattr(shape, outputs)))
    return lora.rank * total


def _pretrained_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a Transformers folder."""
    remedy = "point to a Transformers folder (`dstrain ckpt export` makes one)"
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except OSError as error:
        raise RecipeError(f"model.pretrained={folder}: config.json: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise RecipeError(f"model.pretrained={folder}: config.json is not JSON: {error}; {remedy}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"model.pretrained={folder}: config.json is not a JSON object; {remedy}")
    return cast("dict[str, Any]", config)
