"""The short form of `dstrain doctor`, before every start: ask the nodes, and refuse what cannot go well.

Nothing is measured, so it takes a fraction of a second here, and a connection's time on other hosts.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

from dstrain.base.extras import require
from dstrain.errors import UserError
from dstrain.plan import kept_checkpoints, make_timeline, recipe_checkpoint_bytes
from dstrain.preflight.ask import Answer, ask, token
from dstrain.preflight.checks import Finding, Nodes, Wanted, judge
from dstrain.preflight.lint import Durations, lint
from dstrain.preflight.probe import Questions, facts
from dstrain.recipe.files import is_path
from dstrain.recipe.keys import flat_values
from dstrain.recipe.schema import PretrainingRecipe, Recipe
from dstrain.rundir.run_folder import committed_steps, next_attempt
from dstrain.rundir.timings import Timings
from dstrain.transport.cluster import stop_timeout_seconds
from dstrain.transport.command import Job, rendezvous
from dstrain.transport.profile import Profile


def check_launch(job: Job, recipe: Recipe, *, lost_nodes_matter: bool = True) -> Job:
    """Ask every node of a run that is about to start, and its spare hosts.

    Args:
        job: the run; its folder is there.
        recipe: what it trains.
        lost_nodes_matter: whether a node that does not answer is refused here, or left to the supervisor.

    Returns:
        The job, with those spare hosts that could stand in.

    Raises:
        UserError: one line for each thing that is wrong on a node; or an extra that the recipe needs is not installed.
    """
    require_extras(recipe)
    findings, _ = examine(job, recipe)
    own = [finding for finding in findings if finding.host not in job.spare_hosts]
    wrong = [finding for finding in own if finding.level == "error"]
    if not lost_nodes_matter:
        wrong = [finding for finding in wrong if finding.check != "nodes"]
    unfit = [finding for finding in findings if finding.level == "error" and finding.host in job.spare_hosts]
    if wrong:
        raise UserError("\n".join(map(str, wrong)))
    for finding in unfit:
        print(f"not to be a spare host: {finding}", file=sys.stderr)
    for finding in own:
        if finding.level != "ok":
            print(f"{finding.level}: {finding}", file=sys.stderr)
    unfit_hosts = {finding.host for finding in unfit}
    return replace(job, spare_hosts=tuple(host for host in job.spare_hosts if host not in unfit_hosts))


def require_extras(recipe: Recipe) -> None:
    """Raises MissingExtraError where a recipe needs packages that are not installed here."""
    if recipe.task != "masked_lm":
        require("tasks", f"task: {recipe.task}")
    if recipe.model.lora is not None:
        require("lora", "model.lora")


def check_profile(profile: Profile, timings: Timings) -> None:
    """Refuse what a profile promises and cannot keep, as far as it is known before any node is asked.

    Raises:
        UserError: one line for each such thing.
    """
    findings = lint(profile, {}, stop_timeout_seconds(profile, timings), Durations.of(timings))
    if wrong := [str(finding) for finding in findings if finding.level == "error"]:
        raise UserError("\n".join(wrong))


def examine(job: Job, recipe: Recipe | None, *, is_long: bool = False) -> tuple[list[Finding], list[Answer]]:
    """Gather the facts of a job's nodes, of its spare hosts and of this machine, and judge them."""
    with token(job.run_dir) as file:
        questions = questions_about(job, recipe, file, is_long=is_long)
        asked = time.time()
        here = facts(questions)
        if job.cluster is None:
            answers = [Answer(here.host, here, 0, "", asked, time.time())]
        else:
            answers = ask(job.cluster, questions, job.spare_hosts)
    return judge(Nodes(answers, here, wanted(job, recipe))), answers


def questions_about(job: Job, recipe: Recipe | None, token_file: Path, *, is_long: bool) -> Questions:
    """What the nodes of a job are asked."""
    cluster = job.cluster
    place = None if cluster is None or len(cluster.hosts) == 1 else rendezvous(job, cluster, next_attempt(job.run_dir))
    return Questions(
        run_dir=str(job.run_dir),
        token=str(token_file),
        paths=() if recipe is None else tuple(paths(recipe)),
        corpora=() if recipe is None else tuple(corpora(recipe)),
        first_host=None if place is None else place[0],
        port=None if place is None else place[1],
        is_long=is_long,
    )


def wanted(job: Job, recipe: Recipe | None) -> Wanted:
    """What a job needs of its nodes."""
    cluster = job.cluster
    room = 0 if recipe is None else room_needed(recipe, len(committed_steps(job.run_dir)))
    if cluster is None:
        return Wanted(ranks=job.ranks, has_recipe=recipe is not None, room_bytes=room)
    return Wanted(
        transport=cluster.transport,
        python=cluster.settings.python,
        nodes=len(cluster.hosts),
        ranks=job.ranks,
        has_recipe=recipe is not None,
        room_bytes=room,
        interface=cluster.settings.interface,
        port_is_fixed=cluster.rendezvous_port is not None,
        in_container=bool(cluster.settings.container),
    )


def room_needed(recipe: Recipe, there: int) -> int:
    """Bytes of the checkpoints that are kept and the one that is being written, less those that are there already.

    On the disk of the run's folder: none where they go into a store.
    """
    if recipe.checkpoint.storage is not None:
        return 0
    timeline = make_timeline(recipe, None)
    kept = kept_checkpoints(recipe, None if timeline is None else timeline.total_steps)
    return recipe_checkpoint_bytes(recipe) * max(1, kept + 1 - there)


def paths(recipe: Recipe) -> list[str]:
    """The files and folders that ranks read; patterns are left to them."""
    values = flat_values(recipe)
    known = [value for key, value in values.items() if is_path(key)]
    return [path for path in known if isinstance(path, str) and not set(path) & set("*?[{")]


def corpora(recipe: Recipe) -> list[tuple[str, str]]:
    """Location and text key of each corpus of shards."""
    if not isinstance(recipe, PretrainingRecipe):
        return []
    sources = recipe.data.training_sources.values()
    locations = [recipe.data.valid, *(place for source in sources for place in (source.shards, source.valid))]
    return [(location, recipe.data.text_field) for location in locations if location is not None]
