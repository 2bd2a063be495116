"""Turns pydantic's findings into sentences for people: what was given, which rule it broke, what to do."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from pydantic_core import ErrorDetails

from dstrain.recipe.source import Node, parse_scalar

_COMPARISONS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
RENAMED_KEYS = {  # what a key was called, and what it is called now
    "beams": "num_beams",
    "cut": "truncation_side",
    "final_ratio": "min_lr_ratio",
    "frequency_correction": "log_q_correction",
    "hang_seconds": "hang_timeout_seconds",
    "hold_out": "validation_split",
    "hold_out_by": "validation_split_by",
    "least_change": "min_delta",
    "longest_answer": "max_answer_length",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "reject_below": "min_confidence",
    "shortest": "min_new_tokens",
}
_SAID_AS_BOOLEAN = {"yes": "true", "on": "true", "no": "false", "off": "false"}


def given(node: Node) -> str:
    """Return a value as the user wrote it: in quotes only where it had them, shortened where it is long."""
    if node.written is not None:
        text = json.dumps(node.written, ensure_ascii=False) if node.quoted else node.written or "null"
    else:
        text = json.dumps(node.plain(), ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that looks most like `word`, if any does."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.55)
    return found[0] if found else None


def one_of(word: object, choices: Iterable[str]) -> str:
    """Say which words are allowed, the nearest first."""
    listed = list(choices)
    close = nearest(word, listed) if isinstance(word, str) else None
    rule = f"is not one of {', '.join(listed)}"
    return f"{rule}; use {close}" if close else f"{rule}; use one of them"


def unknown_key(path: str, known_keys: Iterable[str], all_paths: Iterable[str]) -> str:
    """Say that a key does not exist, and which one was probably meant: here, or of the same name in another section."""
    section, _, key = path.rpartition(".")
    listed = list(known_keys)
    renamed = RENAMED_KEYS.get(key)
    if renamed in listed:
        return f"{path} is now called {f'{section}.{renamed}'.lstrip('.')}; write that instead"
    elsewhere = next((other for other in all_paths if other.rpartition(".")[2] == key), None)
    close = nearest(key, listed)
    meant = elsewhere or (close and f"{section}.{close}".lstrip("."))
    if meant:
        return f"{path} is an unknown key; did you mean {meant}?"
    return f"{path} is an unknown key; {section or 'a recipe'} has: {', '.join(listed)}"


def wrong_value(path: str, node: Node, error: ErrorDetails) -> str:
    """Return the sentence for a value that broke a rule of its own key.

    Args:
        path: the dotted key.
        node: what was written there.
        error: pydantic's description of the rule.
    """
    if error["type"] == "missing":  # an entry of a list; a missing key has no node
        return f"{path}={given(node)} is too short; write at least {int(error['loc'][-1]) + 1} entries"
    return f"{path}={given(node)} {_rule_and_remedy(node, error['type'], error.get('ctx', {}))}"


def _rule_and_remedy(node: Node, kind: str, context: dict[str, Any]) -> str:
    value = node.value
    if kind in _COMPARISONS:
        words, bound = _COMPARISONS[kind]
        return f"must be {words} {context[bound]:g}; change the value"
    if kind == "literal_error":
        return _literal(value, str(context["expected"]))
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a section; write its keys below it, indented"
    if kind in ("tuple_type", "list_type"):
        return "must be a list; write it as [a, b, …]"
    if isinstance(value, dict):
        return "must be a plain value, not a section; write one value"
    if kind in ("int_type", "int_from_float", "float_type", "int_parsing", "float_parsing"):
        return _number(node, "whole number" if kind.startswith("int") else "number")
    if kind == "bool_type":
        said = _SAID_AS_BOOLEAN.get(value.lower(), value.lower()) if isinstance(value, str) else ""
        remedy = f"write {said}" if said in ("true", "false") else "write true or false"
        return f"must be true or false (no other word is a boolean here); {remedy}"
    if kind == "string_type":
        return f'must be text; write it in quotes: "{given(node)}"'
    if kind == "string_pattern_mismatch":
        return "must begin with a letter or digit and hold only letters, digits and . _ -; choose another name"
    if kind == "too_long":
        return f"has {context['actual_length']} entries; write {context['max_length']}"
    if kind == "finite_number":
        return "must be a finite number; change the value"
    raise AssertionError(f"no sentence for pydantic's {kind}")


def _literal(value: object, expected: str) -> str:
    """`expected` is pydantic's list, as in "'fp32' or 'bf16'", "0, 1, 2 or 3" or "False"."""
    choices = [word.strip().strip("'") for word in expected.replace(" or ", ", ").split(",")]
    choices = [word.lower() if word in ("True", "False") else word for word in choices]
    if isinstance(value, str) and value in choices:
        return f"is text here; remove the quotes: {value}"
    if isinstance(value, bool) and choices[0] in ("true", "false"):
        return f"is not available; write {choices[0]}"
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in _SAID_AS_BOOLEAN):
        return f"is not one of {', '.join(choices)}; write one of them (a switch is never meant here)"
    return one_of(value, choices)


def _number(node: Node, wanted: str) -> str:
    value = node.value
    if isinstance(value, str):
        meaning = parse_scalar(value)
        if isinstance(meaning, int | float) and not isinstance(meaning, bool):
            return f"is text and must be a {wanted}; remove the quotes: {value}"
        return f"is text and must be a {wanted}; write digits, as in {'1000' if wanted == 'whole number' else '3e-4'}"
    if isinstance(value, float) and wanted == "whole number":
        remedy = f"write {int(value)}" if value.is_integer() else f"use {int(value)} or {int(value) + 1}"
        return f"must be a {wanted}, without point or exponent; {remedy}"
    return f"must be a {wanted}; write one"
