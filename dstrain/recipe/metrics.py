"""What evaluations of each task measure: so a metric that there is not is found before anything is trained."""

from typing import Annotated

from pydantic import AfterValidator

_RANKS = ("ndcg_10", "mrr_10", "recall_10", "recall_100")
_CLASSES = ("accuracy", "macro_f1", "micro_f1", "weighted_f1", "matthews", "auroc")
_NUMBERS = ("mean_squared_error", "mean_absolute_error", "pearson", "spearman")
_ROUGES = ("rouge1", "rouge2", "rougeL")

# By task, beside `loss`; some only with some kinds of data.
MEASURED: dict[str, tuple[str, ...]] = {
    "masked_lm": ("perplexity", "accuracy", "pair_loss", "pair_accuracy"),
    "sequence_classification": (*_CLASSES, *_NUMBERS),
    "token_classification": ("precision", "recall", "f1", "token_accuracy"),
    "question_answering": ("exact_match", "f1", "answerable_f1", "unanswerable_f1"),
    "retrieval": _RANKS,
    "ranking": _RANKS,
    "sequence_to_sequence": ("bleu", "chrf", *_ROUGES),
    "sentence_extraction": _ROUGES,
}

# A number of the evaluations: `loss` as reports have it, or `valid_loss` as metrics.jsonl has it. `loss.web` is that of
# the source `web`.
Metric = Annotated[str, AfterValidator(lambda name: name.removeprefix("valid_"))]


def not_measured(metric: str, task: str) -> str | None:
    """What is wrong with the name of a metric; None where evaluations of the task may have it.

    Whether there is a source of the name behind a dot is not asked here.
    """
    known = ("loss", *MEASURED[task])
    name, dot, _ = metric.removeprefix("valid_").partition(".")
    if name in known and (task == "masked_lm" or not dot):
        return None
    return f"is nothing that evaluations of {task} measure; use one of {', '.join(known)}"
