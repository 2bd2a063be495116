"""`dstrain ckpt import`: another program's checkpoint becomes the first checkpoint of a run.

    source ──► pieces by name ──► the recipe's names and shapes? ──► staging/*.safetensors ──verified──► step-N

Weights and Adam's moments are copied as they are, without a process group and without a GPU. The run begins at the
source's step; its data begins at row 0, or where `--rows` says.
"""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dstrain.base.storage import Place
from dstrain.checkpoint.commit import explain_os_error
from dstrain.checkpoint.fragments import WEIGHT, fragment_key
from dstrain.checkpoint.identity import GlobalBatches, Identity
from dstrain.checkpoint.manifest import Manifest, checkpoints_of, committed
from dstrain.checkpoint.store_owner import owned_store
from dstrain.checkpoint.targets import target_of
from dstrain.checkpoint.verify import check_completeness, check_file
from dstrain.convert.foreign import open_foreign, renamed
from dstrain.convert.foreign_piece import Foreign, ForeignPiece
from dstrain.errors import EXIT_DONE, CheckpointError
from dstrain.plan.schedule import learning_rate
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe
from dstrain.rundir.prepare import open_corpus, write_recipe
from dstrain.rundir.run_folder import exclusive
from dstrain.runtime.runtime import Runtime
from dstrain.tasks.task import Task, task_class
from dstrain.train.state import model_config, parameter_shapes

FILE_BYTES = 1 << 30
NAMES_SHOWN = 8
_COMPUTED = ".position_ids"  # older versions of Transformers saved them


def import_command(args: Namespace) -> int:
    """`dstrain ckpt import SOURCE RUN --recipe RECIPE [--rows N] [--step N] [key=value …]`."""
    recipe = load_recipe(args.recipe, args.overrides).recipe
    run_dir = Path(args.run)
    with exclusive(run_dir):
        _require_unused(run_dir)
        write_recipe(run_dir, recipe)
        _require_unused(run_dir)  # the recipe may name a store
        open_corpus(recipe)
        task = task_class(recipe)(recipe, Runtime.offline(recipe))
        source = Path(args.source)
        with owned_store(run_dir):
            folder, foreign = import_checkpoint(source, run_dir, recipe, task, first_row=args.rows, step=args.step)
    step = foreign.step if args.step is None else args.step
    print(f"{source}: {foreign.kind}, at step {step:,} after {foreign.optimizer_steps:,} updates\n→ {folder}")
    if step >= task.totals.steps:
        print(f"the recipe ends at step {task.totals.steps:,}: `dstrain run` has nothing to train; raise train.steps")
    return EXIT_DONE


def _require_unused(run_dir: Path) -> None:
    if committed(run_dir) or (run_dir / "ledger.jsonl").exists():
        raise CheckpointError(
            f"{run_dir} holds a run already, or {checkpoints_of(run_dir)} does; give a new folder, an import begins one"
        )


def import_checkpoint(
    source: Path, run_dir: Path, recipe: Recipe, task: Task, *, first_row: int = 0, step: int | None = None
) -> tuple[Place, Foreign]:
    """Make a committed checkpoint of another program's.

    Args:
        source: its folder.
        run_dir: where to; with the recipe, without checkpoints.
        recipe: of the run that goes on from it.
        task: the recipe's, whose model is in one piece.
        first_row: with which row the data goes on; the first one of a global batch.
        step: the step that it is of (default: what it says itself).

    Raises:
        CheckpointError: it cannot be read, is of another model or damaged, or there is no room.
    """
    wanted = parameter_shapes(task)
    trained = {name: about["shape"] for name, about in wanted.items() if len(about["states"]) > 1}
    foreign = renamed(open_foreign(source, trained), wanted, _tied_names(task))
    _require_same_model(source, foreign, wanted)
    number = foreign.step if step is None else step
    if number < foreign.optimizer_steps:
        raise CheckpointError(
            f"--step {number}: Adam made {foreign.optimizer_steps} updates before; give at least that"
        )
    data_step = _data_step(task.identity(), first_row)
    target = target_of(run_dir, number)
    try:
        target.prepare()
        files = {}
        for index, part in enumerate(_files(foreign, wanted)):
            name = f"part-{index:05d}.safetensors"
            pieces = [(fragment_key(piece.parameter, piece.state, piece.offset), piece.values) for piece in part]
            files[name] = target.write(name, pieces).entry()
        manifest = Manifest(
            step=number,
            data_step=data_step,
            optimizer_steps=foreign.optimizer_steps,
            rollbacks=0,
            learning_rate=learning_rate(recipe, task.totals.timeline, number, None),
            rng={"scheme": "counter", "seed": recipe.train.seed},
            identity=task.identity(),
            topology={
                "world_size": foreign.world_size,
                "zero_stage": foreign.zero_stage,
                "precision": foreign.precision,
            },
            model_config=model_config(task.model),
            parameters=wanted,
            files=files,
            origin={"step": number, "data_step": data_step, "first_row": first_row, "source": str(source.resolve())},
        )
        _require_sound(source, target.writing, manifest)
        target.commit(manifest.text(), lambda _: None)
    except OSError as error:
        target.abandon()
        raise CheckpointError(f"not imported: {explain_os_error(error, target.final)}") from error
    except CheckpointError:
        target.abandon()
        raise
    return target.final, foreign


def _tied_names(task: Task) -> dict[str, str]:
    """Name of a tied parameter → the first name of the same tensor."""
    first = {id(tensor): name for name, tensor in task.model.named_parameters()}
    every = task.model.named_parameters(remove_duplicate=False)
    return {name: first[id(tensor)] for name, tensor in every if first[id(tensor)] != name}


def _require_same_model(source: Path, foreign: Foreign, wanted: dict[str, dict[str, Any]]) -> None:
    """Name what the two do not have in common."""
    states: dict[str, set[str]] = {}
    for piece in (piece for part in foreign.parts for piece in part):
        states.setdefault(piece.parameter, set()).add(piece.state)
    extra = [name for name in states if name not in wanted and not name.endswith(_COMPUTED)]
    problems = [
        _named("it lacks", [name for name in wanted if name not in states]),
        _named("it has beside them", extra),
    ]
    shapes = {name: foreign.shapes.get(name) for name in wanted if name in states}
    other = [
        f"{name} ({shape}, here {wanted[name]['shape']})"
        for name, shape in shapes.items()
        if shape is not None and list(shape) != wanted[name]["shape"]
    ]
    problems.append(_named("of another shape are", other))
    if not any(problems):
        frozen = [name for name in shapes if not set(wanted[name]["states"]) <= states[name]]
        trained_states = {state: None for about in wanted.values() for state in about["states"] if state != WEIGHT}
        problems.append(_named(f"without {' and '.join(trained_states)} are (frozen there, trained here)", frozen))
    if any(problems):
        raise CheckpointError(
            f"{source} is of another model than the recipe's:\n  "
            + "\n  ".join(filter(None, problems))
            + "\ngive the recipe of that model"
        )


def _named(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{what}: {', '.join(names[:NAMES_SHOWN])}{more}"


def _data_step(identity: Identity, first_row: int) -> int:
    """The data step that begins with a row."""
    batches = GlobalBatches(identity)
    data_step = batches.step_of(max(first_row, 0))
    if batches.first_row(data_step) != first_row:
        raise CheckpointError(
            f"--rows {first_row}: the data goes on at the beginning of a global batch; give "
            f"{batches.first_row(data_step)} or {batches.first_row(data_step + 1)}"
        )
    return data_step


def _files(foreign: Foreign, wanted: dict[str, dict[str, Any]]) -> Iterator[list[ForeignPiece]]:
    """What is wanted of the pieces, in portions that become a file each."""
    portion: list[ForeignPiece] = []
    size = 0
    for piece in (piece for part in foreign.parts for piece in part):
        if piece.values.numel() and piece.state in wanted.get(piece.parameter, {"states": []})["states"]:
            portion.append(piece)
            size += piece.values.numel() * piece.values.element_size()
        if size >= FILE_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _require_sound(source: Path, staging: Place, manifest: Manifest) -> None:
    """Read back what was written; and let every element be there once, and finite."""
    problems = [problem for name in manifest.files for problem in check_file(staging, name, manifest)]
    problems = problems or check_completeness(staging, manifest)
    if problems:
        words = (problem.replace(f"{staging}: ", "").replace(f"{staging}/", "") for problem in problems[:NAMES_SHOWN])
        raise CheckpointError(f"{source} is damaged, or not whole:\n  " + "\n  ".join(words))
