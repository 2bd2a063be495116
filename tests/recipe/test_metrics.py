"""Names of metrics: known for every task, and the same whichever way they are written."""

from typing import get_args

from dstrain.recipe.definition import definitions
from dstrain.recipe.measured import not_measured
from dstrain.recipe.training import EarlyStopping, KeepBest


def test_every_task_has_its_keys_and_its_metrics() -> None:
    for task, definition in definitions():
        assert get_args(definition.recipe.model_fields["task"].annotation) == (task,)
        assert len(definition.measures) > 1
        assert all(not_measured(name, task) is None for name in definition.measures)


def test_a_metric_is_named_as_reports_or_as_the_log_has_it() -> None:
    assert EarlyStopping(metric="valid_loss").metric == KeepBest(metric="loss").metric == "loss"
    assert not_measured("valid_rouge1", "sentence_extraction") is None
    assert not_measured("valid_perplexity.web", "masked_lm") is None, "of a source"
    assert not_measured("rouge1.web", "sentence_extraction") is not None
    assert not_measured("rouge3", "sentence_extraction") == (
        "is nothing that evaluations of sentence_extraction measure; use one of loss, rouge1, rouge2, rougeL"
    )
