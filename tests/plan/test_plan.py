import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from planned import classification, masked_lm, mixed
from torch.utils.flop_counter import FlopCounterMode

from dstrain.architectures import ARCHITECTURES, EncoderShape, frozen_parameters, model_shape, parameters_of
from dstrain.data.tokens import DocumentTokenizer
from dstrain.errors import RecipeError
from dstrain.model.encoder import build_model
from dstrain.model.pooling import AutoEncoder
from dstrain.model.sparse import SparseMaskedLm, SparsePreTraining
from dstrain.model.text_to_text import build_text_to_text
from dstrain.plan import (
    activation_bytes,
    checkpoint_bytes,
    deepspeed_config,
    masked_per_row,
    pairs_per_row,
    rank_memory,
    step_flops,
)
from dstrain.plan.attention import MATMUL_TOKENS, attention_of
from dstrain.plan.corpus import CorpusSize
from dstrain.plan.text import make_plan, plan_json, plan_text
from dstrain.recipe.rules import broken_rules
from dstrain.recipe.schema import MaskedLmRecipe, Recipe, SequenceToSequenceRecipe
from dstrain.tasks.sequence_to_sequence import Writer
from dstrain.train.optim import freeze

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {
    "bert": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256},
    "modernbert": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96},
}
SMALL["roberta"] = SMALL["bert"]


# ---------------------------------------------------------------- parameters and FLOPs, against the built model


AUTO_MODELS = {
    "masked_lm": transformers.AutoModelForMaskedLM,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
    "token_classification": transformers.AutoModelForTokenClassification,
    "question_answering": transformers.AutoModelForQuestionAnswering,
    "sentence_extraction": transformers.AutoModelForTokenClassification,
    "retrieval": AutoEncoder,
}


def shapes() -> Iterator[tuple[str, dict[str, Any]]]:
    for architecture in ("bert", "roberta", "modernbert"):
        yield architecture, {}
        yield architecture, SMALL[architecture]
        yield architecture, SMALL[architecture] | {"vocab_size": 1001, "num_hidden_layers": 1}
    biases = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "decoder_bias": False}
    yield "modernbert", SMALL["modernbert"] | biases
    yield "bert", SMALL["bert"] | {"type_vocab_size": 1, "max_position_embeddings": 77}


@pytest.mark.parametrize(("architecture", "config"), list(shapes()))
@pytest.mark.parametrize("task", AUTO_MODELS)
@pytest.mark.slow
def test_parameter_counts_are_exact(architecture: str, config: dict[str, Any], task: str) -> None:
    section = masked_lm(architecture, config).model
    assert section.config is not None
    special_ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    built = transformers.AutoConfig.for_model(architecture, **section.config.model_dump(), **special_ids, num_labels=5)
    with torch.device("meta"):
        model = AUTO_MODELS[task].from_config(built)
    model.tie_weights()
    counts = model_shape(section).parameters(task, labels=5)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    layers = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".layers." in f".{name}" or ".layer." in name
    )
    assert counts["encoder layers"] == layers


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize(
    "keys",
    [
        {"lora": {"rank": 3}},
        {"lora": {"rank": 2, "target_modules": ["output.dense", "Wo", "Wi", "intermediate.dense"]}},
        {"frozen_layers": 1},
        {"frozen_layers": 2},
    ],
)
@pytest.mark.parametrize("task", ["masked_lm", "retrieval"])  # with a head, and without
@pytest.mark.slow
def test_what_is_frozen_is_counted_exactly(architecture: str, keys: dict[str, Any], task: str) -> None:
    if "lora" in keys and (targets := keys["lora"].get("target_modules")):
        mine = [target for target in targets if (architecture == "modernbert") == target.startswith("W")]
        keys = {"lora": keys["lora"] | {"target_modules": mine}}
    section = masked_lm(architecture, SMALL[architecture] | {"num_hidden_layers": 2}, model=keys).model
    model = build_model(section, 0, {"pad_token_id": 0}, auto=AUTO_MODELS[task])
    freeze(model, section.frozen_layers)
    shape = model_shape(section)
    total = sum(parameters_of(section, shape, task).values())
    assert total == sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert frozen_parameters(section, shape) == frozen > 0


BART = {"d_model": 64, "encoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("t5", {}),
    ("t5", {"d_model": 64, "d_kv": 24, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 3, "vocab_size": 500}),
    ("t5", {"d_model": 64, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8}),
    ("bart", {}),
    ("bart", BART | {"encoder_layers": 2, "decoder_layers": 3, "vocab_size": 500}),
    ("marian", {}),
    ("marian", BART | {"decoder_layers": 1, "max_position_embeddings": 77}),
    ("encoder-decoder", {}),
    ("encoder-decoder", SMALL["bert"] | {"vocab_size": 500}),
]


def pair(architecture: str, config: dict[str, Any], lengths: tuple[int, int] = (48, 20), **model: Any) -> Any:
    values = masked_lm().model_dump(mode="json", by_alias=True, exclude={"phases"}) | {
        "task": "sequence_to_sequence",
        "model": {"architecture": architecture, "config": config, **model},
        "data": {"train": "a", "valid": "b", "sequence_length": lengths[0], "target_length": lengths[1]},
        "train": {"global_batch_rows": 32, "micro_batch_rows": 4, "steps": 10, "precision": "fp32"},
    }
    return SequenceToSequenceRecipe.model_validate_json(json.dumps(values))


def built_pair(section: Any) -> Any:
    """The model as training builds it, without memory for its weights."""
    tokenizer = SimpleNamespace(
        begin=(1,),
        pad_id=0,
        vocab_size=400,
        special_token_ids={"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    return build_text_to_text(section, 0, cast(DocumentTokenizer, tokenizer))


@pytest.mark.parametrize(("architecture", "config"), PAIRS)
def test_parameter_counts_of_pairs_are_exact(architecture: str, config: dict[str, Any]) -> None:
    fewer = {"decoder_layers": 2} if architecture == "encoder-decoder" and config else {}
    section = pair(architecture, config, **fewer).model
    with torch.device("meta"):
        model = built_pair(section)
    counts = model_shape(section).parameters("sequence_to_sequence")
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert frozen_parameters(section, model_shape(section)) == frozen
    found = ARCHITECTURES[architecture].shape(json.loads(json.dumps(model.config.to_dict())))
    assert found == model_shape(section), "an exported folder has the shape of its recipe"


@pytest.mark.parametrize(("architecture", "config"), [(name, config) for name, config in PAIRS if config])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.slow
def test_adapters_of_pairs_are_counted_exactly(architecture: str, config: dict[str, Any], everywhere: bool) -> None:
    targets = ARCHITECTURES[architecture].linear_names() if everywhere else []
    section = pair(architecture, config | {"vocab_size": 500}, lora={"rank": 3, "target_modules": targets}).model
    with torch.device("meta"):
        model = built_pair(section)
    shape = model_shape(section)
    counts = parameters_of(section, shape, "sequence_to_sequence")
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert frozen_parameters(section, shape) == frozen > 0


@pytest.mark.parametrize(("architecture", "config"), [(name, config) for name, config in PAIRS if config])
@pytest.mark.slow
def test_flops_and_activations_of_pairs(architecture: str, config: dict[str, Any]) -> None:
    recipe = pair(architecture, config | {"vocab_size": 500}, attention="eager")
    rows, source, target = 4, recipe.data.sequence_length, recipe.data.target_length
    writer = Writer(built_pair(recipe.model).train(), 0.0)
    ids, labels = torch.randint(5, 100, (rows, source)), torch.randint(5, 100, (rows, target))
    with FlopCounterMode(display=False) as counter, kept_of(writer) as kept:
        writer(labels=labels, input_ids=ids, attention_mask=torch.ones_like(ids))
    flops, shape = step_flops(recipe, model_shape(recipe.model)), model_shape(recipe.model)
    pooler = 2 * rows * shape.hidden_size**2 if architecture == "encoder-decoder" else 0
    assert flops.forward * rows * (source + target) == pytest.approx(counter.get_total_flops() - pooler, rel=1e-9)
    stated = activation_bytes(recipe, shape, checkpointing=False, on_cpu=True) - rows * target * 500 * 8
    found = kept_sum(kept)
    assert stated == pytest.approx(found, rel=0.25)
    again = activation_bytes(recipe, shape, checkpointing=True, on_cpu=True)
    assert rows * target * 500 * 8 < again < stated + rows * target * 500 * 8


def test_a_pair_is_planned_by_both_its_lengths() -> None:
    text = plan_text(make_plan(pair("bart", BART | {"encoder_layers": 2, "decoder_layers": 3}), 2, None))
    assert "2 ranks × 4 rows × 4 accumulation = 32 rows = 2,176 tokens" in text
    assert "4 rows of 68 tokens" in text
    assert "labels" not in text


def test_a_pretrained_folder_has_the_shape_of_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL["bert"] | {"model_type": "bert", "vocab_size": 99}))
    section = masked_lm(model={"config": None, "pretrained": str(tmp_path)}).model
    assert model_shape(section) == ARCHITECTURES["bert"].shape(SMALL["bert"] | {"vocab_size": 99})


def test_a_pretrained_folder_without_config_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"config\.json: No such file"):
        model_shape(masked_lm(model={"config": None, "pretrained": str(tmp_path)}).model)


def run(recipe: MaskedLmRecipe) -> tuple[SparseMaskedLm, tuple[torch.Tensor, ...]]:
    """Build a recipe's model, and a micro-batch of two documents to a row."""
    rows, length = recipe.train.micro_batch_rows, recipe.data.sequence_length
    model = build_model(recipe.model, 0, {"pad_token_id": 0}).train()
    if recipe.train.precision == "bf16":
        model = model.to(torch.bfloat16)
    input_ids = torch.randint(5, 100, (rows, length))
    position_ids = torch.arange(length).remainder(length // 2).expand(rows, -1)
    masked = torch.arange(masked_per_row(recipe.data.masking.rates[0], recipe.data.sequence_length)).expand(rows, -1)
    labels = torch.randint(5, 100, masked.shape)
    return SparseMaskedLm(model), (input_ids, position_ids, masked, labels)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
@pytest.mark.slow
def test_flops_are_those_that_torch_counts(architecture: str) -> None:
    config = SMALL[architecture] | {"vocab_size": 500}
    recipe = masked_lm(
        architecture, config, model={"attention": "eager"}, train={"micro_batch_rows": 2, "precision": "fp32"}
    )
    module, batch = run(recipe)
    with FlopCounterMode(display=False) as counter:
        loss, _ = module(*batch)
        forward = counter.get_total_flops()
        loss.backward()
    flops, tokens = step_flops(recipe, model_shape(recipe.model)), batch[0].numel()
    assert flops.forward * tokens == forward
    assert flops.model * tokens == pytest.approx(counter.get_total_flops(), rel=0.001)
    assert flops.executed == flops.model


def test_pairs_are_planned_exactly() -> None:
    config = SMALL["bert"] | {"vocab_size": 500, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    recipe = masked_lm(
        "bert",
        config,
        model={"attention": "eager"},
        train={"micro_batch_rows": 2, "precision": "fp32"},
        data={"pairs": {"objective": "sentence_order", "tokens": 64}},
    )
    model = build_model(recipe.model, 0, {"pad_token_id": 0}, auto=transformers.AutoModelForPreTraining)
    module, (_, batch) = SparsePreTraining(model), run(recipe)
    named = dict(zip(("input_ids", "position_ids", "masked_positions", "labels"), batch, strict=True))
    starts = torch.zeros(2, pairs_per_row(recipe, recipe.data.sequence_length), dtype=torch.int64)
    types, labels = torch.zeros_like(batch[0]), torch.ones_like(starts)
    with FlopCounterMode(display=False) as counter, kept_of(module) as kept:
        module(**named, token_type_ids=types, pair_starts=starts, pair_labels=labels)
    shape = model_shape(recipe.model)
    assert step_flops(recipe, shape).forward * batch[0].numel() == pytest.approx(counter.get_total_flops(), rel=1e-12)
    counts = parameters_of(recipe.model, shape, recipe.head)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in module.parameters())
    stated = activation_bytes(recipe, shape, checkpointing=False, on_cpu=True) - not_kept_bytes(recipe, shape)
    assert stated == pytest.approx(kept_sum(kept), rel=0.03)


@pytest.mark.parametrize("keys", [{"lora": {"rank": 4}}, {"frozen_layers": 2}])
def test_frozen_weights_spare_operations(keys: dict[str, Any]) -> None:
    config = SMALL["bert"] | {"vocab_size": 500, "num_hidden_layers": 4}
    recipe = masked_lm("bert", config, model={"attention": "eager", **keys}, train={"precision": "fp32"})
    module, batch = run(recipe)
    freeze(module, recipe.model.frozen_layers)
    with FlopCounterMode(display=False) as counter:
        loss, _ = module(*batch)
        forward = counter.get_total_flops()
        loss.backward()
    flops, tokens = step_flops(recipe, model_shape(recipe.model)), batch[0].numel()
    assert flops.forward * tokens == forward
    # The first layer that needs gradients needs none of what goes into it.
    assert 0.9 < counter.get_total_flops() / (flops.model * tokens) <= 1
    assert flops.model < 0.8 * 3 * flops.forward


def test_activation_checkpointing_runs_the_layers_once_more() -> None:
    plain, again = (
        step_flops(recipe, model_shape(recipe.model))
        for recipe in (masked_lm(), masked_lm(model={"activation_checkpointing": True}))
    )
    assert again.model == plain.model
    assert again.executed == plain.model + plain.matmuls + plain.attention


# ---------------------------------------------------------------- memory


def kept_bytes(recipe: MaskedLmRecipe) -> int:
    """Run a forward pass and add up what autograd keeps for the backward pass, parameters aside."""
    module, batch = run(recipe)
    if recipe.model.activation_checkpointing:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    with kept_of(module) as kept:
        module(*batch)
    return kept_sum(kept)


@contextmanager
def kept_of(module: torch.nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """The tensors that autograd keeps of what is run within, one for each storage, parameters aside."""
    kept: dict[int, torch.Tensor] = {}
    parameters = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def kept_sum(kept: dict[int, torch.Tensor]) -> int:
    """Bytes of their storages."""
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def not_kept_bytes(recipe: MaskedLmRecipe, shape: EncoderShape) -> int:
    """Return what `activation_bytes` counts and autograd does not keep."""
    element = 2 if recipe.train.precision == "bf16" else 4
    rows, length = recipe.train.micro_batch_rows, recipe.data.sequence_length
    modern, checkpointing = shape.architecture == "modernbert", recipe.model.activation_checkpointing
    not_kept = (
        rows
        * masked_per_row(recipe.data.masking.rates[0], recipe.data.sequence_length)
        * shape.vocab_size
        * (element + 4)
    )  # logits and their gradient
    if modern if checkpointing else recipe.model.attention != "sdpa":  # masks that stay, but not for autograd
        not_kept += (2 if modern else 1) * rows * length**2 * element
    if checkpointing:  # the layer that is run again
        inputs = rows * length * shape.hidden_size * element
        plain, checkpointed = (activation_bytes(recipe, shape, checkpointing=c, on_cpu=True) for c in (False, True))
        not_kept += (plain - checkpointed + shape.layers * inputs) // (shape.layers - 1)
    return not_kept


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "matmul", "eager"])
@pytest.mark.parametrize(
    ("architecture", "dropout"),
    [
        ("bert", {}),
        ("bert", {"attention_probs_dropout_prob": 0.0}),
        ("roberta", {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}),
        ("modernbert", {}),
    ],
)
@pytest.mark.slow
def test_activations_are_what_autograd_keeps(
    architecture: str, dropout: dict[str, float], attention: str, precision: str, checkpointing: bool
) -> None:
    recipe = masked_lm(
        architecture,
        SMALL[architecture] | {"vocab_size": 500, "hidden_size": 128} | dropout,
        model={"attention": attention, "activation_checkpointing": checkpointing},
        train={"precision": precision, "micro_batch_rows": 2},
        data={"sequence_length": 256},
    )
    shape = model_shape(recipe.model)
    stated = activation_bytes(recipe, shape, checkpointing=checkpointing, on_cpu=True) - not_kept_bytes(recipe, shape)
    assert stated == pytest.approx(kept_bytes(recipe), rel=0.03)


@pytest.mark.parametrize(
    ("precision", "tokens", "on_cpu", "chosen"),
    [
        ("bf16", MATMUL_TOKENS, True, "matmul"),
        ("bf16", MATMUL_TOKENS + 1, True, "sdpa"),
        ("fp32", 128, True, "sdpa"),
        ("bf16", 128, False, "sdpa"),
    ],
)
def test_attention_keeps_probabilities_only_where_that_is_faster_and_fits(
    precision: str, tokens: int, on_cpu: bool, chosen: str
) -> None:
    sections = {"train": {"precision": precision}, "data": {"sequence_length": tokens}}
    assert attention_of(masked_lm(**sections), on_cpu=on_cpu) == chosen
    assert attention_of(masked_lm(**sections, model={"attention": "eager"}), on_cpu=on_cpu) == "eager"
    longer = sections | {"data": {"sequence_length": 128}, "phases": [{"steps": 3}, {"steps": 3, **sections}]}
    longer["phases"][1].pop("train")
    assert attention_of(masked_lm(**longer), on_cpu=on_cpu) == chosen
    biased = pair("t5", {})  # its scores have more added to them than a mask
    assert attention_of(biased.model_copy(update={"train": masked_lm(**sections).train}), on_cpu=on_cpu) == "sdpa"
    asked = {"model.attention": "matmul", "model.architecture": "t5"}
    assert list(broken_rules(asked)) == [
        (tuple(asked), "is not offered for t5, only for bert, modernbert, roberta; use auto")
    ]


@pytest.mark.parametrize(
    ("precision", "stage", "parts"),
    [
        ("bf16", 0, (2000, 2000, 12000, 4000)),
        ("bf16", 1, (2000, 2000, 3000, 1000)),
        ("bf16", 2, (2000, 500, 3000, 1000)),
        ("bf16", 3, (500, 500, 3000, 1000)),
        ("fp32", 0, (4000, 4000, 8000, 0)),
        ("fp32", 1, (4000, 4000, 3000, 1000)),
        ("fp32", 3, (1000, 1000, 3000, 1000)),
    ],
)
def test_what_zero_divides(precision: str, stage: int, parts: tuple[int, ...]) -> None:
    memory = rank_memory(masked_lm(train={"precision": precision}), 1000, 500, world=4, stage=stage)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.step) == parts
    assert memory.total == sum(parts[:3]) + memory.buffers + max(500, memory.step)


def test_what_is_offloaded_moves_to_the_host() -> None:
    zero = {"stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"}
    memory = rank_memory(masked_lm(train={"zero": zero}), 1000, 0, world=4, stage=3)
    assert (memory.weights, memory.optimizer, memory.step) == (0, 0, 0)
    assert memory.host == 500 + 3000 + 1000
    assert rank_memory(masked_lm(train={"zero": zero}), 1000, 0, world=4, stage=2).host == 0


def test_a_trained_parameter_in_a_checkpoint_is_its_weight_and_the_optimizers_states(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    assert checkpoint_bytes(tiny_recipe(), 109_514_298) == 1_314_171_576
    assert checkpoint_bytes(tiny_recipe("optimizer={name: sgd, learning_rate: 0.1}"), 109_514_298) == 876_114_384


def test_an_optimizer_with_fewer_states_takes_less_memory(tiny_recipe: Callable[..., Recipe]) -> None:
    sgd = tiny_recipe("optimizer={name: sgd, learning_rate: 0.1}")
    saved = [
        rank_memory(tiny_recipe(), 1000, 0, 2, s).optimizer - rank_memory(sgd, 1000, 0, 2, s).optimizer for s in (0, 2)
    ]
    assert saved == [4000, 2000]


def test_frozen_parameters_take_weights_only() -> None:
    recipe = masked_lm(train={"precision": "bf16"})
    divided, whole = (rank_memory(recipe, 1000, 0, world=4, stage=stage, frozen=900) for stage in (2, 0))
    assert (divided.weights, divided.gradients, divided.optimizer) == (2000, 50, 300)
    assert (whole.weights, whole.gradients, whole.optimizer) == (2000, 200, 1200)
    assert rank_memory(recipe, 1000, 0, world=4, stage=3, frozen=900).weights == 500


# ---------------------------------------------------------------- DeepSpeed's config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_accepts_the_config_and_reads_the_same_numbers(stage: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    recipe = masked_lm(train={"zero": {"stage": stage}, "clip_grad_norm": 0.5})
    config = deepspeed_config(recipe, 8)
    assert "auto" not in json.dumps(config)
    assert config["train_batch_size"] == 512
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 16
    read = DeepSpeedConfig(config | {"train_batch_size": 4 * 16})  # of one rank: there is no process group here
    assert read.zero_optimization_stage == stage
    assert read.gradient_clipping == pytest.approx(config["gradient_clipping"])


def test_ranks_without_a_row_have_no_deepspeed_config() -> None:
    with pytest.raises(RecipeError, match=r"use 1 to 128 ranks, or data\.lanes=512"):
        deepspeed_config(masked_lm(), 513)


# ---------------------------------------------------------------- what is printed


def test_the_whole_text_of_a_plan() -> None:
    recipe = masked_lm(
        "bert",
        {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048},
        model={"activation_checkpointing": True},
        train={"zero": {"stage": 2}, "steps": 10_000},
    )
    text = plan_text(make_plan(recipe, 8, None))
    shown, _, config = text.partition("\n\nDeepSpeed's config\n")
    assert json.loads(config) == deepspeed_config(recipe, 8)
    assert shown == (GOLDEN / "plan.txt").read_text(encoding="utf-8").rstrip("\n")


def test_the_whole_text_of_a_plan_of_phases_and_sources() -> None:
    sources = {
        "web": {"weight": 3},
        "code": {"when_exhausted": "drop"},
        "books": {"weight": 0, "when_exhausted": "stop"},
    }
    phases = [
        {"name": "short", "steps": 600},
        {
            "name": "long",
            "tokens": 400_000,
            "data": {
                "sequence_length": 64,
                "masking": {"rate": {"from": 0.3, "to": 0.15}},
                "sources": {"web": 0.5, "books": 0.5},
            },
            "train": {"global_batch_rows": 16},
            "optimizer": {"learning_rate": 1e-4},
            "schedule": {"name": "one_minus_sqrt"},
            "model": {"global_rope_theta": 160_000},
        },
    ]
    recipe = mixed(sources, phases, architecture="modernbert", config=SMALL["modernbert"])
    corpora = {"web": CorpusSize(3_000_000, 5000), "code": CorpusSize(12_800, 16)}
    text = plan_text(make_plan(recipe, 3, corpora))
    shown, _, config = text.partition("\n\nDeepSpeed's config\n")
    assert json.loads(config)["train_batch_size"] == 9
    assert shown == (GOLDEN / "plan-phases.txt").read_text(encoding="utf-8").rstrip("\n")


def test_steps_are_unknown_until_the_corpus_is_indexed() -> None:
    plan = make_plan(masked_lm(train={"steps": None, "epochs": 40}), 8, None)
    assert "40 epochs; steps unknown until the corpus is indexed" in plan_text(plan)
    assert plan_json(plan)["steps"] is None


def test_the_json_has_the_numbers_of_the_text() -> None:
    report = json.loads(json.dumps(plan_json(make_plan(masked_lm(), 8, None))))
    (phase,) = report["phases"]
    assert phase["batch"] == {
        "world": 8,
        "global_batch_rows": 512,
        "fewest_rows": 64,
        "most_rows": 64,
        "micro_batch_rows": 4,
        "accumulation": 16,
        "tokens": 65_536,
        "used": 1.0,
    }
    assert (report["most_ranks"], report["steps"], report["tokens"]) == (128, 1000, 65_536_000)
    assert report["sources"] == {"train": {"tokens": None, "tokens_trained": 65_536_000, "epochs": None}}
    assert report["parameters"]["total"] == 109_514_298
    assert len(report["memory_bytes"]) == 8
    assert report["deepspeed"]["train_batch_size"] == 512


def test_a_classifier_is_planned_too() -> None:
    text = plan_text(make_plan(classification(epochs=2), 2, 128 * 3200))
    assert "200 steps × 4,096 tokens" in text
    assert "for 2 labels; a label more is hidden_size + 1 parameters more" in text
