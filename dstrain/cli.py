"""The command line. It imports no more than argparse; the module that does a command's work is imported to run it."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from dstrain.errors import DISK_FULL, EXIT_FAILURE, EXIT_USER_ERROR, UserError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the user's input is wrong, 75 restart me, else a failure."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        module, _, function = args.handler.partition(":")
        code: int = getattr(importlib.import_module(module), function)(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"error: {line}", file=sys.stderr)
        return EXIT_USER_ERROR
    except ModuleNotFoundError as error:
        from dstrain.base.extras import explained

        if (missing := explained(error)) is None:
            raise
        print(f"error: dstrain {args.command}: {missing}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, is gone
        _forget_output()
        return EXIT_FAILURE
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _forget_output()
        where = error.filename or "what the command writes, such as its redirected output"
        print(f"error: {where}: {error.strerror}; make room there, and run the command again", file=sys.stderr)
        return EXIT_USER_ERROR
    except SystemExit as stop:  # argparse: --help, or arguments that it cannot read
        return stop.code if isinstance(stop.code, int) else EXIT_FAILURE


def _forget_output() -> None:
    """Let the interpreter's end not fail once more on what cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse arguments. `key=value` overrides may stand before, between and after options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}; `dstrain {args.command} --help` lists what there is")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


# ---------------------------------------------------------------- the commands and their arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dstrain",
        description="Large-scale encoder pretraining that comes back exactly after anything that interrupts it.",
        epilog="Exit codes: 0 done; 2 the input is wrong; 75 stopped at a checkpoint, restart me; else a failure.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _run(commands)
    _running(commands)
    _doctor(commands)
    _plan(commands)
    _recipe(commands)
    _corpus(commands)
    _tokenizer(commands)
    _shards(commands)
    _ckpt(commands)
    _report(commands)
    _ledger(commands)
    _find(commands)
    _rows(commands)
    _replay(commands)
    _verify_resume(commands)
    _drill(commands)
    _eval(commands)
    _predict(commands)
    _threshold(commands)
    _monitor(commands)
    _searching(commands)
    _export(commands)
    _serve(commands)
    _sweep(commands)
    return parser


_Commands = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


def _add(commands: "_Commands[argparse.ArgumentParser]", name: str, handler: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(handler=handler)
    return command


def _group(
    commands: "_Commands[argparse.ArgumentParser]", name: str, text: str
) -> "_Commands[argparse.ArgumentParser]":
    group = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    return group.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _recipe_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a value, as in train.zero.stage=2")


def _run(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = _add(
        commands, "run", "dstrain.supervise.run:run_command", "train a recipe; goes on where its run folder is"
    )
    _recipe_arguments(command)
    command.add_argument("--on", metavar="PROFILE", help="where: a launch profile (default: this machine, as it is)")
    command.add_argument("--nodes", metavar="N", help="4, or 2-4 for as many as there are (default: the profile's)")
    command.add_argument("--procs-per-node", type=int, metavar="N", help="ranks (default: one for each device, or one)")
    command.add_argument("--run-dir", metavar="DIR", help="the run's folder (default: runs/<name of the recipe>)")
    command.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="restarts after failures (default: %(default)s)"
    )
    command.add_argument(
        "--allow", choices=["data-change"], help="go on with other data than the checkpoint's; it is recorded"
    )
    command.add_argument("--chain", type=int, metavar="N", help="SLURM: N jobs one after another, none requeues")
    command.add_argument(
        "--pdb", type=int, metavar="RANK", help="debug profile: a debugger in this rank, on an exception"
    )
    command.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    command.add_argument("--entry", help=argparse.SUPPRESS)  # what each rank calls, see dstrain.rank; for drills


def _running(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "show what a run does: nodes, ranks, phases, step, checkpoint, stragglers, the last verdict"
    status = _add(commands, "status", "dstrain.observe.status_command:status_command", text)
    status.add_argument("run", metavar="RUN", help="a run's folder")
    status.add_argument("--watch", action="store_true", help="again every two seconds, until the run has ended")
    _json(status)
    logs = _add(commands, "logs", "dstrain.observe.logs:logs_command", "print what the ranks of a run printed")
    logs.add_argument("run", metavar="RUN", help="a run's folder")
    logs.add_argument("--rank", type=int, metavar="K", help="of this rank only (default: all, and the agents)")
    logs.add_argument("--attempt", type=int, metavar="N", help="of this attempt (default: the newest)")
    logs.add_argument("--follow", action="store_true", help="and what comes, over restarts, until the run has ended")
    logs.add_argument("--errors", action="store_true", help="only errors, warnings and stacks")
    stop = _add(commands, "stop", "dstrain.observe.stop:stop_command", "have a run save a checkpoint and end")
    stop.add_argument("run", metavar="RUN", help="a run's folder")


def _doctor(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "say whether it is safe to start: nodes, versions, disks, limits, network, speeds; exit code 2 if it is not"
    command = _add(commands, "doctor", "dstrain.doctor.command:doctor_command", text)
    command.add_argument("recipe", metavar="RECIPE", nargs="?", help="a YAML file (default: check the nodes alone)")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a value of the recipe")
    command.add_argument("--on", metavar="PROFILE", help="where: a launch profile (default: this machine, as it is)")
    command.add_argument("--nodes", metavar="N", help="4, or 2-4 (default: the profile's)")
    command.add_argument("--procs-per-node", type=int, metavar="N", help="ranks (default: as `dstrain run` has it)")
    command.add_argument("--run-dir", metavar="DIR", help="the run's folder (default: runs/<name of the recipe>)")
    command.add_argument("--quick", action="store_true", help="measure nothing: what is checked before every start")
    _json(command)


def _plan(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "print what a recipe will take: batch, steps, FLOPs, memory, disk, DeepSpeed's config"
    command = _add(commands, "plan", "dstrain.plan.text:plan_command", text)
    _recipe_arguments(command)
    command.add_argument("--world", type=int, default=1, metavar="W", help="number of ranks (default: %(default)s)")
    _json(command)


def _recipe(commands: "_Commands[argparse.ArgumentParser]") -> None:
    group = _group(commands, "recipe", "look at recipes")
    show = _add(group, "show", "dstrain.recipe.commands:show_command", "print every value and where it came from")
    _recipe_arguments(show)
    _json(show)
    _add(group, "schema", "dstrain.recipe.commands:schema_command", "print the JSON Schema of recipes, for editors")


def _corpus(commands: "_Commands[argparse.ArgumentParser]") -> None:
    group = _group(commands, "corpus", "make a corpus")
    text = "harvest the docstrings of the installed packages: real English, without a network"
    command = _add(group, "docstrings", "dstrain.corpus.docstrings:docstrings_command", text)
    command.add_argument("--out", required=True, metavar="DIR", help="folder for docstrings.jsonl and labels/")
    command.add_argument("--max-mb", type=float, metavar="N", help="stop at this many megabytes of text (default: all)")
    _json(command)


def _tokenizer(commands: "_Commands[argparse.ArgumentParser]") -> None:
    group = _group(commands, "tokenizer", "make a tokenizer")
    command = _add(group, "train", "dstrain.corpus.train_tokenizer:train_command", "train a tokenizer on a corpus")
    command.add_argument("sources", metavar="SRC", nargs="+", help="JSONL, text files or text shards, or folders")
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the tokenizer")
    command.add_argument(
        "--field", default="text", metavar="KEY[,KEY]", help="the texts' key in JSON, or several (default: %(default)s)"
    )
    command.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="tokens (default: %(default)s)")
    command.add_argument("--kind", default="wordpiece", metavar="KIND", help="wordpiece, as BERT has it (the default)")
    command.add_argument(
        "--lowercase", action=argparse.BooleanOptionalAction, default=True, help="make text lower case (the default)"
    )


def _shards(commands: "_Commands[argparse.ArgumentParser]") -> None:
    group = _group(commands, "shards", "make and check WebDataset shards")
    build = _add(group, "build", "dstrain.data.commands:build_command", "write shards and their index")
    build.add_argument("sources", metavar="SRC", nargs="+", help="JSONL (or .gz) or text files, or folders of shards")
    build.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    build.add_argument(
        "--tokenizer", metavar="DIR", help="write token shards with this tokenizer (default: text shards)"
    )
    _field(build)
    build.add_argument("--shard-mb", type=float, default=64, metavar="N", help="size of a shard (default: %(default)s)")
    build.add_argument(
        "--docs-per-block",
        type=int,
        default=4096,
        metavar="N",
        help="documents per sample of token shards (default: %(default)s)",
    )
    build.add_argument(
        "--valid-fraction", type=float, default=0.0, metavar="F", help="share of documents for OUT/valid"
    )
    build.add_argument(
        "--seed", type=int, default=0, metavar="N", help="decides which documents (default: %(default)s)"
    )
    index = _add(group, "index", "dstrain.data.commands:index_command", "index shards that other programs wrote")
    index.add_argument("path", metavar="PATH", help="a folder of shards")
    _field(index)
    index.add_argument("--tokenizer", metavar="DIR", help="what made token shards, or is to count the tokens of texts")
    check = _add(group, "check", "dstrain.data.commands:check_command", "read every sample, verify every digest")
    check.add_argument("path", metavar="PATH", help="a folder of shards")
    _field(check)
    _json(check)
    cat = _add(group, "cat", "dstrain.data.commands:cat_command", "print documents")
    cat.add_argument("path", metavar="PATH", help="a folder of shards, or a shard")
    cat.add_argument("-n", "--n", type=int, default=3, metavar="N", help="documents (default: %(default)s)")
    cat.add_argument("--tokenizer", metavar="DIR", help="turns the ids of token shards into text")
    _field(cat)
    _json(cat)


def _field(command: argparse.ArgumentParser) -> None:
    command.add_argument("--field", default="text", metavar="KEY", help="the text's key in JSON (default: %(default)s)")


def _ckpt(commands: "_Commands[argparse.ArgumentParser]") -> None:
    group = _group(commands, "ckpt", "look at checkpoints")
    ls = _add(group, "ls", "dstrain.convert.commands:ls_command", "list a run's checkpoints")
    ls.add_argument("path", metavar="RUN", help="a run's folder")
    _json(ls)
    verify = _add(
        group,
        "verify",
        "dstrain.convert.commands:verify_command",
        "read every byte: digests, finite values, no gaps, coherence",
    )
    verify.add_argument("path", metavar="RUN|CKPT", help="a run's folder, or one checkpoint")
    _json(verify)
    text = "compare two checkpoints by parameter, whatever their topologies; exit code 1 if they differ"
    diff = _add(group, "diff", "dstrain.convert.commands:diff_command", text)
    diff.add_argument("first", metavar="A", help="a checkpoint, or a run's folder for its newest")
    diff.add_argument("second", metavar="B", help="the one to compare with")
    _json(diff)
    export = _add(group, "export", "dstrain.convert.commands:export_command", "write a Transformers folder")
    export.add_argument("path", metavar="RUN|CKPT", help="a run's folder, or one checkpoint")
    export.add_argument("--out", metavar="DIR", help="the Transformers folder to write (default: RUN/export)")
    export.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")
    text = "make the first checkpoint of a run from one of DeepSpeed (ZeRO 1-3, universal) or accelerate save_state"
    command = _add(group, "import", "dstrain.convert.import_command:import_command", text)
    command.add_argument("source", metavar="SOURCE", help="the folder of the checkpoint")
    command.add_argument("run", metavar="RUN", help="the folder of the run to begin; `dstrain run --run-dir` goes on")
    command.add_argument("--recipe", required=True, metavar="RECIPE", help="the recipe that the run goes on with")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a value of the recipe")
    command.add_argument(
        "--rows", type=int, default=0, metavar="N", help="go on with this row of the data (default: %(default)s)"
    )
    command.add_argument("--step", type=int, metavar="N", help="the step it is of (default: what it says itself)")
    prune = _add(
        group, "prune", "dstrain.convert.commands:prune_command", "delete the checkpoints that need not be kept"
    )
    prune.add_argument("path", metavar="RUN", help="a run's folder")
    prune.add_argument(
        "--keep", type=int, metavar="N", help="keep the newest N (default: what the recipe's rules keep)"
    )
    prune.add_argument("--dry-run", action="store_true", help="say what would be kept, and why, and delete nothing")
    text = "let other runs into a store whose run was killed and will not come back"
    release = _add(group, "release", "dstrain.convert.commands:release_command", text)
    release.add_argument("path", metavar="STORE", help="its URL, as in checkpoint.storage")


def _report(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = _add(commands, "report", "dstrain.report.command:report_command", "sum up runs from their metrics")
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder; several are shown side by side")
    command.add_argument("--html", metavar="FILE", help="write a page with curves, intervals and worst examples too")
    command.add_argument("--md", metavar="FILE", help="write the same as Markdown, without pictures")
    _json(command)


def _ledger(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "prove that each row was consumed exactly once, over all attempts; compare with another run"
    command = _add(commands, "ledger", "dstrain.proof.account:ledger_command", text)
    command.add_argument("run", metavar="RUN", help="a run's folder")
    command.add_argument("other", metavar="RUN2", nargs="?", help="the run to compare with")
    _json(command)


def _find(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = (
        "find every step and row of a run in which a document was trained on, or will be; exit code 1 if there is none"
    )
    command = _add(commands, "find", "dstrain.proof.find_command:find_command", text)
    command.add_argument("run", metavar="RUN", help="a run's folder")
    text = "a document by its shard and its key, and its number where a sample holds several"
    command.add_argument("document", metavar="SHARD:KEY[:NUMBER]", nargs="?", help=text)
    command.add_argument("--text-file", metavar="FILE", help="a document by its text")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="as in data.train=where/it/is/now")
    _json(command)


def _rows(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "show the rows of some steps as the model sees them: documents, masks, token ids; without a model"
    command = _add(commands, "rows", "dstrain.proof.rows_command:rows_command", text)
    command.add_argument("source", metavar="RECIPE|RUN", help="a YAML file, or a run's folder")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a value, as in data.seed=2")
    command.add_argument("--steps", metavar="A-B", help="which steps, from 1 (default: that of --row)")
    command.add_argument("--row", type=int, metavar="K", help="only the row with this number (default: all)")
    command.add_argument("--decode", action="store_true", help="tokens as text, in JSON beside the ids")
    _json(command)


def _replay(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "compute a step again on one device: losses, gradients, documents, the first value that is not finite"
    command = _add(commands, "replay", "dstrain.proof.replay_command:replay_command", text)
    command.add_argument("run", metavar="RUN", help="a run's folder")
    command.add_argument("--step", type=int, required=True, metavar="N", help="the global step, from 1")
    command.add_argument("--rank", type=int, metavar="K", help="show this rank's documents and gradient (default: all)")
    command.add_argument("--world", type=int, metavar="W", help="of how many ranks it was (default: as logged)")
    command.add_argument("--trace", action="store_true", help="find the first module with a value that is not finite")
    command.add_argument(
        "--documents", type=int, default=8, metavar="N", help="how many documents to show (default: %(default)s)"
    )
    _json(command)


def _verify_resume(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "train a few steps of a recipe whole, killed, and moved to other ranks; compare; exit code 1 if they differ"
    command = _add(commands, "verify-resume", "dstrain.proof.verify_resume:verify_resume_command", text)
    _recipe_arguments(command)
    command.add_argument("--steps", type=int, default=16, metavar="N", help="how many (default: %(default)s)")
    command.add_argument(
        "--stop-at", type=int, default=5, metavar="K", help="interrupt after this step (default: %(default)s)"
    )
    command.add_argument("--world", type=int, metavar="W", help="number of ranks (default: 2, if there are lanes)")
    text = "resume on as many, and then on others (default: 3,1, as far as there are lanes)"
    command.add_argument("--then-world", metavar="V[,U…]", help=text)
    command.add_argument(
        "--then-stage", type=int, choices=range(4), metavar="S", help="resume under this ZeRO stage (default: another)"
    )
    command.add_argument("--dir", metavar="DIR", help="keep the run folders here (default: none are kept)")
    _json(command)


def _drill(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "inject faults into a run of a recipe, one after another; exit code 1 if one is not survived as expected"
    command = _add(commands, "drill", "dstrain.proof.drill:drill_command", text)
    _recipe_arguments(command)
    command.add_argument("--faults", metavar="A,B,…", help="which, in this order (default: all)")
    command.add_argument("--steps", type=int, metavar="N", help="length of the run (default: 16 for each fault)")
    command.add_argument("--save-every", type=int, default=4, metavar="N", help="steps (default: %(default)s)")
    command.add_argument("--world", type=int, metavar="W", help="number of ranks (default: 2, if there are lanes)")
    command.add_argument("--dir", metavar="DIR", help="keep the run folders here (default: none are kept)")
    _json(command)


def _eval(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "evaluate a checkpoint on its recipe's held-out data, or on other data"
    command = _add(commands, "eval", "dstrain.train.evaluate:eval_command", text)
    command.add_argument("path", metavar="RUN|CKPT", help="a run's folder, or one checkpoint")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="as in data.valid=other.csv")
    command.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: best, or newest)")
    command.add_argument("--split", choices=("valid", "test"), default="valid", help="(default: %(default)s)")
    _json(command)


def _predict(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = _add(commands, "predict", "dstrain.predict.command:predict_command", "apply a trained model to texts")
    command.add_argument("model", metavar="MODEL", help="an exported model's folder, or a run's")
    command.add_argument("file", metavar="FILE", help="texts: lines, JSONL or CSV; - reads lines from standard input")
    command.add_argument("--text-field", metavar="KEY", help="column or key of the text (default: the recipe's)")
    command.add_argument("--batch-rows", type=int, default=32, metavar="N", help="rows at once (default: %(default)s)")


def _threshold(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "choose below which probability a classifier says that a text is none of its labels, and measure it"
    command = _add(commands, "threshold", "dstrain.predict.threshold:threshold_command", text)
    command.add_argument("model", metavar="MODEL", help="an exported model's folder, or a run's")
    text = "held-out texts with labels (default: those that the run held out)"
    command.add_argument("file", metavar="FILE", nargs="?", help=text)
    text = "texts with labels to measure it on; those whose label it was not taught are out of scope"
    command.add_argument("--test", metavar="FILE", help=text)
    command.add_argument(
        "--keep", type=float, default=0.95, metavar="SHARE", help="of texts in scope to keep (default: %(default)s)"
    )
    command.add_argument("--label-field", metavar="KEY", help="column or key of the label (default: the recipe's)")
    command.add_argument("--dry-run", action="store_true", help="only say it; do not write it beside the model")
    _json(command)


def _monitor(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "classify a stream of lines, and say when the negative ones surge: sliding windows by topic"
    command = _add(commands, "monitor", "dstrain.predict.monitor:monitor_command", text)
    command.add_argument("model", metavar="MODEL", help="an exported model's folder, or a run's")
    command.add_argument(
        "file", metavar="FILE", nargs="?", default="-", help="lines or JSONL (default: standard input)"
    )
    command.add_argument("--negative", metavar="LABEL", help="the label that counts (default: negative or neg)")
    command.add_argument("--topics", metavar="FILE", help="a topic a line, as in `delivery: late, courier`")
    command.add_argument("--replay", action="store_true", help="each line's `time` is the clock, not its arrival")
    command.add_argument("--window-minutes", type=float, default=60, metavar="N", help="(default: %(default)s)")
    text = "the time before the window, which says what is usual (default: %(default)s)"
    command.add_argument("--baseline-minutes", type=float, default=1440, metavar="N", help=text)
    text = "messages that window and baseline must have (default: %(default)s)"
    command.add_argument("--least", type=int, default=10, metavar="N", help=text)
    text = "an alert begins where chance alone is less likely than this (default: %(default)s)"
    command.add_argument("--begin", type=float, default=1e-4, metavar="P", help=text)
    command.add_argument("--end", type=float, default=0.05, metavar="P", help="and ends here (default: %(default)s)")
    command.add_argument("--text-field", metavar="KEY", help="key of the text (default: the recipe's)")
    command.add_argument("--batch-rows", type=int, default=32, metavar="N", help="rows at once (default: %(default)s)")
    _json(command)


def _searching(commands: "_Commands[argparse.ArgumentParser]") -> None:
    index = _add(
        commands, "index", "dstrain.predict.search_commands:index_command", "make vectors of documents, to search"
    )
    index.add_argument("model", metavar="MODEL", help="a bi-encoder: an exported model's folder, or a run's")
    index.add_argument("corpus", metavar="CORPUS", help="documents: JSONL, CSV, TSV or Parquet")
    index.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    index.add_argument("--id-field", default="id", metavar="KEY", help="of a document (default: %(default)s)")
    index.add_argument("--text-field", default="text", metavar="KEY", help="of a document (default: %(default)s)")
    index.add_argument("--title-field", metavar="KEY", help="stands before the text (default: none)")
    index.add_argument(
        "--faiss", nargs="?", const="Flat", metavar="KIND", help="a FAISS index too: Flat, HNSW32, … (default: none)"
    )
    index.add_argument("--batch-rows", type=int, default=64, metavar="N", help="rows at once (default: %(default)s)")
    search = _add(commands, "search", "dstrain.predict.search_commands:search_command", "find documents in an index")
    search.add_argument("index", metavar="INDEX", help="what `dstrain index` wrote")
    search.add_argument("file", metavar="FILE", help="queries: lines, JSONL or CSV; - reads lines from standard input")
    search.add_argument("--top", type=int, default=10, metavar="N", help="documents a query (default: %(default)s)")
    search.add_argument("--rerank", metavar="MODEL", help="a cross-encoder that puts the nearest ones in order")
    search.add_argument("--text-field", metavar="KEY", help="column or key of the query (default: query)")
    search.add_argument("--batch-rows", type=int, default=32, metavar="N", help="rows at once (default: %(default)s)")
    text = "write a training file again, with the documents that a bi-encoder takes for answers"
    mine = _add(commands, "mine", "dstrain.predict.search_commands:mine_command", text)
    _recipe_arguments(mine)
    mine.add_argument("--index", required=True, metavar="INDEX", help="what `dstrain index` wrote of the documents")
    mine.add_argument("--out", required=True, metavar="FILE", help="the JSONL file to write")
    mine.add_argument(
        "--split", choices=("train", "valid", "test"), default="train", help="whose queries (default: %(default)s)"
    )
    mine.add_argument("--top", type=int, default=50, metavar="N", help="candidates a query (default: %(default)s)")
    mine.add_argument("--batch-rows", type=int, default=64, metavar="N", help="rows at once (default: %(default)s)")


def _export(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "write a trained model as a Transformers folder, or as ONNX"
    command = _add(commands, "export", "dstrain.serve.export_command:export_command", text)
    command.add_argument("path", metavar="MODEL", help="a run's folder, a checkpoint, or an exported model's folder")
    command.add_argument("--out", metavar="DIR", help="the folder to write (default: RUN/export, or RUN/onnx)")
    command.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")
    command.add_argument("--onnx", action="store_true", help="one graph for onnxruntime, of an exported run or folder")
    command.add_argument("--int8", action="store_true", help="with --onnx: 8-bit weights; smaller, faster, less exact")
    command.add_argument("--measure", metavar="FILE", help="with --int8: inputs, as of predict, to measure the loss on")
    command.add_argument("--text-field", metavar="KEY", help="of FILE (default: the field of the run's data)")
    command.add_argument("--label-field", metavar="KEY", help="of FILE (default: the field of the run's data)")


def _serve(commands: "_Commands[argparse.ArgumentParser]") -> None:
    command = _add(commands, "serve", "dstrain.serve.server:serve_command", "serve a trained model over HTTP")
    command.add_argument("model", metavar="MODEL", help="an exported model's folder, or a run's")
    command.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen here (default: %(default)s)")
    command.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free one (default: %(default)s)")
    command.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: faster, less exact (default: %(default)s)"
    )
    command.add_argument("--token-file", metavar="FILE", help="requests must bear the token that is in it")
    command.add_argument("--batch-rows", type=int, default=32, metavar="N", help="of a batch (default: %(default)s)")
    command.add_argument(
        "--threads",
        type=int,
        default=2,
        metavar="N",
        help="batches computed at a time, each on its share of the cores (default: %(default)s)",
    )
    command.add_argument(
        "--queue-rows",
        type=int,
        default=512,
        metavar="N",
        help="texts that may wait; more get 429 (default: %(default)s)",
    )
    command.add_argument("--body-mb", type=float, default=1, metavar="N", help="largest body (default: %(default)s)")
    command.add_argument(
        "--timeout-seconds", type=float, default=30, metavar="N", help="answer within, or 504 (default: %(default)s)"
    )


def _sweep(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "search the recipe's `sweep:` section with Optuna, or repeat the recipe; goes on where its folder is"
    command = _add(commands, "sweep", "dstrain.sweep.command:sweep_command", text)
    _recipe_arguments(command)
    command.add_argument("--dir", metavar="DIR", help="the sweep's folder (default: runs/<name of the recipe>-sweep)")
    seeds = "search nothing: run the recipe with N seeds, and for each of data.folds; ends with mean and deviation"
    command.add_argument("--seeds", type=int, metavar="N", help=seeds)
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    command.add_argument("--on", metavar="PROFILE", help="a SLURM profile: --jobs are an array of as many, a node each")
    command.add_argument(
        "--procs-per-node", type=int, metavar="N", help="ranks of each run (default: as `dstrain run`)"
    )
    command.add_argument(
        "--max-restarts", type=int, default=1, metavar="N", help="of each run after failures (default: %(default)s)"
    )
    command.add_argument("--dry-run", action="store_true", help="with --on: print the batch script, submit nothing")
    command.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # one of many on a shared folder
    _json(command)
