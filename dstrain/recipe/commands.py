"""`dstrain recipe show` and `dstrain recipe schema`."""

import sys
from argparse import Namespace

from dstrain.errors import EXIT_DONE


def show_command(args: Namespace) -> int:
    """Print the resolved recipe and where each value came from."""
    from dstrain.recipe.files import missing_files
    from dstrain.recipe.load import load_recipe
    from dstrain.recipe.show import show_json, show_text

    loaded = load_recipe(args.recipe, args.overrides, check_files=False)
    for sentence in missing_files(loaded.recipe):
        print(f"warning: {sentence}", file=sys.stderr)
    print(show_json(loaded) if args.json else show_text(loaded))
    return EXIT_DONE


def schema_command(_args: Namespace) -> int:
    """Print the JSON Schema of recipes."""
    from dstrain.recipe.json_schema import schema_text

    print(schema_text(), end="")
    return EXIT_DONE
