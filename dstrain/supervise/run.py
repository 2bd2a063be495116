"""`dstrain run`: everything that can be wrong is found before a process is started.

without --on                 this machine, in the environment of the command          dstrain.supervise.local
a transport without a queue  supervised from here, in the environment that the profile says
a transport with a queue     handed over to it; supervised from the job's first node   dstrain.supervise.batch
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from dstrain.base import environment
from dstrain.base.code_digest import code_digest
from dstrain.errors import EXIT_DONE, UserError
from dstrain.observe.run_record import RunRecord
from dstrain.plan import batch_plan
from dstrain.preflight.preflight import check_launch, check_profile
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe
from dstrain.rundir.attempt_files import write_json
from dstrain.rundir.prepare import check_recipe, open_corpus, write_recipe
from dstrain.rundir.run_folder import TRAINING, exclusive, newest_checkpoint, next_attempt
from dstrain.rundir.timings import Timings
from dstrain.supervise import debugging, local
from dstrain.supervise.attempt import attempt_plan, redacted_values
from dstrain.transport.cluster import (
    hosts_of,
    make_cluster,
    node_settings,
    nodes_in_words,
    spare_hosts,
    stop_timeout_seconds,
    supervisors_python,
    usable_nodes,
)
from dstrain.transport.command import Cluster, Job, shell_comment
from dstrain.transport.node_script import node_script
from dstrain.transport.profile import Profile, load_profile, parse_nodes
from dstrain.transport.submission import FILE_NAME, Submission
from dstrain.transport.transport import TRANSPORTS, Queue, queue_names


def run_command(args: argparse.Namespace) -> int:
    """`dstrain run RECIPE [key=value …] [--on PROFILE] [--nodes N] [--chain N] …`.

    Returns:
        The exit code of `supervise`; 0 for a dry run, and for a job that SLURM has accepted.

    Raises:
        UserError: the recipe, the profile, the numbers, a host or the run folder cannot be used.
    """
    if args.on is None:
        for option, value in (("--nodes", args.nodes), ("--chain", args.chain), ("--pdb", args.pdb)):
            if value is not None:
                raise UserError(f"{option} needs a profile; say where with --on, as in --on launch/slurm.yaml")
        return local.run_command(args)
    profile = load_profile(args.on)
    recipe = load_recipe(args.recipe, profile.with_overrides(args.overrides)).recipe
    run_dir = local.run_folder(args, recipe).resolve()
    nodes = profile.node_range if args.nodes is None else parse_nodes(args.nodes)
    transport = TRANSPORTS[profile.transport]
    if args.chain is not None and (transport.queue is None or args.chain < 1):
        raise UserError(f"--chain {args.chain} is for transport: {' or '.join(queue_names())}, and at least 1")
    if profile.debug is not None:
        return debugging.debug_command(args, profile, recipe)
    check_recipe(run_dir, recipe, args.allow)
    if args.pdb is not None:
        raise UserError(f"--pdb {args.pdb} needs a profile with a `debug` section, as in --on launch/debug.yaml")
    check_profile(profile, Timings.read(run_dir))
    if transport.queue is not None:
        return _submit(args, profile, recipe, run_dir, nodes, transport.queue)
    return _supervise(args, profile, recipe, run_dir, nodes)


# ---------------------------------------------------------------- from here


def _supervise(
    args: argparse.Namespace, profile: Profile, recipe: Recipe, run_dir: Path, nodes: tuple[int, int]
) -> int:
    ranks = args.procs_per_node or profile.procs_per_node
    transport = TRANSPORTS[profile.transport]
    if transport.most_nodes is not None and nodes[1] > transport.most_nodes:
        limit = "one node" if transport.most_nodes == 1 else f"at most {transport.most_nodes} nodes"
        raise UserError(
            f"--nodes {args.nodes}: transport: {profile.transport} is {limit}; use a profile with ssh or slurm"
        )
    hosts, ranks = hosts_of(profile, recipe, nodes, ranks)
    listed = transport.hosts(profile)
    said = nodes_in_words(nodes, len(listed), len(hosts))
    cluster = make_cluster(profile, hosts)
    timeout = stop_timeout_seconds(profile, Timings.read(run_dir))
    job = Job(recipe.name, run_dir, ranks, args.max_restarts, timeout, args.entry or TRAINING, cluster)
    spare = spare_hosts(listed, hosts, ranks)
    job = replace(job, on_hang=profile.on_hang, node_range=(nodes[0], len(hosts)), spare_hosts=spare)
    batch = batch_plan(recipe, job.world)
    if args.dry_run:
        print(shell_comment(f"{batch}\n{said or ''}"))
        print(dry_run(job, cluster))
        return EXIT_DONE
    return local.run_in_folder(job, recipe, args.allow, said)


def dry_run(job: Job, cluster: Cluster) -> str:
    """What would be started, as lines for a shell that do the same without the supervisor."""
    attempt = next_attempt(job.run_dir)
    heading = f"attempt {attempt}, {newest_checkpoint(job.run_dir)}; the ranks read {job.run_dir / 'recipe.yaml'}"
    lines = [shell_comment(heading)]
    script = node_script(attempt_plan(job, cluster, attempt, redacted_values(cluster)))
    for channel in TRANSPORTS[cluster.transport].channels(cluster):
        lines += [f"# node {node}: {cluster.hosts[node]}" for node in channel.nodes]
        lines.append(channel.as_shell(script))
    return "\n".join(lines)


# ---------------------------------------------------------------- through a queue


def _submit(
    args: argparse.Namespace, profile: Profile, recipe: Recipe, run_dir: Path, nodes: tuple[int, int], queue: Queue
) -> int:
    ranks = args.procs_per_node or profile.procs_per_node
    if ranks is None:
        raise UserError(
            f"{args.on}: procs_per_node is missing; say how many ranks a node gets, its devices cannot be seen"
        )
    submission = Submission(
        name=recipe.name,
        run_dir=run_dir,
        folder=environment.working_folder(),
        profile=profile,
        supervisors_python=supervisors_python(profile),
        ranks=ranks,
        nodes=(nodes[0], usable_nodes(recipe, ranks, *nodes)),
        max_restarts=args.max_restarts,
        code=code_digest(),
        chain=args.chain,
        first_attempt=next_attempt(run_dir),
    )
    node_settings(profile, submission.folder, environment.variables())  # are all variables there?
    timings = Timings.read(run_dir)
    script = queue.script(submission, timings.lead_seconds())
    if args.dry_run:
        print(script, end="")
        return EXIT_DONE
    jobs: list[str] = []
    with exclusive(run_dir):
        check_recipe(run_dir, recipe, args.allow)
        check_launch(Job(recipe.name, run_dir, ranks=1), recipe)  # what can be seen from here; the job asks its nodes
        open_corpus(recipe)
        write_recipe(run_dir, recipe, args.allow)
        write_json(run_dir / FILE_NAME, submission.as_json())
        (run_dir / queue.script_name).write_text(script)
        for _ in range(args.chain or 1):
            jobs.append(queue.submit(run_dir / queue.script_name))
            span = "–".join(str(count) for count in dict.fromkeys(submission.nodes))
            words = f"submitted as job {jobs[-1]}, {span} nodes of {ranks} ranks; see {run_dir / queue.log_name}"
            print(f"{recipe.name}: {words}")
        RunRecord(  # before a job can begin: it waits for the lock
            name=recipe.name,
            transport=profile.transport,
            host=None,
            pid=None,
            hosts=(),
            ranks=ranks,
            shutdown_timeout_seconds=stop_timeout_seconds(profile, timings),
            started_unix=time.time(),
            jobs=tuple(jobs),
        ).write(run_dir)
    return EXIT_DONE
