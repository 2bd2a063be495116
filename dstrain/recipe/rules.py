"""Rules between keys. Each is a function of plain values that returns None, or what is wrong and what to do about it.

A rule names the keys it needs, the one to blame first, and is asked only when all of them are valid on their own. So
one pass reports everything that can be known to be wrong, and nothing that merely follows from another mistake.
"""

import codecs
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from dstrain.architectures import (
    ARCHITECTURES,
    EncoderArchitecture,
    installed_architectures,
    installed_encoders,
    is_target,
)
from dstrain.base.tracker import TRACKERS
from dstrain.optimizers import installed_optimizers
from dstrain.recipe.measured import not_measured
from dstrain.recipe.pair_slots import SHORTEST_PAIR

Verdict = str | None
_RULES: list[tuple[tuple[str, ...], Callable[..., Verdict]]] = []


def broken_rules(
    known: Mapping[str, Any], changed: Collection[str] | None = None
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield `(keys, sentence)` for each broken rule; the first key is the one to blame.

    Args:
        known: every valid value by dotted key, defaults included; a section is a mapping, or None where it is absent.
        changed: ask only the rules that have to do with these keys; None asks all.
    """
    for keys, verdict in _RULES:
        if all(key in known for key in keys) and (changed is None or any(key in changed for key in keys)):
            sentence = verdict(*(known[key] for key in keys))
            if sentence is not None:
                yield keys, sentence


def rule(*keys: str) -> Callable[[Callable[..., Verdict]], Callable[..., Verdict]]:
    """Register a function of these keys' values, in this order."""

    def register(verdict: Callable[..., Verdict]) -> Callable[..., Verdict]:
        _RULES.append((keys, verdict))
        return verdict

    return register


def nearest_multiples(value: int, of: int) -> str:
    """Return the multiples around `value`, as in "448 or 512"."""
    below = value // of * of
    return f"{below} or {below + of}" if below else f"{of}"


def nearest_divisors(value: int, of: int) -> str:
    """Return the divisors of `of` around `value`, as in "6 or 8"."""
    divisors = [d for d in range(1, math.isqrt(of) + 1) if of % d == 0]
    divisors += [of // d for d in divisors]
    below = max((d for d in divisors if d < value), default=None)
    above = min((d for d in divisors if d > value), default=None)
    return " or ".join(str(d) for d in (below, above) if d is not None)


# ---------------------------------------------------------------- data


@rule("data.skip_rows")
def _row_ranges_ascend(ranges: tuple[str, ...]) -> Verdict:
    for text in ranges:
        first, last = text.split("-")
        if int(first) > int(last):
            return f"holds {text}, which ends before it begins; write {last}-{first}"
    return None


@rule("data.valid", "data.validation_split", "data.folds")
def _one_held_out_set(valid: str | None, validation_split: float | None, folds: int | None) -> Verdict:
    given = {"data.valid": valid, "data.validation_split": validation_split, "data.folds": folds}
    beside = [f"{key}={value}" for key, value in given.items() if value is not None]
    if not beside:
        return (
            "and data.validation_split are both missing; give a file, or data.validation_split=0.1 to take a tenth of "
            "data.train, or data.folds=5"
        )
    if len(beside) > 1:
        return f"is one of {len(beside)} held-out sets ({', '.join(beside)}); keep one, set the others to null"
    return None


@rule("data.validation_split_by", "data.validation_split", "data.folds")
def _groups_are_held_out(validation_split_by: str | None, validation_split: float | None, folds: int | None) -> Verdict:
    if validation_split_by is not None and validation_split is None and folds is None:
        return "says how data.validation_split or data.folds are drawn, and neither is given; delete it, or give one"
    return None


@rule("data.fold", "data.folds")
def _fold_is_one_of_them(fold: int, folds: int | None) -> Verdict:
    if fold and folds is None:
        return "says which of data.folds is held out, and that is not given; use 0, or give data.folds"
    return f"is none of data.folds={folds}, which are numbered 0 to {folds - 1}" if folds and fold >= folds else None


@rule("data.truncation_side", "data.pair_field")
def _pairs_are_cut_at_the_end(truncation_side: str, pair_field: str | None) -> Verdict:
    if truncation_side != "end" and pair_field is not None:
        return (
            f"is for single texts, and data.pair_field={pair_field}: of a pair the longer text loses its end; use end"
        )
    return None


@rule("data.encoding")
def _encoding_exists(encoding: str) -> Verdict:
    try:
        codecs.lookup(encoding)
    except LookupError:
        return "is no encoding that Python knows; use utf-8, latin-1, gb18030 or the like"
    return None


@rule("loss.class_weights", "data.target")
def _weights_need_labels(weights: str, target: str) -> Verdict:
    if weights != "none" and target == "number":
        return "needs labels, and data.target=number has none; use none"
    return None


@rule("loss.label_smoothing", "data.target", "data.label_field")
def _smoothing_needs_one_label(smoothing: float, target: str, _field: str) -> Verdict:
    if smoothing and target != "label":
        return f"needs one label a text, and data.target={target}; use 0"
    return "leaves nothing of the labels; use less than 1, as in 0.1" if smoothing >= 1 else None


@rule("data.stride", "data.sequence_length")
def _windows_advance(stride: int, length: int) -> Verdict:
    if 2 * stride > length - 2:
        return (
            f"is more than half of the {length - 2} tokens of a row (data.sequence_length={length} less two specials); "
            f"use at most {max((length - 2) // 2, 0)}"
        )
    return None


@rule("data.question_length", "data.sequence_length")
def _questions_leave_room(question_length: int, length: int) -> Verdict:
    if 2 * question_length > length:
        return f"leaves less than half of data.sequence_length={length} for the text; use at most {length // 2}"
    return None


@rule("data.query_length", "data.sequence_length")
def _queries_fit(query_length: int, length: int) -> Verdict:
    return f"is more than data.sequence_length={length}; use at most that" if query_length > length else None


@rule("data.token_pattern")
def _pattern_has_a_token(pattern: str | None) -> Verdict:
    return _pattern_has_a_group(pattern, "token", "(.)[0-9]+")


@rule("data.label_pattern")
def _pattern_has_a_label(pattern: str | None) -> Verdict:
    return _pattern_has_a_group(pattern, "label", "(.+)/.*")


def _pattern_has_a_group(pattern: str | None, what: str, example: str) -> Verdict:
    if pattern is None:
        return None
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return f"is not a regular expression ({error}); correct it"
    return None if groups else f"has no group that holds the {what}; put it in brackets, as in {example}"


@rule("data.label_pattern", "data.target")
def _pattern_needs_one_label(pattern: str | None, target: str) -> Verdict:
    return f"needs one label a text, and data.target={target}; delete it" if pattern and target != "label" else None


@rule("model.frozen_layers", "data.target_length")
def _pairs_have_no_frozen_layers(frozen_layers: int, _length: int) -> Verdict:
    return "is for encoders, and this model has a decoder; use 0" if frozen_layers else None


@rule("loss.label_smoothing", "data.target_length")
def _smoothing_leaves_the_target(smoothing: float, _length: int) -> Verdict:
    return "leaves nothing of the targets; use less than 1, as in 0.1" if smoothing >= 1 else None


@rule("decoding.min_new_tokens", "data.target_length")
def _min_new_tokens_are_below_the_longest(min_new_tokens: int, longest: int) -> Verdict:
    if min_new_tokens >= longest:
        return f"leaves no room below data.target_length={longest}; use at most {longest - 1}"
    return None


@rule("data.source_field", "data.target_field")
def _source_is_not_target(source: str, target: str) -> Verdict:
    return "is data.target_field too; name two different fields" if source == target else None


@rule("data.labels", "data.target")
def _given_labels_differ(labels: tuple[str, ...], target: str) -> Verdict:
    if labels and target == "number":
        return "are given, and data.target=number has none; delete data.labels"
    doubled = sorted({label for label in labels if list(labels).count(label) > 1})
    if doubled:
        return f"holds {doubled[0]!r} twice; name each label once"
    return "names one label; give two or more" if len(labels) == 1 and target == "label" else None


@rule("data.left_out_labels", "data.labels", "data.target")
def _left_out_labels_are_others(left_out: tuple[str, ...], labels: tuple[str, ...], target: str) -> Verdict:
    if left_out and target != "label":
        return f"needs one label a text, and data.target={target}; delete it"
    both = sorted(set(left_out) & set(labels))
    return f"names {both[0]!r}, and so does data.labels; delete it from one of them" if both else None


@rule("data.min_confidence", "data.target")
def _rejection_needs_one_label(min_confidence: float, target: str) -> Verdict:
    return f"needs one label a text, and data.target={target}; use 0" if min_confidence and target != "label" else None


# ---------------------------------------------------------------- checkpoints


@rule("checkpoint.storage")
def _storage_is_a_store(storage: str | None) -> Verdict:
    if storage is None:
        return None
    protocol, _, rest = storage.partition("://")
    if not rest.strip("/") or protocol in ("", "file", "local", "memory"):
        return (
            "is no place in an object store; give a URL such as s3://bucket/runs/bert, or null: on a local or shared "
            "disk checkpoints are in the run's folder (--run-dir)"
        )
    return None


# ---------------------------------------------------------------- log


@rule("log.trackers")
def _trackers_are_installed(trackers: tuple[str, ...]) -> Verdict:
    unknown = [name for name in trackers if name not in TRACKERS]
    if not unknown:
        return None
    return (
        f"names {unknown[0]}, which is not one of {', '.join(TRACKERS)}; use one of them, or install the package that "
        f"brings it (entry point group {TRACKERS.group})"
    )


# ---------------------------------------------------------------- model


@rule("model.config", "model.pretrained")
def _one_origin_of_weights(config: Mapping[str, Any] | None, pretrained: str | None) -> Verdict:
    if config is not None and pretrained is not None:
        return "is given beside model.pretrained, and weights have one origin; delete one (or set it to null)"
    if config is None and pretrained is None:
        return (
            "and model.pretrained are both missing; give one of them (`config: {}` takes the architecture's defaults)"
        )
    return None


@rule("model.dropout", "model.config")
def _one_origin_of_dropout(dropout: float | None, config: Mapping[str, Any] | None) -> Verdict:
    if dropout is not None and config is not None:
        return "is for model.pretrained; set the keys of model.config that name a dropout instead"
    return None


@rule("model.frozen_layers", "model.lora")
def _adapters_freeze_all(frozen_layers: int, lora: Mapping[str, Any] | None) -> Verdict:
    if frozen_layers and lora is not None:
        return "is given beside model.lora, which freezes every layer but its adapters; use 0"
    return None


@rule("model.unfreezing.every_steps", "model.unfreezing.every_epochs", "train.epochs")
def _one_pace_of_unfreezing(steps: int | None, every_epochs: float | None, epochs: float | None) -> Verdict:
    if (steps is None) == (every_epochs is None):
        return "and model.unfreezing.every_epochs: give exactly one of them, as in every_epochs: 1"
    if every_epochs is not None and epochs is None:
        return "is null, and model.unfreezing.every_epochs needs a length in train.epochs; give every_steps"
    return None


@rule("model.lora.target_modules", "model.architecture")
def _targets_exist(targets: list[str], architecture: str) -> Verdict:
    layers = ARCHITECTURES[architecture].linear_names()
    missing = next((target for target in targets if not any(is_target(name, [target]) for name in layers)), None)
    if missing is not None:
        return f"holds {missing!r}, and no linear layer of {architecture} ends so; it has {', '.join(layers)}"
    return None


@rule("model.attention", "model.architecture")
def _attention_is_offered(attention: str, architecture: str) -> Verdict:
    if attention != "auto" and attention not in ARCHITECTURES[architecture].attentions:
        others = [name for name, known in installed_architectures().items() if attention in known.attentions]
        return f"is not offered for {architecture}, only for {', '.join(others)}; use auto"
    return None


@rule("model.architecture", "task")
def _documents_are_kept_apart(architecture: str, task: str) -> Verdict:
    known = ARCHITECTURES[architecture]
    if task == "masked_lm" and isinstance(known, EncoderArchitecture) and not known.takes_packed_rows:
        return "cannot keep the documents of a packed row apart, and pretraining packs rows; use another architecture"
    return None


@rule("model.config.hidden_size", "model.config.num_attention_heads")
def _heads_divide_hidden_size(hidden_size: int, heads: int) -> Verdict:
    if hidden_size % heads:
        choice = nearest_multiples(hidden_size, heads)
        return f"is not a multiple of model.config.num_attention_heads={heads}; use {choice}"
    return None


@rule("model.config.d_model", "model.config.encoder_attention_heads")
def _encoder_heads_divide(d_model: int, heads: int) -> Verdict:
    if d_model % heads:
        choice = nearest_multiples(d_model, heads)
        return f"is not a multiple of model.config.encoder_attention_heads={heads}; use {choice}"
    return None


@rule("model.config.d_model", "model.config.decoder_attention_heads")
def _decoder_heads_divide(d_model: int, heads: int) -> Verdict:
    if d_model % heads:
        choice = nearest_multiples(d_model, heads)
        return f"is not a multiple of model.config.decoder_attention_heads={heads}; use {choice}"
    return None


@rule("model.decoder_layers", "model.config.num_hidden_layers")
def _decoder_layers_are_there(decoder_layers: int | None, layers: int) -> Verdict:
    if decoder_layers is not None and decoder_layers > layers:
        return f"is more than model.config.num_hidden_layers={layers}; use at most {layers}"
    return None


@rule("model.config.hidden_size", "model.config.num_attention_heads", "model.config.global_rope_theta")
def _rotary_pairs(hidden_size: int, heads: int, _theta: float) -> Verdict:
    if hidden_size % heads == 0 and hidden_size // heads % 2:
        choice = nearest_multiples(hidden_size, 2 * heads)
        return f"gives heads of odd size, and rotary positions turn pairs; use {choice}"
    return None


@rule("data.sequence_length", "model.config.max_position_embeddings", "model.architecture")
def _positions_suffice(sequence_length: int, positions: int, architecture: str) -> Verdict:
    return positions_suffice(sequence_length, positions, architecture, "model.config.max_position_embeddings")


@rule("data.target_length", "model.config.max_position_embeddings", "model.architecture")
def _target_positions_suffice(target_length: int, positions: int, architecture: str) -> Verdict:
    return positions_suffice(target_length, positions, architecture, "model.config.max_position_embeddings")


def positions_suffice(sequence_length: int, positions: int, architecture: str, source: str) -> Verdict:
    """Check a row's length against the positions of a model; `source` says where their number comes from."""
    known = ARCHITECTURES.get(architecture)
    unused = 0 if known is None else known.unused_positions
    usable = positions - unused
    if sequence_length > usable:
        why = f"{source}={positions}" + (f" less the {unused} that {architecture} leaves unused" if unused else "")
        return f"is longer than {why}; use at most {max(usable, 1)}, or raise max_position_embeddings"
    return None


# ---------------------------------------------------------------- data and batch


@rule("train.global_batch_rows", "data.lanes")
def _lanes_divide_batch(rows: int, lanes: int | None) -> Verdict:
    if lanes is not None and rows % lanes:
        return f"is not a multiple of data.lanes={lanes}; use {nearest_multiples(rows, lanes)}, or data.lanes=null"
    return None


@rule("data.masking.replace")
def _replacements_are_shares(replace: list[float]) -> Verdict:
    total = sum(replace)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        return f"sums to {total:g} and must sum to 1; write the shares of [mask, random, kept], as in [0.8, 0.1, 0.1]"
    return None


@rule("data.pairs.objective", "model.architecture")
def _pairs_have_a_head(objective: str, architecture: str) -> Verdict:
    if objective != "none" and not _has_pair_head(architecture):
        others = [name for name in installed_encoders() if _has_pair_head(name)]
        remedy = f"use none, or model.architecture: {' or '.join(others)}"
        return f"is not offered for {architecture}, which has no head for pairs; {remedy}"
    return None


def _has_pair_head(architecture: str) -> bool:
    known = ARCHITECTURES[architecture]
    return isinstance(known, EncoderArchitecture) and known.pair_modules is not None


@rule("data.pairs.objective", "model.config.type_vocab_size", "model.architecture")
def _token_types_suffice(objective: str, types: int, architecture: str) -> Verdict:
    return token_types_suffice(objective, types, architecture, "model.config.type_vocab_size")


def token_types_suffice(objective: str, types: int, architecture: str, source: str) -> Verdict:
    """Check that a model tells the two texts of a pair apart; `source` says where its number of token types is from."""
    if objective != "none" and types < 2 and _has_pair_head(architecture):
        return f"needs a token type for each text of a pair, and {source}={types}; use none, or a model with 2"
    return None


@rule("data.pairs.objective", "model.lora")
def _pairs_train_token_types(objective: str, lora: Mapping[str, Any] | None) -> Verdict:
    if objective != "none" and lora is not None:
        return "trains the embeddings of token types, which model.lora freezes; use none, or delete model.lora"
    return None


@rule("data.pairs.tokens", "data.pairs.objective", "data.sequence_length")
def _pairs_fit(tokens: int, objective: str, length: int) -> Verdict:
    if objective == "none":
        return None
    most = length // 2 if objective == "next_sentence" else length
    if most < 2 * SHORTEST_PAIR:
        return f"has no value that fits data.sequence_length={length}; raise that, or set data.pairs.objective to none"
    if tokens > most:
        why = "is more than half of" if objective == "next_sentence" else "is more than"
        other = ", so that a row has another pair to exchange with" if objective == "next_sentence" else ""
        return f"{why} data.sequence_length={length}; use at most {most}{other}"
    if tokens < 2 * SHORTEST_PAIR:
        return f"would cut documents in parts of less than {SHORTEST_PAIR} tokens; use at least {2 * SHORTEST_PAIR}"
    return None


@rule("train.steps", "train.tokens", "train.epochs", "phases")
def _one_length(steps: int | None, tokens: int | None, epochs: float | None, phases: Any) -> Verdict:
    lengths = {"train.steps": steps, "train.tokens": tokens, "train.epochs": epochs}
    set_keys = [key for key, value in lengths.items() if value is not None]
    if not set_keys and not phases:
        return "is missing: the run has no length; give exactly one of train.steps, train.tokens and train.epochs"
    if len(set_keys) > 1:
        return (
            f"is one of {len(set_keys)} lengths given ({', '.join(set_keys)}); keep exactly one, set the others to null"
        )
    return None


# ---------------------------------------------------------------- optimizer and schedule


@rule("optimizer.betas")
def _betas_below_one(betas: list[float]) -> Verdict:
    return "must have both entries below 1; use [0.9, 0.999] or the like" if max(betas) >= 1 else None


@rule("schedule.warmup_steps", "schedule.warmup_fraction")
def _one_warmup(steps: int | None, fraction: float | None) -> Verdict:
    if steps is not None and fraction is not None:
        return f"is given beside schedule.warmup_fraction={fraction:g}; keep one, set the other to null"
    return None


@rule("schedule.plateau", "schedule.name", "evaluate.every_steps")
def _plateau_is_named(plateau: Mapping[str, Any] | None, name: str, every_steps: int | None) -> Verdict:
    if (plateau is not None) != (name == "plateau"):
        return (
            "is missing; name a metric of the evaluations, as in {metric: loss}"
            if plateau is None
            else f"is given, and schedule.name={name}; set that to plateau, or this to null"
        )
    if plateau is not None and every_steps is None:
        return "needs evaluations to go by; set evaluate.every_steps"
    return None


@rule("schedule.warmup_steps", "run.steps")
def _warmup_ends(warmup: int | None, steps: int | None) -> Verdict:
    if warmup is not None and steps is not None and warmup >= steps:
        return f"never ends within the {steps} steps that it is counted over; use at most {steps - 1}"
    return None


@rule("schedule.warmup_fraction", "schedule.decay_fraction", "schedule.name")
def _phases_fit(warmup: float | None, decay: float, name: str) -> Verdict:
    if name == "warmup_stable_decay" and warmup is not None and warmup + decay > 1:
        return f"and schedule.decay_fraction={decay:g} take more than the whole run; use at most {1 - decay:g}"
    return None


@rule("schedule.warmup_fraction", "schedule.name")
def _warmup_leaves_steps(warmup: float | None, _name: str) -> Verdict:
    return (
        "leaves no step after the warmup; use less than 1, as in 0.05" if warmup is not None and warmup >= 1 else None
    )


# ---------------------------------------------------------------- memory and evaluation


@rule("train.zero.offload_params", "train.zero.stage")
def _offloaded_params_are_partitioned(offload: str, stage: int) -> Verdict:
    if offload != "none" and stage != 3:
        return f"needs train.zero.stage=3, and it is {stage}; use stage 3, or none"
    return None


@rule("optimizer.name", "train.zero.stage")
def _cut_optimizer_needs_no_whole_parameters(name: str, stage: int) -> Verdict:
    optimizers = installed_optimizers()
    whole = optimizers[name].whole
    if whole is not None and stage > 0:
        cut = ", ".join(other for other, optimizer in optimizers.items() if optimizer.whole is None)
        return f"needs whole parameters ({whole}), and train.zero.stage={stage} cuts them; use stage 0, or one of {cut}"
    return None


@rule("train.zero.offload_optimizer", "train.zero.stage")
def _offloaded_optimizer_is_partitioned(offload: str, stage: int) -> Verdict:
    if offload != "none" and stage == 0:
        return "needs train.zero.stage of 1, 2 or 3, and it is 0; use stage 1, or none"
    return None


@rule("early_stopping.metric", "evaluate.every_steps")
def _stopping_needs_evaluations(_metric: str, every_steps: int | None) -> Verdict:
    if every_steps is None:
        return "needs evaluations to choose from; set evaluate.every_steps"
    return None


@rule("early_stopping.metric", "task")
def _stopping_is_by_what_is_measured(metric: str, task: str) -> Verdict:
    return not_measured(metric, task)


@rule("schedule.plateau.metric", "task")
def _plateaus_are_of_what_is_measured(metric: str, task: str) -> Verdict:
    return not_measured(metric, task)


@rule("checkpoint.keep_best.metric", "task")
def _the_best_is_by_what_is_measured(metric: str | None, task: str) -> Verdict:
    return None if metric is None else not_measured(metric, task)


@rule("early_stopping.metric", "data.sources")
@rule("schedule.plateau.metric", "data.sources")
@rule("checkpoint.keep_best.metric", "data.sources")
def _metrics_of_sources_are_evaluated(metric: str | None, sources: Mapping[str, Any] | None) -> Verdict:
    _, dot, name = (metric or "").partition(".")
    evaluated = [key for key, source in (sources or {}).items() if isinstance(source, Mapping) and source.get("valid")]
    if not dot or name in evaluated:
        return None
    known = f"; sources that have it: {', '.join(evaluated)}" if evaluated else ""
    return f"is of a source {name!r} without held-out data; set data.sources.{name}.valid{known}"


@rule("checkpoint.keep_every", "checkpoint.every_steps")
def _kept_steps_are_saved(keep_every: int | None, every_steps: int) -> Verdict:
    if keep_every is not None and keep_every % every_steps:
        choice = nearest_multiples(keep_every, every_steps)
        return f"is not a multiple of checkpoint.every_steps={every_steps}; use {choice}"
    return None


@rule("checkpoint.keep_best.metric", "checkpoint.every_steps", "evaluate.every_steps")
def _saved_steps_are_evaluated(metric: str | None, saved: int, evaluated: int | None) -> Verdict:
    if metric is not None and evaluated is None:
        return f"needs evaluations; set evaluate.every_steps to {saved}, or the metric to null"
    if metric is not None and evaluated is not None and saved % evaluated:
        return (
            f"needs an evaluation at each step that is saved, and checkpoint.every_steps={saved} is not a multiple of "
            f"evaluate.every_steps={evaluated}; set that to {nearest_divisors(evaluated, saved)}"
        )
    return None


@rule("evaluate.every_steps", "data.valid", "data.sources")
def _evaluation_has_data(every_steps: int | None, valid: str | None, sources: Mapping[str, Any] | None) -> Verdict:
    of_sources = [source for source in (sources or {}).values() if isinstance(source, Mapping) and source.get("valid")]
    if every_steps is not None and valid is None and not of_sources:
        return "needs data.valid, which is not set; give a validation corpus, or set evaluate.every_steps to null"
    return None
