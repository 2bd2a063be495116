"""`dstrain report RUN …`: on the terminal, as JSON, or as pages. Imports no torch."""

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from dstrain.errors import EXIT_DONE
from dstrain.report.runs import summarize_run
from dstrain.report.text import report_text


def report_command(args: Namespace) -> int:
    """`dstrain report RUN [RUN …] [--json] [--html FILE] [--md FILE]`."""
    if args.html or args.md:
        from dstrain.report.page import write_report

        html, markdown = (Path(file) if file else None for file in (args.html, args.md))
        write_report([Path(run) for run in args.runs], html, markdown)
    runs = [summarize_run(Path(run)) for run in args.runs]
    if args.json:
        print(json.dumps({"runs": [asdict(run) for run in runs]}, indent=2, ensure_ascii=False))
    else:
        print(report_text(runs))
    return EXIT_DONE
