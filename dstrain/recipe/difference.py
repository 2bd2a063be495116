"""A value that is another one than before: what a run that is resumed must not differ in, and how that is said."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

_DIGITS_SHOWN = 12  # of a digest
_DIGEST_DIGITS = 32  # a text of hexadecimal digits that is at least so long is a digest
_OF_DATA = frozenset({"data", "tokenizer", "train", "steps"})  # first parts of keys; "steps" is of a phase


@dataclass(frozen=True)
class Difference:
    """One value, before and after.

    `key` is the recipe's, or that of what it names: of `data.train` and `tokenizer` the values are digests of what lies
    there. `phase` is what the value belongs to, as in `phase 2 (long)`; empty: the whole run. Values are JSON.
    """

    key: str
    before: Any
    after: Any
    phase: str = ""

    @property
    def is_of_data(self) -> bool:
        """Whether it decides which rows there are, and nothing about the model."""
        return self.key.partition(".")[0] in _OF_DATA

    @property
    def remedy(self) -> str | None:
        """What to write where the key's default has become another one."""
        return f"write data.lanes: {self.before}" if self.key == "data.lanes" else None

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**content)

    def __str__(self) -> str:
        """For people: `phase 2 (long): data.sequence_length: 512 → 256`."""
        where = f"{self.phase}: " if self.phase else ""
        remedy = f" ({self.remedy})" if self.remedy else ""
        before, after = shown(self.before), shown(self.after)
        if before == after:  # apart by less than is shown
            before, after = json.dumps(self.before), json.dumps(self.after)
        return f"{where}{self.key}: {before} → {after}{remedy}"


def shown(value: Any) -> str:
    """A value as people read it: texts as they are, digests by their first digits, all else as JSON, rounded."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    is_digest = len(value) >= _DIGEST_DIGITS and all(digit in "0123456789abcdef" for digit in value)
    return f"{value[:_DIGITS_SHOWN]}…" if is_digest else value
