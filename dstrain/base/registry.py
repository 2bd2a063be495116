"""Named things that a package brings, one file each: this one's own, and those of other installed packages.

    ARCHITECTURES: Registry[Architecture] = Registry("architecture", Architecture, "dstrain.architectures")

reads `dstrain/architectures/bert.py`, which says `ARCHITECTURE = Bert()`, as "bert", and an entry point of group
`dstrain.architectures` by its name. Names are known without an import; a file is imported when its thing is asked for.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from dstrain.errors import UserError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Things of one kind by name, in alphabetical order. Those of this package cannot be replaced from outside.

    Args:
        kind: what one of them is called, as in "architecture"; its upper case is the name of the files' variable.
        protocol: the class whose instance, or subclass, each of them has to be.
        group: the group of entry points.
        package: the package whose files are the things; that of the group by default. Files whose name begins with an
            underscore are not among them.
        separator: what a name has where its file has an underscore.
    """

    def __init__(
        self, kind: str, protocol: type, group: str, package: str | None = None, *, separator: str = "-"
    ) -> None:
        self.kind, self.protocol, self.group, self.separator = kind, protocol, group, separator
        self.package = package or group
        self._loaded: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._files, *self._entry_points}))

    def __len__(self) -> int:
        return len({*self._files, *self._entry_points})

    def __getitem__(self, name: str) -> T:
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def named(self, name: str, place: str) -> T:
        """The thing of this name.

        Args:
            name: what the user wrote.
            place: where, for the message: a key of the recipe, an option.

        Raises:
            UserError: there is none, or another package's cannot be imported or is something else.
        """
        if name not in self:
            raise UserError(
                f"{place}={name} is not one of {', '.join(self)}; use one of them, or install the package that brings "
                f"this {self.kind} (entry point group {self.group})"
            )
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self._files or name in self._entry_points

    @cached_property
    def _files(self) -> dict[str, str]:
        """Modules by name. `encoder_decoder.py` is "encoder-decoder"."""
        package = importlib.import_module(self.package)
        modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
        return {
            name.replace("_", self.separator): f"{self.package}.{name}" for name in modules if not name.startswith("_")
        }

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _load(self, name: str) -> T:
        if name in self._files:
            thing: T = getattr(importlib.import_module(self._files[name]), self.kind.upper())
            return thing
        if name not in self._entry_points:
            raise KeyError(name)
        point = self._entry_points[name]
        brought = point.dist.name if point.dist else "an installed package"
        remedy = f"mend or uninstall {brought}, which registers it as {point.value}"
        try:
            thing = point.load()
        except Exception as error:
            raise UserError(f"{self.kind} {name} cannot be imported: {error!r}; {remedy}") from error
        is_class = isinstance(thing, type) and issubclass(thing, self.protocol)
        if not is_class and not isinstance(thing, self.protocol):
            protocol = f"{self.protocol.__module__}.{self.protocol.__qualname__}"
            raise UserError(f"{self.kind} {name} is not a {protocol}; {remedy}")
        return thing
