"""What a registry makes of an installed package."""

import pytest
from extension_package import InstallExtension

LOOK_UP = """\
from dstrain.base.registry import Registry
registry = Registry("thing", {protocol}, "dstrain.things", "dstrain.base")
try:
    print(registry.named("{name}", "task.thing"))
except ValueError as error:
    print(f"refused: {{error}}")
"""


@pytest.mark.slow
def test_an_installed_package_adds_something_and_a_broken_one_is_named(install_extension: InstallExtension) -> None:
    extension = install_extension(
        {"my_things": "THING = 'a thing'\n", "my_broken_thing": "import no_such_module\n"},
        {"dstrain.things": {"mine": "my_things:THING", "broken": "my_broken_thing:THING"}},
    )

    def looked_up(name: str, protocol: str = "str") -> str:
        result = extension.python("-c", LOOK_UP.format(name=name, protocol=protocol))
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert looked_up("mine") == "a thing\n"
    assert "thing mine is not a builtins.int; mend or uninstall dstrain-extension" in looked_up("mine", "int")
    assert "refused: thing broken cannot be imported: ModuleNotFoundError(\"No module named 'no_such_module'\")" in (
        looked_up("broken")
    )
    assert "refused: task.thing=other is not one of " in looked_up("other")
