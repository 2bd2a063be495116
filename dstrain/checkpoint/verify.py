"""Whether a checkpoint is what its manifest says: every file, byte for byte, and every element of every parameter."""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dstrain.base.storage import Place
from dstrain.checkpoint.data_change import changes
from dstrain.checkpoint.identity import Identity, SourceContent, contents_of, stream_identity
from dstrain.checkpoint.manifest import MANIFEST, Manifest, OtherFormatError, step_of
from dstrain.checkpoint.scan import scan_file
from dstrain.checkpoint.stored import DamagedError, checked_headers
from dstrain.errors import CheckpointError
from dstrain.plan.timeline import make_timeline
from dstrain.recipe.schema import PretrainingRecipe, Recipe

_ENDLESS = 1 << 60  # tokens of a source whose size does not matter


def verify(folder: Place) -> list[str]:
    """Everything that is wrong with a checkpoint; empty if it can be trusted. Needs neither torch nor a GPU.

    Reads every file once, several at a time: digest, finite numbers, then completeness and coherence.
    """
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as error:
        return [str(error)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda name: check_file(folder, name, manifest), manifest.files)
        problems = [problem for problems in found for problem in problems]
    unknown = {path.name for path in folder.iterdir()} - set(manifest.files) - {MANIFEST}
    problems += [f"{folder / name}: not in the manifest" for name in sorted(unknown)]
    return problems or [*check_completeness(folder, manifest), *check_coherence(folder, manifest)]


def newest_sound(folders: Sequence[Place]) -> tuple[Place, list[str]]:
    """The first of some checkpoints, newest first, that verifies; and a line about each that was passed over.

    Raises:
        CheckpointError: none verifies.
        OtherFormatError: the newest sound one is of another version; going back to an older one would hide that.
    """
    skipped: list[str] = []
    for folder in folders:
        require_known_format(folder)
        problems = verify(folder)
        if not problems:
            return folder, skipped
        skipped.append(describe_skipped(folder, problems))
    raise CheckpointError("\n".join(["no checkpoint can be used", *skipped, "restore one from a copy"]))


def require_known_format(folder: Place) -> None:
    """Raise OtherFormatError if a checkpoint's manifest is sound and of another version; damage is not looked at."""
    try:
        Manifest.read(folder)
    except OtherFormatError:
        raise
    except CheckpointError:
        pass  # `verify` says why, and what else is wrong


def describe_skipped(folder: Place, problems: list[str]) -> str:
    """One line: which checkpoint was passed over, its first problem, and how many more there are."""
    return f"skipped {folder.name}: {problems[0]}" + (f" (+{len(problems) - 1} more)" if problems[1:] else "")


def check_file(folder: Place, name: str, manifest: Manifest) -> list[str]:
    """What is wrong with one file: its size, its digest, trained weights or moments that are not finite."""
    if problems := check_size(folder, name, manifest):
        return problems
    path, stated = folder / name, manifest.files[name]
    trained = {parameter for parameter, about in manifest.parameters.items() if len(about["states"]) > 1}
    try:
        scanned = scan_file(path, lambda key: key.rsplit("|", 2)[0] in trained)
    except OSError as error:
        return [f"{path}: {error.strerror or error}"]
    if scanned.sha256 != stated["sha256"]:
        return [f"{path}: its content changed since it was written (sha256 differs)"]
    return [
        f"{path}: {count:,} values of {' '.join(key.rsplit('|', 2)[:2])} are not finite"
        for key, count in scanned.not_finite.items()
    ]


def check_size(folder: Place, name: str, manifest: Manifest) -> list[str]:
    """Whether a file is there, and as long as it was."""
    path, stated = folder / name, manifest.files[name]["bytes"]
    try:
        size = path.stat().st_size
    except OSError as error:
        return [f"{path}: {error.strerror or error}"]
    return [] if size == stated else [f"{path}: {size:,} bytes, the manifest says {stated:,}"]


def check_completeness(folder: Place, manifest: Manifest) -> list[str]:
    """Check from the files' headers that the pieces of every parameter and state join without gap or overlap."""
    pieces: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    try:
        headers = checked_headers(folder, manifest)
    except (OSError, DamagedError) as error:
        return [str(error)]
    for _, header in headers.values():
        for key, entry in header.items():
            parameter, state, offset = key.rsplit("|", 2)
            pieces[parameter, state].append((int(offset), int(offset) + math.prod(entry["shape"])))
    problems = []
    for parameter, about in manifest.parameters.items():
        for state in about["states"]:
            reached = 0
            for start, stop in sorted(pieces.pop((parameter, state), [])):
                if start != reached:
                    problems.append(f"{folder}: {parameter} {state}: elements {reached} to {start} do not join")
                reached = stop
            if reached != math.prod(about["shape"]):
                problems.append(f"{folder}: {parameter} {state}: {reached} of {math.prod(about['shape'])} elements")
    problems += [f"{folder}: {parameter} {state}: not in the manifest" for parameter, state in sorted(pieces)]
    return problems


def check_coherence(folder: Place, manifest: Manifest) -> list[str]:
    """Check that counters and the random numbers' scheme of a manifest can be those of one run."""
    problems = []
    if manifest.step != step_of(folder):
        problems.append(f"{folder}: its manifest is of step {manifest.step}")
    began = manifest.began
    made, consumed = manifest.step - began["step"], manifest.data_step - began["data_step"]
    if not (0 <= manifest.optimizer_steps <= manifest.step and 0 <= made <= consumed):
        steps = f"{manifest.step} steps" + (f", {made} since step {began['step']}" if began["step"] else "")
        problems.append(
            f"{folder}: {manifest.optimizer_steps} applied of {steps} after {consumed} batches "
            f"cannot be: no step is applied twice, and each consumes a batch"
        )
    if manifest.rng.get("scheme") != "counter":
        problems.append(f"{folder}: random numbers by {manifest.rng.get('scheme')!r}, this dstrain knows 'counter'")
    return problems


def check_recipe_of(folder: Place, manifest: Manifest, recipe: Recipe) -> list[str]:
    """Check that a checkpoint is of its run's recipe: task, batches, and what decides the order of the data.

    Corpora and tokenizer are not opened: their contents are taken to be those of the checkpoint.
    """
    now = _identity_by_numbers(manifest, recipe)
    return [
        f"{folder}: it is another recipe's checkpoint, going by recipe.yaml of its run: {difference}"
        for difference in changes(manifest, now)
    ]


def _identity_by_numbers(manifest: Manifest, recipe: Recipe) -> Identity:
    """The identity of a recipe as far as it can be said without its data; the rest is the checkpoint's."""
    saved = manifest.identity
    if not isinstance(recipe, PretrainingRecipe) or "phases" not in saved:
        data = recipe.data.model_dump(mode="json", include=set(saved.get("data", {})))
        batch = {"global_batch_rows": recipe.train.global_batch_rows} if "global_batch_rows" in saved else {}
        return saved | {"task": recipe.task, "data": data} | batch
    contents = contents_of(saved)
    names = [name for name in recipe.data.training_sources if name not in contents]
    renamed = [content for name, content in contents.items() if name not in recipe.data.training_sources]
    contents |= dict(zip(names, renamed, strict=False))  # sources may have other names now
    contents |= {name: SourceContent("", _ENDLESS) for name in names[len(renamed) :]}  # of phases to come
    timeline = make_timeline(recipe, {name: content.total_tokens for name, content in contents.items()})
    assert timeline is not None, "all sizes are known"
    return saved | stream_identity(recipe, timeline, contents, saved["tokenizer"])
