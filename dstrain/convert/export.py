"""Export: from a checkpoint to a plain Transformers folder, good only if it computes what training computed.

    fragments ─► one shard in memory, fp32 ─► its file in a staging folder ─► … ─► from_pretrained: the files, mapped
                                                                                     │ each tensor as in the fragments?
                                   documents in one packed or padded batch ─ logits ─┤
                                                       each document alone ─ logits ─┘ agree to 1e-4?
                                                                   then the staging folder is renamed

One process without a process group does it, whatever the ZeRO stage and the number of ranks of the run. It holds one
shard, and after that files which the kernel may let go of; never the model. Adapters are merged into a model that is
held whole: there the first logits are those before, on the trained model.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils import logging as transformers_logging

from dstrain.base.storage import Place
from dstrain.checkpoint.fragments import WEIGHT, saved_tensors
from dstrain.checkpoint.load import Pieces, Wanted, require_same_parameters
from dstrain.checkpoint.manifest import Manifest
from dstrain.checkpoint.run_recipe import recipe_of
from dstrain.errors import CheckpointError
from dstrain.model.lora import base_identity, merge_adapters
from dstrain.recipe.schema import Recipe
from dstrain.runtime.runtime import quiet_libraries
from dstrain.tasks.task import Task, task_class

LARGEST_DIFFERENCE = 1e-4  # of any logit, in fp32
SHARD_BYTES = 5 * 10**9  # of a safetensors file; a bigger model becomes several, with an index
LONGEST_DOCUMENT = 256  # tokens; longer than a sliding window


def export(checkpoint: Place, out: Path) -> float:
    """Write a verified checkpoint as a Transformers folder: config, safetensors in fp32, tokenizer.

    Args:
        checkpoint: a committed checkpoint of a run, whose recipe lies in the run's folder.
        out: where to; it must not exist or be empty.

    Returns:
        The largest difference between a logit of the trained and of the exported model.

    Raises:
        CheckpointError: `out` is taken or not writable, the checkpoint is of another model, or what Transformers reads
            of the folder has other weights or logits; nothing is left behind then.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder; remove it, or give another --out")
    recipe = recipe_of(checkpoint)
    if recipe is None:
        raise CheckpointError(f"{checkpoint}: no recipe.yaml beside it; give a checkpoint in a run's folder")
    task = task_class(recipe)
    quiet_libraries()
    transformers_logging.disable_progress_bar()
    pieces, logits = Pieces(checkpoint, Manifest.read(checkpoint)), None
    staging = out.with_name(f".staging-{out.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        if recipe.model.lora is not None:
            logits = write_merged(task, recipe, pieces, staging)
        else:
            write_model(task, pieces, staging)
        task.save_extras(recipe, staging)
        for path in staging.iterdir():  # safetensors makes files that only their owner can read
            if path.is_file():
                path.chmod((staging / "config.json").stat().st_mode)
        exported: Any = task.auto_model.from_pretrained(staging, dtype=torch.float32, local_files_only=True).eval()
        if logits is None:
            require_same_weights(exported, pieces, task.exported_part)
        difference, model_type = parity(task, logits, exported, recipe), exported.config.model_type
        del exported
        if not difference <= LARGEST_DIFFERENCE:  # NaN is not either
            raise CheckpointError(
                f"{checkpoint} is not exported: a logit of the exported model differs from the trained model's by "
                f"{difference:.2e}, more than {LARGEST_DIFFERENCE:.0e}; the weights may have diverged (see the loss in "
                f"metrics.jsonl), or this version of Transformers computes {model_type} in another way"
            )
        staging.replace(out)
    except OSError as error:
        raise CheckpointError(f"{out}: not exported: {error}; make room there, or give another --out") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return difference


def write_model(task: type[Task], pieces: Pieces, folder: Path) -> None:
    """Write config and weights as `save_pretrained` would, from a model without memory, one shard after another.

    Raises CheckpointError where the checkpoint does not fit its config.
    """
    with torch.device("meta"):
        config = AutoConfig.for_model(**pieces.manifest.model_config)
        skeleton: PreTrainedModel = task.auto_model.from_config(config, dtype=torch.float32)
    prefix = task.exported_part
    tensors = _tensors_of(skeleton, pieces, prefix)
    skeleton.save_pretrained(folder, state_dict={})  # all but the weights
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        shard = {name: torch.empty(tensors[name].shape, dtype=tensors[name].dtype) for name in names}
        pieces.read(Wanted(tensor.view(-1), prefix + name, WEIGHT, 0) for name, tensor in shard.items())
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard  # before the next one comes
    if split.is_sharded:
        about = {"total_parameters": skeleton.num_parameters(), **split.metadata}
        index = {"metadata": about, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def write_merged(task: type[Task], recipe: Recipe, pieces: Pieces, folder: Path) -> list[Tensor]:
    """Write the model with its adapters merged into it; returns the logits on training's path before that.

    Raises:
        CheckpointError: it does not fit its config, or the base of its adapters is not what it was.
        UserError: the folder that the base comes from cannot be used.
    """
    manifest = pieces.manifest
    model = task.rebuilt(recipe, manifest.rng["seed"], manifest.model_config)
    if base_identity(model)["base"] != manifest.identity["base"]:
        raise CheckpointError(
            f"{pieces.folder} holds adapters of another model than model.pretrained={recipe.model.pretrained} is now; "
            f"put the weights back that they were trained on"
        )
    tensors = _tensors_of(model, pieces)
    pieces.read(Wanted(tensor.view(-1), name, WEIGHT, 0) for name, tensor in tensors.items())
    logits = task.training_logits(model.eval(), parity_documents(recipe, model))
    merge_adapters(model)
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    return logits


def _tensors_of(model: PreTrainedModel, pieces: Pieces, prefix: str = "") -> dict[str, Tensor]:
    """What a checkpoint holds of a model. Raises CheckpointError where this one is of another model.

    Args:
        model: the whole trained one, or the part of it whose names begin with `prefix` there.
        pieces: the checkpoint.
        prefix: see `Task.exported_part`.
    """
    tensors = saved_tensors(model)
    wanted = {prefix + name: {"shape": list(tensor.shape), "states": [WEIGHT]} for name, tensor in tensors.items()}
    saved = {name: about for name, about in pieces.manifest.parameters.items() if name.startswith(prefix)}
    require_same_parameters(pieces.folder, saved, wanted)
    return tensors


def require_same_weights(exported: PreTrainedModel, pieces: Pieces, prefix: str = "") -> None:
    """Refuse what Transformers has read from the folder, if a bit of it is not the checkpoint's."""
    for name, tensor in saved_tensors(exported).items():
        trained = torch.empty(tensor.shape, dtype=tensor.dtype)
        pieces.read_into(trained.view(-1), prefix + name, WEIGHT, 0)
        # as bytes: what is not a number is not equal to itself
        if not torch.equal(trained.view(-1).view(torch.uint8), tensor.detach().reshape(-1).view(torch.uint8)):
            raise CheckpointError(
                f"{pieces.folder} is not exported: this version of Transformers reads other values of {name} than were "
                f"written for it; install the one that dstrain's pyproject.toml asks for"
            )


def parity_documents(recipe: Recipe, model: PreTrainedModel) -> list[Tensor]:
    """Documents of random tokens, int64, always the same ones: from a long one to a single token."""
    longest = min(recipe.data.sequence_length, LONGEST_DOCUMENT)
    ids = torch.arange(model.get_input_embeddings().num_embeddings)
    ids = ids[ids != model.config.pad_token_id]  # RoBERTa gives padding no position
    generator = torch.Generator().manual_seed(0)
    lengths = sorted({longest, max(1, longest // 2), min(7, longest), 1}, reverse=True)
    return [ids[torch.randint(len(ids), (length,), generator=generator)] for length in lengths]


@torch.no_grad()
def parity(task: type[Task], logits: list[Tensor] | None, model: Any, recipe: Recipe) -> float:
    """Largest difference of any logit, each document alone through the exported model, from those of the trained one.

    `logits` are those on training's path; None: it is the exported model that takes this path.
    """
    documents = parity_documents(recipe, model)
    pairs = zip(logits or task.training_logits(model, documents), documents, strict=True)
    return max(float((there - task.logits_alone(model, ids)).abs().max()) for there, ids in pairs)
