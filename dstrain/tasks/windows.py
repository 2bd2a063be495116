"""Long texts in windows that overlap, each token owned by the window that shows most of what is around it.

tokens    0 1 2 3 4 5 6 7 8 9          room 6, stride 2
window 1  0 1 2 3 4|5                  owns 0 … 4
window 2          4|5 6 7 8 9          owns 5 … 9
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` of a text, of which it owns `first` to `last`; ends are exclusive."""

    start: int
    stop: int
    first: int
    last: int


def windows(tokens: int, room: int, stride: int) -> list[Window]:
    """The windows of a text. Every token is owned once; a text without tokens has one empty window.

    Args:
        tokens: of the text.
        room: most tokens of a window; more than `stride`.
        stride: tokens that neighbours share.
    """
    starts = [0]
    while starts[-1] + room < tokens:
        starts.append(starts[-1] + room - stride)
    stops = [min(start + room, tokens) for start in starts]
    borders = [0, *((start + stop + 1) // 2 for start, stop in zip(starts[1:], stops, strict=False)), tokens]
    return [
        Window(start, stop, borders[at], borders[at + 1])
        for at, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]
