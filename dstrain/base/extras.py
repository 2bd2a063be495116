"""Which packages are needed only by some of what dstrain does, and what is said where they are not installed.

`pip install dstrain` brings what pretraining needs. Everything else imports its packages where it uses them. Where one
is absent, that import is the error of a user who lacks an extra (`explained`); and what takes long asks for its extra
before it starts (`require`).
"""

from collections.abc import Mapping
from importlib.util import find_spec

from dstrain.errors import UserError

EXTRAS: Mapping[str, tuple[str, ...]] = {  # as in pyproject.toml; names to import
    "tasks": ("sklearn", "scipy", "seqeval", "sacrebleu", "rouge_score"),
    "lora": ("peft",),
    "report": ("matplotlib", "jinja2"),
    "sweep": ("optuna",),
    "serve": ("fastapi", "fastapi_offline", "uvicorn", "uvloop", "httptools", "prometheus_client"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "s3": ("s3fs",),
    "faiss": ("faiss",),
}


class MissingExtraError(UserError):
    """Packages are not installed that an extra of dstrain's brings."""

    def __init__(self, extra: str, use: str, absent: str) -> None:
        super().__init__(f"{use} needs the package {absent}, which is not here; run: pip install 'dstrain[{extra}]'")


def require(extra: str, use: str) -> None:
    """Refuse what cannot work, without importing anything.

    Args:
        extra: one of EXTRAS.
        use: what it is needed for, as in "model.lora".

    Raises:
        MissingExtraError: a package of it is not installed.
    """
    for module in EXTRAS[extra]:
        if find_spec(module) is None:
            raise MissingExtraError(extra, use, module)


def explained(error: ModuleNotFoundError) -> MissingExtraError | None:
    """What a failed import means to the user; None where it is of no extra, so that it is a fault of ours."""
    absent = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if absent in modules), None)
    return None if extra is None else MissingExtraError(extra, "this", absent)
