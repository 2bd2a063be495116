"""How long a pair of texts is at least, and so how many a row has room for. Imports nothing: the plan asks too."""

SHORTEST_PAIR = 16  # tokens, with [CLS] and both [SEP]


def pair_slots(sequence_length: int) -> int:
    """How many pairs a row may have (the `P` of all shapes)."""
    return sequence_length // SHORTEST_PAIR
