"""Train, valid and test examples of a recipe: what is dropped and why, and what the splits share.

A line that is no example is a mistake, and all of a file's mistakes are reported together; with
`data.on_bad_example: drop` they are counted by reason instead, and the run says so as it starts.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from dstrain.base.counter_rng import permutation, stream_key
from dstrain.errors import CorpusError
from dstrain.examples.record import Record
from dstrain.examples.records import Reading, half_character, records_of
from dstrain.recipe.data import ExampleData
from dstrain.recipe.messages import nearest

MISTAKES_SHOWN = 20
REASONS_SHOWN = 5
E = TypeVar("E")
Parse = Callable[[Record], E | str]  # an example, or what is wrong with the record and what to do about it

Key = Callable[[E], Any]  # what makes two examples the same text


class Dropped(str):
    """What is wrong with a record that is left out whatever `data.on_bad_example` says."""

    __slots__ = ()


@dataclass
class Splits(Generic[E]):
    """The examples of a task. `test` is empty where the recipe has none."""

    train: list[E]
    valid: list[E]
    test: list[E] = field(default_factory=list)

    def named(self) -> dict[str, list[E]]:
        """By name, those that there are."""
        return {name: part for name, part in vars(self).items() if part}


class SplitReader:
    """Reads the splits of a recipe. `notes` are lines for the log, `facts` the same numbers for reports."""

    def __init__(self, data: ExampleData, needed: Mapping[str, str], token_pattern: str | None = None) -> None:
        """`needed`: the fields that every record must have, each with the key of the recipe that names it."""
        self._data, self._needed = data, needed
        self._reading = Reading(data.format, data.columns, token_pattern, data.encoding)
        self._groups: list[str] = []  # of each training example: its value of data.validation_split_by
        self.notes: list[str] = []
        self.facts: dict[str, Any] = {}

    def read(self, split: str, parse: Parse[E]) -> list[E]:
        """The examples of data.train, data.valid or data.test.

        Raises:
            CorpusError: there is none, or with a line for each mistake (the first twenty): file, line, what is wrong,
                what to do; and last, that data.on_bad_example=drop leaves them out.
        """
        location = getattr(self._data, split)
        examples: list[E] = []
        mistakes: list[str] = []
        refused: list[str] = []
        reasons: Counter[str] = Counter()
        group_field = self._data.validation_split_by if split == "train" else None
        needed = dict(self._needed) | ({group_field: "data.validation_split_by"} if group_field else {})
        for record in records_of(location, self._reading, needed):
            found = record.problem or _missing(record, needed) or _halved(record, needed) or parse(record)
            if not isinstance(found, str):
                examples.append(found)
                if group_field:
                    self._groups.append(str(record.fields[group_field]))
                continue
            mistakes.append(f"{record.place}: {found}")
            reasons[found.split(";")[0]] += 1
            if not isinstance(found, Dropped):
                refused.append(mistakes[-1])
            if record.fatal:
                refuse(refused)
        if self._data.on_bad_example == "stop":
            refuse(refused, "data.on_bad_example=drop leaves them out, and counts them")
        if not examples:
            refuse(mistakes)
            raise CorpusError(f"{location}: no example in it; give one a line")
        if mistakes:
            self._note_dropped(split, location, mistakes, reasons, len(examples))
        return examples

    def split_off_validation(self, train: list[E]) -> tuple[list[E], list[E]]:
        """Split off data.validation_split examples, drawn by data.seed. Raises CorpusError where none would be left.

        With data.validation_split_by, groups are drawn until they have as many: no group is on both sides.
        """
        wanted = self._data.validation_split
        assert wanted is not None, "a valid recipe has data.valid or data.validation_split"
        count = wanted if isinstance(wanted, int) else max(1, round(wanted * len(train)))
        if count >= len(train):
            raise CorpusError(
                f"data.validation_split={count} takes all of the {len(train)} examples of {self._data.train}; use "
                f"0.1 for a tenth of them"
            )
        key = stream_key(self._split_seed, "hold out")
        if self._data.validation_split_by is None:
            drawn = set(permutation(key, len(train))[:count].tolist())
        else:
            drawn = self._drawn_groups(key, count)
        kept = [example for number, example in enumerate(train) if number not in drawn]
        return kept, [example for number, example in enumerate(train) if number in drawn]

    def fold(self, train: list[E], key: Key[E]) -> tuple[list[E], list[E]]:
        """Split off fold data.fold of data.folds, which data.split_seed draws alike for all of them.

        The same texts, or the same values of data.validation_split_by, are in one fold. Raises CorpusError where there
        are fewer of these than folds.
        """
        folds, mine = self._data.folds, self._data.fold
        assert folds is not None
        units = self._groups if self._data.validation_split_by is not None else [key(example) for example in train]
        there = list(dict.fromkeys(units))
        if len(there) < folds:
            raise CorpusError(f"data.folds={folds}, and {self._data.train} has {len(there)} texts; use at most that")
        drawn = permutation(stream_key(self._split_seed, "folds"), len(there)).tolist()
        held_out = {there[unit] for unit in drawn[mine::folds]}
        pairs = list(zip(train, units, strict=True))
        kept = [example for example, unit in pairs if unit not in held_out]
        return kept, [example for example, unit in pairs if unit in held_out]

    @property
    def _split_seed(self) -> int:
        return self._data.seed if self._data.split_seed is None else self._data.split_seed

    def _drawn_groups(self, key: np.uint64, count: int) -> set[int]:
        """Which training examples are those of the groups that are held out."""
        members: dict[str, list[int]] = {}
        for number, group in enumerate(self._groups):
            members.setdefault(group, []).append(number)
        groups = list(members.values())
        drawn: set[int] = set()
        for chosen in permutation(key, len(groups)).tolist():
            drawn.update(groups[chosen])
            if len(drawn) >= count:
                break
        if len(drawn) == len(self._groups):
            raise CorpusError(
                f"data.validation_split={count} by data.validation_split_by={self._data.validation_split_by} "
                f"takes all examples of {self._data.train}: "
                f"it has only {len(groups):,} different values there; hold out fewer, or by "
                f"another field"
            )
        self.notes.append(
            f"data.valid: {len(drawn):,} examples of data.train, whose {self._data.validation_split_by} "
            f"no other example has"
        )
        return drawn

    def splits(
        self,
        parse: Parse[E],
        parse_held_out: Callable[[list[E]], Parse[E]],
        key: Key[E],
        merged: Callable[[list[E]], list[E]] = list,
    ) -> Splits[E]:
        """All splits, and what they share.

        Args:
            parse: for data.train.
            parse_held_out: given the training examples, what judges records of data.valid and data.test.
            key: what makes two examples the same text.
            merged: makes one example of all records that are about the same; twice does no more than once.

        Raises:
            CorpusError: as `read`; or data.test has exactly the texts of data.train.
        """

        def alike(example: E) -> Any:
            return but_for_case_and_spaces(key(example))

        train = self.read("train", parse)
        if self._data.validation_split_by is None:  # else records are drawn, by the group that each is of
            train = merged(train)
        judge = parse_held_out(train)
        if self._data.folds is not None:
            train, valid = self.fold(train, alike)
        elif self._data.valid is None:
            train, valid = self.split_off_validation(train)
        else:
            valid = self.read("valid", judge)
        test = self.read("test", judge) if self._data.test is not None else []
        found = Splits(merged(train), merged(valid), merged(test))
        self._note_shared(found, key, alike)
        return found

    def _note_dropped(self, split: str, location: str, mistakes: list[str], reasons: Counter[str], kept: int) -> None:
        self.facts[f"dropped_from_{split}"] = dict(reasons)
        self.notes.append(f"data.{split}: dropped {len(mistakes):,} of {len(mistakes) + kept:,} examples of {location}")
        shown = reasons.most_common(REASONS_SHOWN)
        self.notes += [f"  {count:,} × {reason}" for reason, count in shown]
        if len(reasons) > len(shown):
            self.notes.append(f"  and {sum(reasons.values()) - sum(count for _, count in shown):,} for other reasons")
        self.notes.append(f"  the first: {mistakes[0]}")

    def _note_shared(self, splits: Splits[E], key: Key[E], alike: Key[E]) -> None:
        """Count the texts that splits share, as they are and but for case and spaces."""
        known = [("train", splits.train), ("valid", splits.valid), ("test", splits.test)]
        for number, (name, part) in enumerate(known[1:], start=1):
            for other, examples in known[:number]:
                if part and examples:
                    self._note_texts(name, part, other, examples, key, alike)

    def _note_texts(
        self,
        name: str,
        part: list[E],
        other: str,
        examples: list[E],
        key: Key[E],
        alike: Callable[[E], Any],
    ) -> None:
        there = {alike(example) for example in examples}
        shared = {alike(example) for example in part} & there
        whole = len({alike(example) for example in part})
        if (name, other) == ("test", "train") and len(shared) == whole == len(there):
            raise CorpusError(
                f"data.test={self._data.test} has exactly the texts of data.train={self._data.train}: its score "
                f"would say what was remembered, not what was learned; give other examples, or none"
            )
        exactly = len({key(example) for example in part} & {key(example) for example in examples})
        if other == "train":
            self.facts[f"{name}_texts_also_in_train"] = exactly
            self.facts[f"{name}_texts_alike_in_train"] = len(shared)
        if shared:
            every = "all" if len(shared) == whole else f"{len(shared):,}"
            but = "" if exactly == len(shared) else f" ({exactly:,} exactly, the rest but for case and spaces)"
            among = "the training examples" if other == "train" else "data.valid"
            harm = (
                "each makes the score look better than it is"
                if other == "train"
                else "early stopping and the best checkpoint were chosen by them"
            )
            self.notes.append(f"data.{name}: {every} of its {whole:,} texts are in {among} too{but}; {harm}")


def _halved(record: Record, needed: Iterable[str]) -> str | None:
    problems = ((name, half_character(record.fields[name])) for name in needed)
    return next((f"{name} {problem}" for name, problem in problems if problem), None)


def but_for_case_and_spaces(text: Any) -> Any:
    """A text, or all texts in a tuple, as near-duplicates are the same: compatibility forms, case and spaces folded."""
    if isinstance(text, tuple):
        return tuple(but_for_case_and_spaces(one) for one in text)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()) if isinstance(text, str) else text


def _missing(record: Record, needed: Iterable[str]) -> str | None:
    for name in needed:
        if name not in record.fields:
            return f"has no field {name!r}" + meant(name, record.fields, "; did you mean {!r}?", "; add it")
    return None


def text_problem(text: Any, name: str, longest: int) -> str | None:
    """What is wrong with a field that ought to be text, and what to do about it."""
    if not isinstance(text, str):
        return f"{name} is {shown(text)}, not text; put it in quotes"
    if not text.strip():
        return f"{name} is empty; write the text, or drop the line"
    if len(text) > longest:
        return (
            f"{name} has {len(text):,} characters, more than data.longest_text={longest}; split it, look for a quote "
            f"that is never closed, or raise data.longest_text"
        )
    return None


def meant(word: str, choices: Iterable[str], with_nearest: str, without: str) -> str:
    """`with_nearest` with the choice that looks most like `word`, or `without`."""
    close = nearest(word, choices)
    return without if close is None else with_nearest.format(close)


def shown(value: Any) -> str:
    """A value in a message."""
    return repr(value)[:40] if not isinstance(value, bool) else str(value).lower()


def refuse(mistakes: list[str], way_out: str = "") -> None:
    """Raise a CorpusError of the mistakes, if there are any: the first twenty in full, then how many more there are.

    Its last line says what can be done about all of them, where there is something.
    """
    if mistakes:
        more = len(mistakes) - MISTAKES_SHOWN
        rest = ([f"and {more:,} more mistakes"] if more > 0 else []) + ([way_out] if way_out else [])
        raise CorpusError("\n".join([*mistakes[:MISTAKES_SHOWN], "; ".join(rest)] if rest else mistakes))
