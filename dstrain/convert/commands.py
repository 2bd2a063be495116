"""`dstrain ckpt ls | verify | diff | export | prune | release`."""

import json
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.base import durations
from dstrain.base.storage import Place, StoragePath, place
from dstrain.checkpoint.choose import checkpoints_in, choose_checkpoint, choose_sound, is_checkpoint
from dstrain.checkpoint.data_change import last_step_of_other_data
from dstrain.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    checkpoints_of,
    committed,
    folder_name,
    run_of,
    step_of,
)
from dstrain.checkpoint.records import Records, record_export, record_verified
from dstrain.checkpoint.retention import Retention, examined, prune, reasons_to_keep
from dstrain.checkpoint.run_recipe import recipe_in, recipe_of
from dstrain.checkpoint.store_owner import release
from dstrain.checkpoint.verify import check_recipe_of, newest_sound, verify
from dstrain.errors import EXIT_DONE, EXIT_FAILURE, CheckpointError

if TYPE_CHECKING:
    from dstrain.checkpoint.distance import Distance


def ls_command(args: Namespace) -> int:
    """`dstrain ckpt ls RUN [--json]`: what each checkpoint is, newest first. Reads manifests only."""
    run_dir = place(args.path)
    folders = checkpoints_in(run_dir)
    known = Records.read(run_dir)
    listed = [_described(folder, known) for folder in folders]
    if args.json:
        print(json.dumps(listed, indent=2))
        return EXIT_DONE
    print(
        f"{'step':>10}  {'size':>11}  {'age':>7}  {'ranks':>5}  {'ZeRO':>4}  precision  {'batches':>10}  "
        f"{'verified':>8}  folder"
    )
    for entry in listed:
        if "problem" in entry:
            print(f"{entry['step']:>10}  {entry['problem']}")
        else:
            verified = "-" if entry["verified_at"] is None else durations.rounded(time.time() - entry["verified_at"])
            exported = "".join(f"  → {where}" for where in entry["exports"])
            print(
                f"{entry['step']:>10}  {entry['bytes'] / 1e6:>8,.1f} MB  {durations.rounded(entry['age_seconds']):>7}  "
                f"{entry['world_size']:>5}  {entry['zero_stage']:>4}  {entry['precision']:<9}  "
                f"{entry['data_step']:>10}  {verified:>8}  {entry['folder']}{exported}"
            )
    return EXIT_DONE


def _described(folder: Place, known: Records) -> dict[str, Any]:
    try:
        manifest = Manifest.read(folder)
        saved_at = (folder / MANIFEST).stat().st_mtime
    except CheckpointError as error:
        return {"step": step_of(folder), "folder": str(folder), "problem": str(error)}
    record = known.of(folder)
    return {
        "step": manifest.step,
        "folder": str(folder),
        "bytes": sum(stated["bytes"] for stated in manifest.files.values()),
        "age_seconds": time.time() - saved_at,
        "data_step": manifest.data_step,
        "learning_rate": manifest.learning_rate,
        **manifest.topology,
        "verified_at": record.verified_at,
        "exports": record.exports,
    }


def verify_command(args: Namespace) -> int:
    """`dstrain ckpt verify RUN|CKPT [--json]`: read every file. Raises CheckpointError listing all problems."""
    path = place(args.path)
    folders = [path] if is_checkpoint(path) else checkpoints_in(path)
    found = {folder: _verified(folder) for folder in folders}
    if args.json:
        print(
            json.dumps([{"folder": str(folder), "problems": problems} for folder, problems in found.items()], indent=2)
        )
    else:
        for folder, problems in found.items():
            print(f"{folder}: {f'{len(problems)} problems' if problems else 'good'}")
    if problems := [problem for problems in found.values() for problem in problems]:
        raise CheckpointError("\n".join(problems))
    return EXIT_DONE


def _verified(folder: Place) -> list[str]:
    """Problems of a checkpoint, those with its run's recipe included; the result is put on record."""
    problems = verify(folder)
    if problems and (folder / MANIFEST).is_file():
        record_verified(folder, None)
    if not problems:
        recipe = recipe_of(folder)
        if recipe is not None:
            manifest = Manifest.read(folder)
            if manifest.step > last_step_of_other_data(run_of(folder)):
                problems = check_recipe_of(folder, manifest, recipe)
        record_verified(folder, None if problems else time.time())
    return problems


def diff_command(args: Namespace) -> int:
    """`dstrain ckpt diff A B [--json]`: how far two checkpoints are apart, by parameter. Exit code 1 if they differ.

    Raises:
        CheckpointError: one of them is missing, damaged, or of another model than the other.
    """
    from dstrain.checkpoint.distance import COUNTERS, parameter_distances

    (first, manifest), (second, its) = (choose_sound(place(path)) for path in (args.first, args.second))
    found = parameter_distances(first, manifest, second, its)
    counters = {
        name: [getattr(manifest, name), getattr(its, name)]
        for name in COUNTERS
        if getattr(manifest, name) != getattr(its, name)
    }
    same = all(one.bit_equal for states in found.values() for one in states.values())
    if args.json:
        parameters = {name: {state: asdict(one) for state, one in states.items()} for name, states in found.items()}
        print(json.dumps({"first": str(first), "second": str(second), "bit_equal": same, "parameters": parameters}
                         | {"counters": counters}))  # fmt: skip
    else:
        print(f"{first}\n{second}")
        for name, (mine, others) in counters.items():
            plain = isinstance(mine, int | float) and isinstance(others, int | float)
            print(f"  {name}: {mine} and {others}" if plain else f"  {name} differ")
        print("\n".join(_apart_lines(found)))
    return EXIT_DONE if same else EXIT_FAILURE


def _apart_lines(found: "dict[str, dict[str, Distance]]") -> list[str]:
    """The parameters that differ, those farthest apart first, and how many are equal."""
    apart = {name: states for name, states in found.items() if not all(one.bit_equal for one in states.values())}
    lines = [f"{len(found) - len(apart)} of {len(found)} parameters are bit-equal, with all their states"]
    if apart:
        width = max(map(len, apart))
        kinds = list(dict.fromkeys(state for states in apart.values() for state in states))
        lines.append(f"{'norm of the difference ÷ norm':<{width}}  " + "  ".join(f"{kind:>10}" for kind in kinds))
        ordered = sorted(apart.items(), key=lambda item: -max(one.relative for one in item[1].values()))
        for name, states in ordered:
            cells = ("" if kind not in states else _cell(states[kind]) for kind in kinds)
            lines.append(f"{name:<{width}}  " + "  ".join(f"{cell:>10}" for cell in cells))
    return lines


def _cell(one: "Distance") -> str:
    return "bit-equal" if one.bit_equal else f"{one.relative:.1e}"


def prune_command(args: Namespace) -> int:
    """`dstrain ckpt prune RUN [--keep N] [--dry-run]`: keep what the recipe's rules keep, or the newest N."""
    run_dir = place(args.path)
    sound, skipped = newest_sound(checkpoints_in(run_dir))
    retention = _retention(run_dir, args.keep)
    step = step_of(sound)
    assert step is not None
    candidates, damaged = examined(run_dir, step)
    for line in [*skipped, *(f"{folder.name} is damaged" for folder in damaged)]:
        print(f"{line}; left where it is")
    if args.dry_run:
        kept = reasons_to_keep(candidates, retention)
        for one in candidates:
            print(f"{checkpoints_of(run_dir) / folder_name(one.step)}  {kept.get(one.step, 'would be removed')}")
        return EXIT_DONE
    try:
        removed = prune(run_dir, retention, up_to_step=step)
    except OSError as error:
        raise CheckpointError(f"{run_dir}: {error}; make it writable") from error
    for folder in removed:
        print(f"removed {folder}")
    print(f"{len(removed)} removed, {len(committed(run_dir))} left in {checkpoints_of(run_dir)}")
    return EXIT_DONE


def _retention(run_dir: Place, keep: int | None) -> Retention:
    """The rules of the command line, else those of the run's recipe."""
    if keep is not None:
        if keep < 1:
            raise CheckpointError(f"--keep {keep}: a run keeps one checkpoint at least")
        return Retention(keep)
    recipe = recipe_in(run_dir)
    if recipe is None:
        raise CheckpointError(f"{run_dir} has no recipe.yaml, whose rules would say what to keep; give --keep N")
    return Retention.of(recipe)


def release_command(args: Namespace) -> int:
    """`dstrain ckpt release STORE`: take off the claim of a run that will not come back."""
    store = place(args.path)
    if not isinstance(store, StoragePath):
        raise CheckpointError(f"{store} is no store; give its URL, as in checkpoint.storage. Folders need no release")
    owner = release(store)
    print(f"{store} was nobody's" if owner is None else f"{store} was of {owner}; it is nobody's now")
    return EXIT_DONE


def export_command(args: Namespace) -> int:
    """`dstrain ckpt export RUN|CKPT [--out DIR] [--step N]`: the newest sound checkpoint, or the one that is named."""
    from dstrain.convert.export import export

    path = place(args.path)
    checkpoint, remarks = choose_checkpoint(path, args.step)
    for line in remarks:
        print(line)
    run = run_of(checkpoint) if is_checkpoint(path) else path
    if args.out is not None:
        out = Path(args.out)
    elif isinstance(run, Path):
        out = run / "export"
    else:
        raise CheckpointError(f"{path} is in a store; say with --out which folder of this machine to write")
    difference = export(checkpoint, out)
    record_export(checkpoint, out)
    print(f"{checkpoint} → {out}\nlogits of the trained and of the exported model differ by {difference:.1e} at most")
    return EXIT_DONE
