"""Export: from a checkpoint to a plain Transformers folder, good only if it computes what training computed.

    fragments ─► the trained model, fp32 ──save──► staging folder ──from_pretrained──► a plain Transformers model
                       │ documents in one packed or padded batch        each document alone │
                       └────────────── logits agree to 1e-4? ───────────────────────────────┘
                                          then the staging folder is renamed

Of a model with adapters, the logits are those before the adapters are merged into its weights, which is what is saved.

One process without a process group does it, whatever the ZeRO stage and the number of ranks of the run.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dstrain.checkpoint.fragments import WEIGHT, saved_tensors
from dstrain.checkpoint.load import Pieces, Wanted, require_same_parameters
from dstrain.checkpoint.manifest import Manifest
from dstrain.checkpoint.run_recipe import recipe_of
from dstrain.checkpoint.store import Place
from dstrain.errors import CheckpointError
from dstrain.model.encoder import build_again
from dstrain.model.lora import base_identity, merge_adapters
from dstrain.recipe.schema import Recipe, SequenceToSequenceRecipe
from dstrain.tasks.task import Task, task_class
from dstrain.train.runtime import quiet_libraries

LARGEST_DIFFERENCE = 1e-4  # of any logit, in fp32
SHARD_BYTES = 5 * 10**9  # of a safetensors file; a bigger model becomes several, with an index
LONGEST_DOCUMENT = 256  # tokens; longer than a sliding window


def export(checkpoint: Place, out: Path) -> float:
    """Write a verified checkpoint as a Transformers folder: config, safetensors in fp32, tokenizer.

    Holds the model once: as trained until its logits are known, then as exported.

    Args:
        checkpoint: a committed checkpoint of a run, whose recipe lies in the run's folder.
        out: where to; it must not exist or be empty.

    Returns:
        The largest difference between a logit of the trained and of the exported model.

    Raises:
        CheckpointError: `out` is taken or not writable, the checkpoint is of another model, or the logits disagree;
            nothing is left behind then.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder; remove it, or give another --out")
    recipe = recipe_of(checkpoint)
    if recipe is None:
        raise CheckpointError(f"{checkpoint}: no recipe.yaml beside it; give a checkpoint in a run's folder")
    task = task_class(recipe)
    quiet_libraries()
    transformers_logging.disable_progress_bar()
    trained = trained_model(checkpoint, task, recipe)
    staging = out.with_name(f".staging-{out.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        documents, model_type = parity_documents(recipe, trained), trained.config.model_type
        with torch.no_grad():
            logits = task.training_logits(trained, documents)
        merge_adapters(trained)
        trained.save_pretrained(staging, max_shard_size=SHARD_BYTES)
        task.save_extras(recipe, staging)
        for path in staging.iterdir():  # safetensors makes files that only their owner can read
            if path.is_file():
                path.chmod((staging / "config.json").stat().st_mode)
        del trained
        difference = parity(task, logits, staging, documents)
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


@torch.no_grad()
def trained_model(checkpoint: Place, task: type[Task], recipe: Recipe) -> PreTrainedModel:
    """The model of a checkpoint in fp32, ready to predict, with its adapters where it has some.

    Raises:
        CheckpointError: it does not fit its config, or the base of its adapters is not what it was.
        UserError: the folder that the base comes from cannot be used.
    """
    manifest = Manifest.read(checkpoint)
    config = AutoConfig.for_model(**manifest.model_config)
    model: PreTrainedModel
    if recipe.model.lora is None or isinstance(recipe, SequenceToSequenceRecipe):
        model = task.auto_model.from_config(config, dtype=torch.float32)
    else:
        model = build_again(recipe.model, manifest.rng["seed"], config, task.auto_model)
        if base_identity(model)["base"] != manifest.identity["base"]:
            raise CheckpointError(
                f"{checkpoint} holds adapters of another model than model.pretrained={recipe.model.pretrained} is now; "
                f"put the weights back that they were trained on"
            )
    tensors = saved_tensors(model)
    wanted = {name: {"shape": list(tensor.shape), "states": [WEIGHT]} for name, tensor in tensors.items()}
    require_same_parameters(checkpoint, manifest.parameters, wanted)
    Pieces(checkpoint, manifest).read(Wanted(tensor.view(-1), name, WEIGHT, 0) for name, tensor in tensors.items())
    return model.eval()


def parity_documents(recipe: Recipe, model: PreTrainedModel) -> list[Tensor]:
    """Documents of random tokens, int64, always the same ones: from a long one to a single token."""
    longest = min(recipe.data.sequence_length, LONGEST_DOCUMENT)
    ids = torch.arange(model.get_input_embeddings().num_embeddings)
    ids = ids[ids != model.config.pad_token_id]  # RoBERTa gives padding no position
    generator = torch.Generator().manual_seed(0)
    lengths = sorted({longest, max(1, longest // 2), min(7, longest), 1}, reverse=True)
    return [ids[torch.randint(len(ids), (length,), generator=generator)] for length in lengths]


@torch.no_grad()
def parity(task: type[Task], logits: list[Tensor], folder: Path, documents: list[Tensor]) -> float:
    """Largest difference from the training path's logits, each document alone through the exported folder."""
    exported: Any = task.auto_model.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    pairs = zip(logits, documents, strict=True)
    return max(float((there - task.logits_alone(exported, ids)).abs().max()) for there, ids in pairs)
