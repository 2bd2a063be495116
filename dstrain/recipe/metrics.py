"""Names of what evaluations measure, as recipes write them."""

from typing import Annotated

from pydantic import AfterValidator

# A number of the evaluations: `loss` as reports have it, or `valid_loss` as metrics.jsonl has it. `loss.web` is that of
# the source `web`.
Metric = Annotated[str, AfterValidator(lambda name: name.removeprefix("valid_"))]
