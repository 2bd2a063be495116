#!/usr/bin/env python3
"""From nothing to a classifier: corpus, tokenizer, shards, a pretraining run that survives a killed rank, a classifier.

    python tools/quickstart.py [--fresh]        what `make quickstart` runs; 2 CPU cores, no network, a few minutes

Each stage shows the command that it runs, to be copied. All lands in build/quickstart. On a second call the corpus,
the tokenizer and the shards are used again (`--fresh` makes them anew); everything from pretraining on starts clean.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("build/quickstart")
CORPUS, TOKENIZER, SHARDS = ROOT / "corpus", ROOT / "tokenizer", ROOT / "shards"
PRETRAINING, RECOMPUTED = ROOT / "runs/pretraining", ROOT / "runs/recomputed"
EXPORT = ROOT / "export"
FINETUNED, SCRATCH = ROOT / "runs/docstring-package", ROOT / "runs/docstring-package-scratch"
SENTENCES = ROOT / "sentences.txt"

RANKS = 2
KILLED_RANK = 1
KILL_AFTER_STEP = 500  # between the checkpoints at 400 and 600, so that steps have to be done again

TEXTS = """\
Return the shortest path between two nodes of a weighted graph.
Compute the symbolic derivative of an expression and simplify it.
Fit the estimator to the training data and return self.
Group the rows of a frame by one column and take the mean of the others.
Reduce the tensors of all ranks in the process group and scatter the result.
Tokenize a batch of sentences and pad them to the longest one of the model inputs.
Integrate a function of one variable between two points by adaptive quadrature.
Open a connection to a server and return a pair of reader and writer.
"""


@dataclass(frozen=True)
class Stage:
    """One step of the story: why, and the command lines that do it. `makes`: what it leaves, to be used again."""

    title: str
    story: str
    commands: tuple[tuple[str, ...], ...]
    makes: Path | None = None


def dstrain(*arguments: str | Path) -> tuple[str, ...]:
    return ("dstrain", *map(str, arguments))


STAGES = (
    Stage(
        "A corpus",
        "Docstrings of the installed packages: real English, no network. And, from the same texts, labelled examples.",
        (dstrain("corpus", "docstrings", "--out", CORPUS),),
        CORPUS,
    ),
    Stage(
        "A tokenizer",
        "WordPiece, as BERT has it.",
        (dstrain("tokenizer", "train", CORPUS / "docstrings.jsonl", "--out", TOKENIZER, "--vocab-size", "8192"),),
        TOKENIZER,
    ),
    Stage(
        "Shards",
        "WebDataset tar files of token ids with an index; 2 % of the documents are held out.",
        (
            dstrain("shards", "build", CORPUS / "docstrings.jsonl", "--tokenizer", TOKENIZER, "--out", SHARDS,
                    "--valid-fraction", "0.02", "--shard-mb", "2"),
        ),
        SHARDS,
    ),
    Stage(
        "A plan",
        "What the recipe will take, by arithmetic alone.",
        (dstrain("plan", "recipes/pretrain/quickstart.yaml", "--world", str(RANKS)),),
    ),
    Stage(
        "Pretraining, and a killed rank",
        f"Masked-language modelling on {RANKS} ranks: ZeRO-2, bf16, activation checkpointing. Once past step "
        f"{KILL_AFTER_STEP} this script\nkills rank {KILLED_RANK} with SIGKILL, from outside and without a warning. "
        "What happens then is up to `dstrain run`.",
        (
            dstrain("run", "recipes/pretrain/quickstart.yaml", "--procs-per-node", str(RANKS),
                    "--run-dir", PRETRAINING),
        ),
    ),
    Stage(
        "The proof",
        "The rows of every step are recomputed from the recipe, on one process, without a model and without an\n"
        "interruption. The ledger of the run must say the same.",
        (
            ("python", "tools/recompute_ledger.py", str(PRETRAINING), "--out", str(RECOMPUTED)),
            dstrain("ledger", PRETRAINING, RECOMPUTED),
        ),
    ),
    Stage(
        "Checkpoints",
        "Every file against its digest.",
        (dstrain("ckpt", "verify", PRETRAINING), dstrain("ckpt", "ls", PRETRAINING)),
    ),
    Stage(
        "Export",
        "A plain Transformers folder.",
        (dstrain("ckpt", "export", PRETRAINING, "--out", EXPORT),),
    ),
    Stage(
        "Fine-tuning",
        "Which package is a docstring from? First from the pretrained encoder, then the same from random weights.",
        (
            dstrain("run", "recipes/finetune/docstring-package.yaml", "--procs-per-node", str(RANKS),
                    "--run-dir", FINETUNED),
            dstrain("run", "recipes/finetune/docstring-package-scratch.yaml", "--procs-per-node", str(RANKS),
                    "--run-dir", SCRATCH),
        ),
    ),
    Stage(
        "Report",
        "Both on held-out modules, with and without pretraining. A minute of it is too little to tell them apart at\n"
        "this learning rate; at optimizer.learning_rate=1e-4 it shows (0.59 and 0.42 when this was written).",
        (dstrain("report", FINETUNED), dstrain("report", FINETUNED, SCRATCH)),
    ),
    Stage(
        "Use it",
        "Sentences that nobody wrote for a package.",
        (dstrain("ckpt", "export", FINETUNED), dstrain("predict", FINETUNED, SENTENCES)),
    ),
)  # fmt: skip

EPILOGUE = f"""\
corpus, tokenizer, shards   {CORPUS}  {TOKENIZER}  {SHARDS}
the pretraining run         {PRETRAINING}  (checkpoints, ledger, metrics, the killed attempt's verdict)
the encoder                 {EXPORT}  (AutoModelForMaskedLM.from_pretrained reads it)
the classifiers             {FINETUNED}  {SCRATCH}

What to try next:
  dstrain recipe show recipes/pretrain/quickstart.yaml          every key, and where its value comes from
  dstrain run recipes/pretrain/quickstart.yaml train.steps=2000 --procs-per-node 1 --run-dir {PRETRAINING}
                                                                 goes on from the same checkpoint on one rank
  dstrain plan recipes/pretrain/bert-base.yaml --world 8        what a real run would take
  tensorboard --logdir {ROOT}/runs                curves (in .venv/bin, as dstrain is)
"""


# ---------------------------------------------------------------- running


def run(command: Sequence[str]) -> None:
    """Run one command on this terminal. Exits with its code if it fails, and lets it end in its own way on Ctrl-C."""
    print(f"$ {shlex.join(command)}", flush=True)
    process = subprocess.Popen(resolved(command))
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal sent it to the command as well
        process.wait()
        sys.exit(130)
    if code != 0:
        print(f"\nquickstart stopped: the command above ended with exit code {code}", file=sys.stderr)
        sys.exit(code)
    print(flush=True)


def resolved(command: Sequence[str]) -> list[str]:
    """The command with this interpreter, and the `dstrain` that is installed beside it."""
    program, *arguments = command
    found = sys.executable if program == "python" else str(Path(sys.executable).with_name(program))
    return [found, *arguments]


def run_and_kill(command: Sequence[str], run_dir: Path) -> None:
    """Run a training command, and SIGKILL one of its ranks on the way."""
    ended = threading.Event()
    killed: list[str] = []

    def watch() -> None:
        if told := kill_rank(run_dir, KILLED_RANK, KILL_AFTER_STEP, ended):
            killed.append(told)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run(command)
    finally:
        ended.set()
        watcher.join()
    if not killed:
        print("quickstart stopped: the run was over before a rank could be killed", file=sys.stderr)
        sys.exit(1)
    print(f"{killed[0]}; the run went on by itself:")
    for verdict in sorted((run_dir / "attempts").glob("*/verdict.json")):
        print(f"  {verdict}: decision {json.loads(verdict.read_text())['decision']!r}\n")


def kill_rank(run_dir: Path, rank: int, after_step: int, ended: threading.Event) -> str | None:
    """Wait until the first attempt is past a step, then SIGKILL one of its ranks; None if the run ended before."""
    while not ended.wait(0.1):
        if current_step(run_dir) < after_step:
            continue
        pid = json.loads((run_dir / "attempts" / "0001" / "ranks" / f"rank-{rank:05d}.json").read_text())["pid"]
        os.kill(pid, signal.SIGKILL)
        return f"rank {rank}, process {pid}, was killed with SIGKILL after step {current_step(run_dir)}"
    return None


def current_step(run_dir: Path) -> int:
    """The newest step in the run's status files; 0 while there are none."""
    steps = [json.loads(file.read_text())["step"] for file in (run_dir / "status").glob("*.json")]
    return max(steps, default=0)


def start_clean(fresh: bool) -> None:
    """Remove what an earlier call left and this one makes anew."""
    for path in (ROOT,) if fresh else (ROOT / "runs", EXPORT):
        shutil.rmtree(path, ignore_errors=True)
    ROOT.mkdir(parents=True, exist_ok=True)
    SENTENCES.write_text(TEXTS, encoding="utf-8")


def finished_mark(stage: Stage) -> Path:
    """A file that names the commands which made a stage's folder; there once they have succeeded."""
    assert stage.makes is not None
    return ROOT / f".{stage.makes.name}.made"


def tell(stage: Stage, started: float) -> None:
    """Run one stage under its heading, or say that what it makes is there."""
    number = STAGES.index(stage) + 1
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    heading = f"── {number}/{len(STAGES)}  {stage.title} "
    print(f"{heading.ljust(110, '─')} {minutes}:{seconds:02d}\n{stage.story}\n", flush=True)
    made = "\n".join(shlex.join(command) for command in stage.commands)
    if stage.makes is not None and finished_mark(stage).is_file() and finished_mark(stage).read_text() == made:
        print(f"{stage.makes} is there from an earlier call, made by\n$ {made}\n", flush=True)
        return
    if stage.makes is not None:
        shutil.rmtree(stage.makes, ignore_errors=True)
    for command in stage.commands:
        if str(PRETRAINING) in command and command[1] == "run":
            run_and_kill(command, PRETRAINING)
        else:
            run(command)
    if stage.makes is not None:
        finished_mark(stage).write_text(made)


def main() -> int:
    parser = argparse.ArgumentParser(description="from a corpus to a classifier, with a killed rank on the way")
    parser.add_argument("--fresh", action="store_true", help="make corpus, tokenizer and shards anew as well")
    arguments = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])
    started = time.monotonic()
    start_clean(arguments.fresh)
    for stage in STAGES:
        tell(stage, started)
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    print(f"{'── Done '.ljust(110, '─')} {minutes}:{seconds:02d}\n\n{EPILOGUE}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
