"""What one rank does, from the recipe in the run folder to the last checkpoint."""

from pathlib import Path

from dstrain.checkpoint.commit import explain_os_error
from dstrain.errors import DISK_FULL, UserError
from dstrain.plan.attention import attention_of
from dstrain.plan.engine import clips_itself
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe
from dstrain.report.page import write_report
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.task import Task, task_class
from dstrain.train.loop import Loop, Outcome, StopRequest
from dstrain.train.optim import build_optimizer, freeze
from dstrain.train.reporting import Reporter
from dstrain.train.unfreezing import hold_back, unfreeze_every_steps


def run_rank(run_dir: Path, attempt: int, reporter: type[Reporter] = Reporter) -> Outcome:
    """Train the recipe of a run folder on this rank, resuming from its newest checkpoint.

    `reporter` is told everything that happens; drills give one that also makes things happen.

    Raises:
        UserError: recipe, data, checkpoint or disk are at fault.
    """
    stop = StopRequest()
    recipe = load_recipe(run_dir / "recipe.yaml").recipe
    runtime = Runtime.start(recipe)
    task = build_task(recipe, runtime)
    prepare(runtime, task)
    try:
        with reporter(runtime, recipe, run_dir, attempt, task.totals.steps) as report:
            outcome = Loop(runtime, task, run_dir, report, stop).run()
            if outcome == "done" and runtime.rank == 0:
                report_on(run_dir, report)
    except OSError as error:
        if error.errno in DISK_FULL:  # between saves: the ledger, metrics
            raise UserError(explain_os_error(error, run_dir)) from error
        raise
    runtime.close()  # not after a failure: with a peer gone it may wait for ever
    return outcome


def report_on(run_dir: Path, report: Reporter) -> None:
    """Write the report of a run that is done. Without one it is done all the same."""
    try:
        write_report([run_dir], run_dir / "report.html", run_dir / "report.md")
    except (UserError, OSError) as error:
        report.say(f"no report: {error}; `dstrain report {run_dir} --html report.html` makes one")


def build_task(recipe: Recipe, runtime: Runtime) -> Task:
    """The task that a recipe names."""
    return task_class(recipe)(recipe, runtime)


def prepare(runtime: Runtime, task: Task) -> None:
    """Give the task's module and its optimizer to the runtime."""
    recipe = runtime.recipe
    if attention_of(recipe, on_cpu=runtime.device.type == "cpu") == "matmul":
        task.model.set_attn_implementation("matmul")
    if recipe.model.activation_checkpointing:
        task.model.activation_checkpointing_enable()
    freeze(task.module, recipe.model.frozen_layers)
    clip = recipe.train.clip_grad_norm if recipe.train.clip_grad_norm is not None else float("inf")
    optimizer = build_optimizer(
        task.module,
        recipe.optimizer,
        clip_grad_norm=clip if clips_itself(recipe) else None,
        unfreeze_every_steps=unfreeze_every_steps(recipe, task.totals.steps),
    )
    hold_back(runtime, optimizer.param_groups)
    runtime.prepare(task.module, optimizer)
