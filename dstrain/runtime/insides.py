"""What this package uses inside of other libraries beyond what they document: found out at start-up, or one error.

A library may rename any of it in any release. Every name is therefore asked for through `inside`, and `require_insides`
and `dstrain.runtime.deepspeed_state.require_layout` ask for all of them before the first step: a new release says at
once what it lacks, where it would otherwise fail at the first save, or train something else without a word.
"""

import importlib
import inspect
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from dstrain.errors import UserError

# The oldest and the newest release that the tests trained, saved and loaded with, and those between them that they
# tried. pyproject.toml admits what lies between the ends, and later ones of the newest's series. With torch 2.13,
# DeepSpeed 0.18.9 fails under ZeRO where it gathers weights, and 0.18.0 and 0.17.6 step otherwise under ZeRO 2 than
# under 1 and 3, without a word.
TRIED_VERSIONS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("0.19.0", "0.19.8"),
    "accelerate": ("1.15.0",),
    "transformers": ("5.23.0",),
    "torch": ("2.13.0",),
}

# library, where it is ("module:attribute.attribute"), what it is used for
_INSIDES = (
    ("deepspeed", "deepspeed.ops:__compatible_ops__", "keeping an operator for inference from being compiled"),
    ("deepspeed", "deepspeed.runtime.engine:DeepSpeedEngine.set_train_batch_size", "the batch of a phase"),
    ("deepspeed", "deepspeed.runtime.engine:DeepSpeedEngine.set_train_micro_batch_size", "the batch of a phase"),
    ("deepspeed", "deepspeed.runtime.engine:DeepSpeedEngine.set_gradient_accumulation_boundary", "accumulation"),
    ("deepspeed", "deepspeed.runtime.engine:DeepSpeedEngine.was_step_applied", "steps that were not applied"),
    ("deepspeed", "deepspeed.runtime.engine:DeepSpeedEngine.get_global_grad_norm", "the gradient norm"),
    ("deepspeed", "deepspeed.runtime.utils:CheckOverflow._has_inf_or_nan", "a faster check of gradients"),
    ("deepspeed", "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.update_lp_params", "loading weights"),
    (
        "deepspeed",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._partition_all_parameters",
        "loading weights",
    ),
    ("transformers", "transformers.integrations.deepspeed:unset_hf_deepspeed_config", "building models whole"),
    ("torch", "torch:_softmax_backward_data", "the backward pass of attention on CPUs"),
)


class LibraryError(UserError):
    """An installed library lacks what this package uses inside of it, or keeps it otherwise."""


def inside(owner: object, name: str, use: str, library: str = "deepspeed") -> Any:
    """An attribute that a library does not document.

    Args:
        owner: the library's object that should have it.
        name: of the attribute.
        use: what for, for the message.
        library: whose it is, as its package is called.

    Raises:
        LibraryError: there is none.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = owner.__name__ if isinstance(owner, type | ModuleType) else type(owner).__name__
        raise library_error(library, f"has no {kind}.{name}", use) from None


def library_error(library: str, problem: str, use: str) -> LibraryError:
    """The one error: what, in which library and version, and which versions have been tried."""
    tried = TRIED_VERSIONS[library]
    span = tried[0] if len(tried) == 1 else f"{tried[0]} to {tried[-1]}"
    return LibraryError(
        f"{library} {_version(library)} {problem}, which is used for {use}; tried with {library} {span}: "
        f"`pip install '{library}=={tried[-1]}'`"
    )


def require_insides() -> None:
    """Ask for everything that can be asked for before there is a model.

    Raises:
        LibraryError: a library lacks something.
    """
    for library, where, use in _INSIDES:
        module, _, path = where.partition(":")
        try:
            owner: object = importlib.import_module(module)
        except ImportError as error:
            raise library_error(library, f"has no module {module} ({error})", use) from error
        for name in path.split("."):
            owner = inside(owner, name, use, library)
    _require_parameters("deepspeed.runtime.engine", "DeepSpeedEngine.backward", {"scale_wrt_gas"}, "accumulation")
    _require_parameters("deepspeed.runtime.utils", "CheckOverflow._has_inf_or_nan", {"x", "i"}, "checking gradients")


def _require_parameters(module: str, path: str, wanted: set[str], use: str) -> None:
    owner: Any = importlib.import_module(module)
    for name in path.split("."):
        owner = inside(owner, name, use)
    parameters = inspect.signature(owner).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return  # a decorator hides them
    if missing := wanted - parameters.keys():
        raise library_error("deepspeed", f"has no parameter {', '.join(sorted(missing))} of {path}", use)


def require_file(library: ModuleType, path: str, use: str) -> None:
    """Ask for a module of a library without importing it.

    Raises:
        LibraryError: there is none.
    """
    assert library.__file__ is not None
    if not (Path(library.__file__).parent / path).is_file():
        raise library_error(library.__name__, f"has no file {path}", use)


def _version(library: str) -> str:
    try:
        module_version = getattr(importlib.import_module(library), "__version__", None)  # as it is imported
        return str(module_version or version(library))
    except (ImportError, PackageNotFoundError):
        return "of unknown version"
