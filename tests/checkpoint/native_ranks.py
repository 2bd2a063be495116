"""What other programs do: train BERT with DeepSpeed or Accelerate alone and save in their own forms. Runs on ranks."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

State = dict[str, dict[str, NDArray[np.float32]]]  # parameter → state → all its elements
TAG, UNIVERSAL = "global_step3", "global_step3_universal"
STEPS = 3
DEEPSPEED = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 10**9,
}


def tiny_bert() -> BertForMaskedLM:
    """The model of the tests' tiny recipe."""
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Biases and LayerNorms do not decay, as most training scripts have it."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if name.endswith("bias") or "LayerNorm" in name]
    decayed = [p for name, p in named if not (name.endswith("bias") or "LayerNorm" in name)]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def rows(rank: int) -> dict[str, Tensor]:
    """Two rows to learn by heart."""
    ids = torch.randint(5, 256, (2, 16), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "labels": ids}


def train_all(rank: int, world_size: int, folder: Path, configs: dict[str, dict[str, Any]]) -> dict[str, State]:
    """`train_natively` under each of some configurations; rank 0 makes a universal checkpoint of each besides."""
    states = {name: train_natively(rank, world_size, folder / name, config) for name, config in configs.items()}
    torch.distributed.barrier()
    if rank == 0:
        from deepspeed.checkpoint.ds_to_universal import main

        for name in configs:
            main(
                Namespace(
                    input_folder=str(folder / name / TAG), output_folder=str(folder / name / UNIVERSAL),
                    num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
                    inject_missing_state=True,
                )
            )  # fmt: skip
    return states


def train_with_accelerate(rank: int, world_size: int, folder: Path) -> State:
    """Train under Accelerate without DeepSpeed, `save_state`, and return the whole state."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = tiny_bert()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups(model), lr=1e-3))
    for _ in range(STEPS):
        accelerator.backward(model(**rows(rank)).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder))
    inner = optimizer.optimizer.state
    return {
        name: {"weight": flat(parameter), "exp_avg": flat(inner[parameter]["exp_avg"])}
        | {"exp_avg_sq": flat(inner[parameter]["exp_avg_sq"])}
        for name, parameter in accelerator.unwrap_model(model).named_parameters()
    }


def flat(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().numpy().ravel().copy()


def train_natively(rank: int, world_size: int, folder: Path, config: dict[str, Any]) -> State:
    """Train under DeepSpeed alone, `save_checkpoint`, and return the whole state by DeepSpeed's own accessors."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from dstrain.runtime.runtime import _spare_deepspeed

    _spare_deepspeed()
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)
    model = tiny_bert()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**DEEPSPEED, **config})
    for _ in range(STEPS):
        engine.backward(engine(**rows(rank)).loss)
        engine.step()
    engine.save_checkpoint(str(folder), tag=TAG)
    if int(engine.zero_optimization_stage()) < 3:  # it links the moments of the first parameter group only
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    state: State = {}
    for name, parameter in model.named_parameters():
        found = {"weight": safe_get_full_fp32_param(parameter)}
        found |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in ("exp_avg", "exp_avg_sq")}
        state[name] = {kind: flat(tensor) for kind, tensor in found.items()}
    engine.destroy()
    return state
