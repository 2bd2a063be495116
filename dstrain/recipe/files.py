"""What a recipe says about files: where its paths lead, whether they exist, and whether they fit the model."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dstrain.architectures import ARCHITECTURES
from dstrain.recipe.keys import flat_values
from dstrain.recipe.rules import positions_suffice, token_types_suffice
from dstrain.recipe.schema import CommonRecipe

_PATH_KEYS = (
    *("tokenizer", "data.train", "data.valid", "data.test", "data.corpus", "data.queries", "model.pretrained"),
    *("data.sources.*.shards", "data.sources.*.valid"),  # of every source
)
_DATASETS = "datasets://"  # a data set by its name; whether it is there is seen when it is loaded
_MADE_BY = {"build/pretrained/": "make pretrained", "build/quickstart/": "make quickstart"}
_PATTERN_CHARACTERS = "*?[{"


def is_path(key: str) -> bool:
    """Tell whether the value of a dotted key is a path."""
    parts = key.split(".")
    return any(
        len(parts) == len(pattern) and all(word in ("*", part) for part, word in zip(parts, pattern, strict=True))
        for pattern in (path_key.split(".") for path_key in _PATH_KEYS)
    )


def absolute(path: str) -> str:
    """Return a recipe's path as an absolute one: from the current directory, `~` expanded, patterns kept."""
    return path if "://" in path else str(Path(os.path.abspath(Path(path).expanduser())))  # noqa: PTH100 (no symlinks)


def missing_files(recipe: CommonRecipe) -> list[str]:
    """Return a sentence for each path of a valid recipe that leads nowhere on this machine."""
    known = {key: value for key, value in flat_values(recipe).items() if is_path(key)}
    return [f"{keys[0]}={known[keys[0]]} {sentence}" for keys, sentence in file_problems(known)]


def file_problems(known: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield `(keys, sentence)` for each path of the recipe that leads nowhere or to something that does not fit."""
    for key, path in known.items():
        if is_path(key) and isinstance(path, str):
            sentence = _missing(path, folder_needed=key in ("tokenizer", "model.pretrained"))
            if sentence is not None:
                yield (key,), sentence
    yield from _tokenizer_problems(known)
    yield from _pretrained_problems(known)


def read_json(path: Path) -> Any | None:
    """Return a JSON file's content, or None where there is no such file or it holds something else."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _missing(path: str, *, folder_needed: bool) -> str | None:
    if path.startswith(_DATASETS) and not folder_needed:
        return None
    if "://" in path:
        return "is a remote location, and only local paths are read; copy it to a disk first"
    found = Path(absolute(path))
    if folder_needed:
        return None if found.is_dir() else f"is not a folder (looked for {found}); {_remedy(path)}"
    if found.exists():
        return None
    parts = found.parts
    first_pattern = next((i for i, part in enumerate(parts) if set(part) & set(_PATTERN_CHARACTERS)), None)
    if first_pattern is None:
        return f"does not exist (looked for {found}); {_remedy(path)}"
    folder = Path(*parts[:first_pattern])
    if not folder.is_dir():
        return f"matches nothing: there is no folder {folder}; correct the path"
    if "{" not in path and not any(folder.glob(str(Path(*parts[first_pattern:])))):
        return f"matches no file in {folder}; correct the pattern"
    return None


def _remedy(path: str) -> str:
    commands = [command for start, command in _MADE_BY.items() if path.startswith(start)]
    return f"`{commands[0]}` makes it, or correct the path" if commands else "correct the path"


def _tokenizer_problems(known: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    folder = known.get("tokenizer")
    if not isinstance(folder, str) or not Path(absolute(folder)).is_dir():
        return
    content = read_json(Path(absolute(folder)) / "tokenizer.json")
    if content is None:
        yield ("tokenizer",), "has no readable tokenizer.json; point to the folder that `dstrain tokenizer train` wrote"
        return
    vocabulary = content.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [token["id"] for token in content.get("added_tokens", [])]
    tokens = max(ids, default=-1) + 1
    declared = known.get("model.config.vocab_size")
    if isinstance(declared, int) and declared < tokens:
        sentence = f"is smaller than the tokenizer's {tokens} tokens; use at least {tokens}"
        if rounded_up(tokens, 64) != tokens:
            sentence += f" ({rounded_up(tokens, 64)} is a multiple of 64, which is faster)"
        yield ("model.config.vocab_size", "tokenizer"), sentence


def rounded_up(value: int, multiple: int) -> int:
    """Return the smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def _pretrained_problems(known: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    folder, architecture = known.get("model.pretrained"), known.get("model.architecture")
    if not isinstance(folder, str) or not isinstance(architecture, str):
        return
    config = read_json(Path(absolute(folder)) / "config.json")
    if not isinstance(config, dict):
        if Path(absolute(folder)).is_dir():
            remedy = "point to a Transformers folder (`dstrain ckpt export` makes one)"
            yield ("model.pretrained",), f"has no readable config.json; {remedy}"
        return
    found = config.get("model_type")
    origins = ARCHITECTURES[architecture].origins if architecture in ARCHITECTURES else (architecture,)
    if found not in origins:
        remedy = f"give a folder with {' or '.join(origins)}" if len(origins) > 1 else f"use {found}"
        yield ("model.architecture", "model.pretrained"), f"but model.pretrained holds a {found} model; {remedy}"
        return
    whole = isinstance(config.get("encoder"), dict)  # a model of two, each with a config of its own
    for key, side in (*((key, "encoder") for key in _row_lengths(known)), ("data.target_length", "decoder")):
        stack = config.get(side) if whole else config
        length, positions = known.get(key), stack.get("max_position_embeddings") if isinstance(stack, dict) else None
        if isinstance(stack, dict) and isinstance(length, int) and isinstance(positions, int):
            source = "the pretrained model's max_position_embeddings"
            sentence = positions_suffice(length, positions, str(stack.get("model_type")), source)
            if sentence is not None:
                yield (key, "model.pretrained"), sentence
    objective, types = known.get("data.pairs.objective"), config.get("type_vocab_size")
    if isinstance(objective, str) and isinstance(types, int):
        sentence = token_types_suffice(objective, types, architecture, "the pretrained model's type_vocab_size")
        if sentence is not None:
            yield ("data.pairs.objective", "model.pretrained"), sentence


def _row_lengths(known: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that say how long rows are; phases may change the positions that a model has by themselves."""
    yield "data.sequence_length"
    for number in range(len(known["phases"]) if isinstance(known.get("phases"), list) else 0):
        if known.get(f"phases.{number}.model.max_position_embeddings") is not None:
            return
        if known.get(f"phases.{number}.data.sequence_length") is not None:
            yield f"phases.{number}.data.sequence_length"
