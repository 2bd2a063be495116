"""Files of JSON that hold one type of this package: read with every field checked, and one error where one is wrong."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from dstrain.base.json_reader import read_json
from dstrain.errors import UserError

Content = TypeVar("Content")


def read_typed(path: Path, content: TypeAdapter[Content]) -> Content | None:
    """What a file holds; None where there is no file.

    Raises:
        UserError: the file is damaged; names it, the key and what is wrong there. Or it cannot be read.
    """
    try:
        value = read_json(path, strict=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return content.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "its content"
        raise UserError(f"{path} is damaged: {key}: {first['msg']}; restore the file, or remove it") from None
