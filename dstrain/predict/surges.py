"""When negatives surge: by topic, a sliding window against the longer time before. Pure: no clock, file or model.

         baseline (a day)                       window (an hour)
    ├──────────────────────────────────────────┼────────────────┤ now
      55 of 410 negative                         31 of 42         p = 2e-15: a surge begins; over when p > 0.05

Both shares are counted, so Fisher's exact test compares them: how likely so many of all negatives would fall into the
window if nothing had changed. It is looked at after every message, hence the strict level at which an alert begins; it
ends at a lax one, so that a surge on the edge alerts once. What is older than the window is baseline, surge or not.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

EVERYTHING = "all"  # the topic of every message
TEXTS_SHOWN = 3


@dataclass(frozen=True)
class Message:
    """A classified text. `time` in seconds; one earlier than the message before counts as of the same time."""

    time: float
    topics: tuple[str, ...]
    negative: bool
    text: str = ""


@dataclass(frozen=True)
class Rule:
    """What a surge is: it begins at p ≤ `begin` with `least` messages in window and baseline, and ends at p > `end`."""

    window_seconds: float = 3600.0
    baseline_seconds: float = 86400.0
    least: int = 10
    begin: float = 1e-4
    end: float = 0.05


@dataclass(frozen=True)
class Change:
    """A surge of a topic that begins or is over, with the counts that say so and the window's newest negative texts."""

    time: float
    topic: str
    begins: bool
    negatives: int
    messages: int
    negatives_before: int
    messages_before: int
    p: float
    texts: tuple[str, ...] = ()


def surge_p(negatives: int, messages: int, negatives_before: int, messages_before: int) -> float:
    """The one-sided p of Fisher's exact test that the share of negatives is as high as this by chance alone."""
    from scipy.stats import hypergeom

    total, total_negatives = messages + messages_before, negatives + negatives_before
    return float(min(1.0, hypergeom.sf(negatives - 1, total, total_negatives, messages)))


@dataclass
class _Topic:
    window: deque[Message] = field(default_factory=deque)
    before: deque[tuple[float, bool]] = field(default_factory=deque)
    negatives: int = 0
    negatives_before: int = 0
    surging: bool = False

    def add(self, message: Message, rule: Rule) -> None:
        self.window.append(message)
        self.negatives += message.negative
        while self.window[0].time <= message.time - rule.window_seconds:
            old = self.window.popleft()
            self.negatives -= old.negative
            self.before.append((old.time, old.negative))
            self.negatives_before += old.negative
        while self.before and self.before[0][0] <= message.time - rule.window_seconds - rule.baseline_seconds:
            self.negatives_before -= self.before.popleft()[1]

    def change(self, name: str, time: float, rule: Rule) -> Change | None:
        counts = (self.negatives, len(self.window), self.negatives_before, len(self.before))
        if not self.surging and (min(counts[1], counts[3]) < rule.least or not self._is_higher()):
            return None
        p = surge_p(*counts)
        if p > rule.end if self.surging else p <= rule.begin:
            self.surging = not self.surging
            texts = [message.text for message in self.window if message.negative][-TEXTS_SHOWN:]
            return Change(time, name, self.surging, *counts, p, tuple(texts))
        return None

    def _is_higher(self) -> bool:
        """Spares the test where it cannot be significant, which is nearly always."""
        return self.negatives * len(self.before) > self.negatives_before * len(self.window)


def changes(messages: Iterable[Message], rule: Rule) -> Iterator[Change]:
    """The surges that begin and end, once a message shows it. Memory holds the messages of window and baseline."""
    topics: dict[str, _Topic] = {}
    latest = float("-inf")
    for message in messages:
        latest = max(latest, message.time)
        kept = Message(latest, (), message.negative, message.text)
        for name in dict.fromkeys((EVERYTHING, *message.topics)):
            topic = topics.setdefault(name, _Topic())
            topic.add(kept, rule)
            found = topic.change(name, latest, rule)
            if found is not None:
                yield found
