"""Packages that add something to dstrain, made and installed on the spot."""

from collections.abc import Mapping

import pytest
from extension_package import Extension, InstallExtension, install, write_package


@pytest.fixture(scope="session")
def install_extension(tmp_path_factory: pytest.TempPathFactory) -> InstallExtension:
    """`install_extension(files, entry_points)` installs a package into a folder of its own, and says how to see it.

    `files` are sources by module name; `entry_points` are {group: {name: "module:object"}}.
    """

    def make(files: Mapping[str, str], entry_points: Mapping[str, Mapping[str, str]]) -> Extension:
        project = tmp_path_factory.mktemp("projects") / "dstrain-extension"
        project.mkdir()
        write_package(project, files, entry_points)
        return install(project, tmp_path_factory.mktemp("installed"))

    return make
