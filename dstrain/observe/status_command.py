"""`dstrain status RUN`: read what a run does at this moment, and show it; with --watch again and again."""

import json
import sys
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from dstrain.errors import EXIT_DONE
from dstrain.observe.run_record import check_run_folder
from dstrain.observe.status import run_status
from dstrain.observe.status_page import page

REFRESH_SECONDS = 2.0
_HOME_AND_CLEAR = "\x1b[H\x1b[2J"


def status_command(args: Namespace) -> int:
    """`dstrain status RUN [--watch] [--json]`. Raises UserError: this is no run's folder."""
    run_dir = Path(args.run).expanduser()
    check_run_folder(run_dir)
    while True:
        status = run_status(run_dir, time.time())
        text = json.dumps(asdict(status)) if args.json else page(status)
        in_place = args.watch and not args.json and sys.stdout.isatty()
        print(f"{_HOME_AND_CLEAR}{text}" if in_place else text, flush=True)
        if args.watch and not args.json and not in_place:
            print()
        if not args.watch or status.state in ("ended", "lost"):
            return EXIT_DONE
        time.sleep(REFRESH_SECONDS)
