"""Labels for free: which package is a docstring from? A balanced classification set with whole modules held out.

The names of all labels (and what their users call them: np, PyTorch …) are replaced by "library" in every text, so that
the label is not given away by its name.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dstrain.errors import CorpusError

LABELS = 8
TRAIN_ROWS_PER_LABEL = 100  # few: what pretraining is good for
VALID_ROWS_PER_LABEL = 100
WORDS_PER_TEXT = 48
NEUTRAL_WORD = "library"

# What users call a package besides the name they import it by.
ALIASES = {
    "torch": ("pytorch",),
    "sklearn": ("scikit-learn", "scikit learn", "scikits"),
    "numpy": ("np", "numpy's"),
    "pandas": ("pd",),
    "networkx": ("nx",),
    "transformers": ("huggingface", "hugging face", "hf"),
    "huggingface_hub": ("huggingface", "hugging face", "hf"),
}


@dataclass(frozen=True)
class LabelledSplit:
    """(text, label) examples in a mixed order, and the (package, module) pairs that only `valid` draws from."""

    labels: list[str]
    train: list[tuple[str, str]]
    valid: list[tuple[str, str]]
    held_out: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class _Example:
    text: str
    label: str
    module: str


def _order(*parts: str) -> bytes:
    """A position that is the same in every run and has nothing to do with the alphabet."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


def names_removed(text: str, labels: Sequence[str]) -> str:
    """`text` on one line, its first words only, with every name and alias of the labels replaced by a neutral word."""
    names = {name for label in labels for name in (label, *ALIASES.get(label, ()))}
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    pattern = re.compile(r"(?<![A-Za-z0-9])(?:" + "|".join(map(re.escape, longest_first)) + r")(?![A-Za-z0-9])", re.I)
    return " ".join(pattern.sub(NEUTRAL_WORD, text).split()[:WORDS_PER_TEXT])


def labelled_split(
    documents: Sequence[tuple[str, str, str]],
    *,
    labels_wanted: int = LABELS,
    train_rows_per_label: int = TRAIN_ROWS_PER_LABEL,
    valid_rows_per_label: int = VALID_ROWS_PER_LABEL,
) -> LabelledSplit:
    """Draw a balanced classification set from (package, module, text) documents.

    The labels are the packages with the most documents. No module and no text is in both train and valid; a text that
    occurs under two labels is in neither. Raises CorpusError when fewer than two packages have enough documents.
    """
    documents_of = Counter(package for package, _, _ in documents)
    labels = sorted(sorted(documents_of, key=lambda package: (-documents_of[package], package))[:labels_wanted])
    by_text: dict[str, list[_Example]] = defaultdict(list)
    for package, module, text in documents:
        if package in labels:
            short = names_removed(text, labels)
            by_text[short.lower()].append(_Example(short, package, module))
    distinct = [same[0] for same in by_text.values() if len({example.label for example in same}) == 1]
    distinct.sort(key=lambda example: _order(example.text))

    held_out: set[tuple[str, str]] = set()
    train: dict[str, list[_Example]] = {}
    valid: dict[str, list[_Example]] = {}
    for label in labels:
        mine = [example for example in distinct if example.label == label]
        modules = _modules_to_hold_out(mine, min(valid_rows_per_label, len(mine) // 4))
        held_out |= {(label, module) for module in modules}
        train[label] = [example for example in mine if example.module not in modules]
        valid[label] = [example for example in mine if example.module in modules]
    train_rows = min([train_rows_per_label, *map(len, train.values())])
    valid_rows = min([valid_rows_per_label, *map(len, valid.values())])
    if len(labels) < 2 or train_rows == 0 or valid_rows == 0:
        raise CorpusError(
            f"the docstrings of {len(documents_of)} packages are too few for a labelled set; "
            "install more packages into this interpreter's environment"
        )
    return LabelledSplit(
        labels=labels,
        train=_mixed(train, train_rows),
        valid=_mixed(valid, valid_rows),
        held_out=frozenset(held_out),
    )


def _modules_to_hold_out(examples: Sequence[_Example], rows_wanted: int) -> set[str]:
    """Modules, in an arbitrary but fixed order, until they have `rows_wanted` examples together."""
    rows_of = Counter(example.module for example in examples)
    modules: set[str] = set()
    rows = 0
    for module in sorted(rows_of, key=lambda module: _order("module", module)):
        if rows >= rows_wanted:
            break
        modules.add(module)
        rows += rows_of[module]
    return modules


def _mixed(examples_of: dict[str, list[_Example]], rows_per_label: int) -> list[tuple[str, str]]:
    chosen = [example for examples in examples_of.values() for example in examples[:rows_per_label]]
    return [(example.text, example.label) for example in sorted(chosen, key=lambda example: _order(example.text))]
