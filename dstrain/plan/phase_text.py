"""What `dstrain plan` says of batches, phases and sources."""

from typing import Any

from dstrain.plan.batch import most_ranks
from dstrain.plan.corpus import CorpusSize
from dstrain.plan.overview import PhaseNumbers, Plan
from dstrain.plan.units import quantity
from dstrain.recipe.schema import PretrainingRecipe

_HEADS = (
    *("phase", "first step", "steps", "tokens", "rows", "length", "micro-batches", "used", "masked", "peak rate"),
    "schedule",
)
_LEFT_COLUMNS = (0, 10, 11, 12)  # of words


def batch_lines(plan: Plan) -> list[str]:
    """Say how global batches are split, each way once, and how many ranks there may be."""
    splits: dict[str, dict[str, None]] = {}
    for phase in plan.phases:
        splits.setdefault(str(phase.batch), {})["" if phase.plan is None else phase.plan.name] = None
    named = len(splits) > 1
    lines = [f"{split}  ({_first_and_last(list(names))})" if named else split for split, names in splits.items()]
    if any(phase.batch.used < 1 for phase in plan.phases):
        lines.append("Ranks with fewer rows are given rows of weight 0, and micro-batches of a step are all as large.")
    most = most_ranks(plan.recipe)
    what = "lanes" if isinstance(plan.recipe, PretrainingRecipe) else "rows of a global batch"
    return [*lines, f"1 to {most:,} ranks can train it, as there are {most:,} {what}"]


def _first_and_last(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}" if len(names) > 2 else ", ".join(names)


def phase_lines(plan: Plan) -> list[str]:
    """Return a table of the phases; none where there is one of a single source."""
    if plan.timeline is None or len(plan.phases) == len(plan.timeline.source_names) == 1:
        return []
    rows = [_HEADS, *(_cells(plan, phase) for phase in plan.phases)]
    names, phases = plan.timeline.source_names, plan.timeline.phases
    if len(names) > 1:
        shares = [
            ", ".join(f"{name} {share:.3g}" for name, share in zip(names, phase.weights, strict=True) if share)
            for phase in phases
        ]
        rows = [(*row, cell) for row, cell in zip(rows, ("sources", *shares), strict=True)]
    if any(phase.rope for phase in phases):
        changes = [", ".join(f"{key} {value:g}" for key, value in phase.rope.items()) for phase in phases]
        rows = [(*row, cell) for row, cell in zip(rows, ("model", *changes), strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:{'<' if column in _LEFT_COLUMNS else '>'}{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cells(plan: Plan, numbers: PhaseNumbers) -> tuple[str, ...]:
    phase, batch = numbers.plan, numbers.batch
    assert phase is not None, "a timeline has phases"
    schedule = "of the run" if phase.schedule is None else str(phase.schedule.name)
    if phase.schedule is not None and phase.schedule_first_step != phase.first_step:
        schedule += f", from step {phase.schedule_first_step:,}"
    return (
        phase.name,
        f"{phase.first_step:,}",
        f"{phase.steps:,}",
        quantity(phase.steps * batch.tokens),
        f"{phase.global_batch_rows:,}",
        f"{phase.sequence_length:,}",
        f"{batch.accumulation} × {batch.micro_batch_rows}",
        f"{100 * batch.used:.0f} %",
        " → ".join(f"{rate:g}" for rate in dict.fromkeys(phase.masking_rate)),
        f"{phase.learning_rate:g}",
        schedule,
    )


def data_lines(plan: Plan) -> list[str]:
    """Say how often each source is read, what ends when, and how the tokens lie in blocks and lanes."""
    recipe = plan.recipe
    if not isinstance(recipe, PretrainingRecipe):
        return []
    lines = [] if plan.timeline is None else list(plan.timeline.notes)
    for name, size in plan.corpora.items():
        blocks: dict[str, Any] = block_sizes(size, recipe)
        shuffled = f"{blocks['shuffle_window']:,} blocks of a lane are"
        if blocks["shuffle_window"] * recipe.lanes >= blocks["blocks"]:
            shuffled = "all of a lane is"
        lines.append(
            f"{name}: {size.tokens:,} tokens of {size.documents:,} documents in {blocks['blocks']:,} blocks of "
            f"{blocks['block_tokens']:,}; {shuffled} shuffled together; "
            f"{size.tokens // recipe.lanes:,} tokens of a lane in each epoch; "
            f"at most {_percent(blocks['most_documents_cut'] / size.documents)} of its documents are cut by a border "
            "of a block or lane"
        )
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.{2 if share < 0.1 else 3}g} %"


def block_sizes(size: CorpusSize, recipe: PretrainingRecipe) -> dict[str, int]:
    """The tokens of a block of a corpus, how many there are, and how many of a lane are shuffled together.

    `most_documents_cut`: in an epoch, each border between two blocks or two lanes cuts a document, or none.
    """
    from dstrain.data.line import default_block_tokens, default_window_blocks  # imports numpy

    tokens = default_block_tokens(size.tokens, size.documents)
    window = recipe.data.shuffle_window
    blocks = -(-size.tokens // tokens)
    return {
        "block_tokens": tokens,
        "blocks": blocks,
        "most_documents_cut": min(blocks + recipe.lanes - 2, size.documents),
        "shuffle_window": default_window_blocks(recipe.lanes) if window is None else window,
    }
