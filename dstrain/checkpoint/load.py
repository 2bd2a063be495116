"""Loading: the newest checkpoint that verifies, each rank reading the stretches it needs and nothing else."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstrain.base.blocks import BlockReader, DamagedBlockError
from dstrain.base.storage import Place, place
from dstrain.checkpoint.files import TORCH_DTYPES
from dstrain.checkpoint.fragments import WEIGHT, Fragment, overlap, parse_fragment_key, sync_model_weights
from dstrain.checkpoint.manifest import MANIFEST, Manifest, OtherFormatError, checkpoints_of, committed
from dstrain.checkpoint.scan import count_not_finite
from dstrain.checkpoint.stored import DamagedError, block_digests, checked_headers
from dstrain.checkpoint.verify import check_completeness, check_size, describe_skipped
from dstrain.errors import CheckpointError
from dstrain.runtime.runtime import Runtime


@dataclass(frozen=True)
class Source:
    """A checkpoint chosen for loading, and what was passed over on the way to it."""

    folder: Place
    manifest: Manifest
    skipped: list[str]


def choose(runtime: Runtime, run_dir: Path, damaged: Sequence[str] = ()) -> Source | None:
    """The newest checkpoint that verifies; None if the run has none yet. A collective call: ranks share the looking.

    Manifest, sizes and headers are verified here, and what a rank reads when it reads it: each byte once.

    Args:
        runtime: of this rank.
        run_dir: the run's folder.
        damaged: lines about the newest ones, of which that was found out when they were read.

    Raises:
        CheckpointError: there are checkpoints, and none verifies.
        OtherFormatError: the newest sound one is of another version; going back to an older one would hide that.
    """
    skipped = list(damaged)
    folders: list[str] = runtime.from_rank_0([str(folder) for folder in committed(run_dir)])
    for folder in map(place, folders[len(skipped) :]):
        manifest, problems = _examine(runtime, folder)
        if manifest is not None and not problems:
            return Source(folder, manifest, skipped)
        skipped.append(describe_skipped(folder, problems))
    if skipped:
        raise CheckpointError(
            f"none of the {len(skipped)} checkpoints in {checkpoints_of(run_dir)} can be used:\n  "
            + "\n  ".join(skipped)
            + "\nrestore one from a copy, or start anew with another --run-dir"
        )
    return None


def take(runtime: Runtime, folder: Place) -> Source:
    """The checkpoint of that folder, looked at as `choose` does. A collective call. Raises CheckpointError."""
    manifest, problems = _examine(runtime, folder)
    if manifest is None or problems:
        raise CheckpointError(f"{describe_skipped(folder, problems)}; restore it from a copy")
    return Source(folder, manifest, [])


def _examine(runtime: Runtime, folder: Place) -> tuple[Manifest | None, list[str]]:
    """The manifest of a checkpoint, and everything that any rank finds wrong with it.

    A collective call: rank k reads every world_size-th file. The list is the same on every rank; the manifest is None
    only where the list is not empty.
    """
    manifest, mine, other_format = None, [], None
    try:
        manifest = Manifest.read(folder)
        names = sorted(manifest.files)[runtime.rank :: runtime.world_size]
        mine = [problem for name in names for problem in check_size(folder, name, manifest)]
    except OtherFormatError as error:
        other_format = str(error)
    except CheckpointError as error:
        mine = [str(error)]
    reports = runtime.gather_json({"problems": mine, "other_format": other_format})
    if refusal := next((report["other_format"] for report in reports if report["other_format"]), None):
        raise OtherFormatError(refusal)
    problems = list(dict.fromkeys(problem for report in reports for problem in report["problems"]))
    if not problems:  # only now can headers be trusted
        assert manifest is not None
        problems = runtime.from_rank_0(check_completeness(folder, manifest) if runtime.rank == 0 else None)
    return manifest, problems


@dataclass(frozen=True)
class _SavedPiece:
    """Elements `start` to `stop` of a saved state: where they are."""

    start: int
    stop: int
    file: str
    first_byte: int
    dtype: torch.dtype
    numbers: str  # the name of that type in safetensors


@dataclass(frozen=True)
class Wanted:
    """Elements of a saved state from `offset` on, as many as `view` (1-D) has, and where they shall go."""

    view: Tensor
    parameter: str
    state: str
    offset: int


class Pieces:
    """All saved pieces of a checkpoint by parameter and state: of a range, the blocks that hold it and no others.

    What is handed out was compared with the digests of its blocks, and weights and states that are trained are finite:
    otherwise DamagedError is raised, whoever verified the checkpoint before.
    """

    def __init__(self, folder: Place, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._trained = {name for name, about in manifest.parameters.items() if len(about["states"]) > 1}
        self._where: dict[tuple[str, str], list[_SavedPiece]] = defaultdict(list)
        self._files = BlockReader(folder, block_digests(folder, manifest))
        headers = checked_headers(folder, manifest)
        for name, (head_bytes, header) in sorted(headers.items()):
            for key, about in header.items():
                parameter, state, offset = parse_fragment_key(key)
                start, dtype = int(offset), TORCH_DTYPES[about["dtype"]]
                stop, first_byte = start + about["shape"][0], head_bytes + about["data_offsets"][0]
                self._where[parameter, state].append(_SavedPiece(start, stop, name, first_byte, dtype, about["dtype"]))

    def read_into(self, view: Tensor, parameter: str, state: str, offset: int) -> None:
        """Copy elements `offset` and following of a saved state into a 1-D view, as many as it has.

        Raises:
            CheckpointError: the checkpoint does not hold all of them.
        """
        self.read([Wanted(view, parameter, state, offset)])

    def read(self, wanted: Iterable[Wanted]) -> None:
        """Copy all that is wanted, in the order in which it lies in the files.

        Raises:
            CheckpointError: the checkpoint does not hold all of it.
            DamagedError: a block of it is not what was written, or a number is not finite.
            OSError: it cannot be read.
        """
        reads = [(one, *read) for one in wanted for read in self._reads(one)]
        reads.sort(key=lambda read: (read[1].file, read[2]))
        self._files.plan((piece.file, first, first + _bytes_of(piece, view)) for _, piece, first, view in reads)
        for one, piece, first, view in reads:
            direct = view.device.type == "cpu" and view.dtype == piece.dtype and view.is_contiguous()
            target = view if direct else torch.empty(view.numel(), dtype=piece.dtype)
            raw = memoryview(target.detach().view(torch.uint8).numpy())  # type: ignore[arg-type]
            try:
                self._files.read_into(piece.file, first, raw)
            except DamagedBlockError as error:
                raise DamagedError(str(error)) from None
            if one.parameter in self._trained and (count := count_not_finite(raw, piece.numbers)):
                where = f"{self.folder / piece.file}: {count:,} values of {one.parameter} {one.state}"
                raise DamagedError(f"{where} are not finite")
            if not direct:
                view.copy_(target)

    def _reads(self, one: Wanted) -> Iterator[tuple[_SavedPiece, int, Tensor]]:
        """(piece, first byte in its file, part of the view) of what overlaps."""
        wanted, found = (one.offset, one.offset + one.view.numel()), 0
        for piece in self._where.get((one.parameter, one.state), []):
            first, last = overlap(wanted, (piece.start, piece.stop))
            if first < last:
                at = piece.first_byte + (first - piece.start) * piece.dtype.itemsize
                yield piece, at, one.view[first - one.offset : last - one.offset]
                found += last - first
        if found != one.view.numel():
            raise CheckpointError(
                f"{self.folder / MANIFEST}: {one.parameter} {one.state} has {found} of the {one.view.numel()} elements "
                f"wanted from {one.offset} on; the checkpoint is of another model"
            )


def _bytes_of(piece: _SavedPiece, view: Tensor) -> int:
    return view.numel() * piece.dtype.itemsize


def load(runtime: Runtime, source: Source, fragments: Sequence[Fragment]) -> None:
    """Fill the ranks' fragments from a checkpoint saved under any ZeRO stage and number of ranks. A collective call.

    Weights come first: a thread reads the optimizer states while they take effect, and are gathered by all ranks.
    Call `require_same_parameters` before, which every rank decides alike.

    Raises:
        DamagedError: what some rank read of it is not what was written. Raised on all ranks.
    """
    pieces = Pieces(source.folder, source.manifest)
    _agreed(runtime, source, lambda: _read(pieces, fragments, weights=True))
    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(_read, pieces, fragments, weights=False)
        sync_model_weights(runtime, source.manifest.optimizer_steps)
        _agreed(runtime, source, reading.result)


@torch.no_grad()
def _read(pieces: Pieces, fragments: Sequence[Fragment], *, weights: bool) -> None:
    """The weights of this rank's fragments, or else their optimizer states."""
    pieces.read(
        Wanted(fragment.states[state], fragment.parameter, state, fragment.offset)
        for fragment in fragments
        for state in fragment.states
        if (state == WEIGHT) == weights
    )


def _agreed(runtime: Runtime, source: Source, action: Callable[[], None]) -> None:
    """Do it on every rank, and go on only if none found damage. A collective call."""
    problem = None
    try:
        action()
    except DamagedError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{source.folder}: {error.strerror or error}"
    problem = next(filter(None, runtime.gather_json(problem)), None)
    if problem is not None:
        raise DamagedError(problem)


def require_same_parameters(folder: Place, saved: dict[str, dict[str, Any]], wanted: dict[str, dict[str, Any]]) -> None:
    """Refuse a checkpoint of another model, naming the first difference.

    Args:
        folder: the checkpoint.
        saved: name → {"shape", "states"} of its parameters, from the manifest.
        wanted: the same of the model. States that the checkpoint has beyond these are not read.
    """
    remedy = "use the recipe of that run or another --run-dir"
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(name), wanted.get(name)
        if there is None or here is None or there["shape"] != here["shape"]:
            raise CheckpointError(
                f"{folder} is of another model: {name} has {_shape(there)} there and {_shape(here)} here; {remedy}"
            )
        if missing := sorted(set(here["states"]) - set(there["states"])):
            raise CheckpointError(
                f"{folder}: {name} was frozen there and is trained here ({', '.join(missing)} missing); {remedy}"
            )


# What a model computes with its parameters, where their shapes do not show it.
_COMPUTATION_KEYS = (
    "model_type",
    "num_attention_heads",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "dense_act_fn",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_eps",
    "position_embedding_type",
    "global_attn_every_n_layers",
    "local_attention",
    "pad_token_id",
)


def require_same_computation(folder: Place, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a checkpoint of a model with the same parameters that computes something else with them.

    The recipe says so only where it has the model's config; a pretrained one may lie elsewhere by now, or be another.

    Args:
        folder: the checkpoint.
        saved: Transformers' config of its model, from the manifest.
        wanted: the same of the model.
    """
    for key in _COMPUTATION_KEYS:
        if key in saved and key in wanted and saved[key] != wanted[key]:
            raise CheckpointError(
                f"{folder} is of another model: {key} is {saved[key]!r} there and {wanted[key]!r} here; use the recipe "
                f"of that run or another --run-dir"
            )


def _shape(about: dict[str, Any] | None) -> str:
    return "no place" if about is None else f"shape {about['shape']}"
