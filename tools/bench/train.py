"""How many real tokens a second one process trains: this project beside Transformers' Trainer and a hand-written loop.

    python tools/bench/train.py                                                # every shape and precision
    python tools/bench/train.py --model bert-small --tokens 128 --precision bf16 --threads 2 --repeats 5 --steps 20

All train the same BERT on the same documents in full rows (every token is real), predict 15 % of them, and update by
AdamW after clipping. They are started together and take turns, A B C D A B C D …, a number of steps each, while the
others wait; what is printed is the median of the rounds, their range, and the medians of the ratios within a round: by
the clock, and by CPU time (threads and data processes together), which other jobs on the machine disturb less.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from train_contestants import LEARNING_RATE, Contest, compete

from dstrain.architectures import model_shape
from dstrain.corpus.train_tokenizer import SPECIAL_TOKENS, write_tokenizer
from dstrain.data.tokens import load_document_tokenizer
from dstrain.data.writer import write_token_shards
from dstrain.plan import step_flops
from dstrain.recipe.schema import MaskedLmRecipe

VOCAB_SIZE = 30_528
SHAPES = {"bert-small": (4, 512, 8), "bert-base": (12, 768, 12)}  # layers, hidden size, heads
CONTESTANTS = ("dstrain", "dstrain-zero1", "hand", "trainer", "hand-sdpa", "trainer-eager")
RATIOS = (
    ("dstrain", "trainer"),
    ("dstrain", "trainer-eager"),
    ("dstrain", "hand"),
    ("dstrain-zero1", "hand"),
    ("dstrain", "hand-sdpa"),
    ("hand", "trainer"),
)
Seconds = tuple[float, float]  # of wall time, of CPU time
WALL, CPU = 0, 1
DOCUMENTS = 20_000


@dataclass(frozen=True)
class Measured:
    """One configuration's seconds per round, by contestant, in order of the rounds."""

    tokens_per_round: int
    seconds: dict[str, list[Seconds]]

    def tokens_per_second(self, contestant: str) -> list[float]:
        return [self.tokens_per_round / seconds[WALL] for seconds in self.seconds[contestant]]

    def ratio(self, first: str, second: str, clock: int) -> float:
        """Median over the rounds of the first's speed ÷ the second's."""
        pairs = zip(self.seconds[first], self.seconds[second], strict=True)
        return statistics.median(theirs[clock] / ours[clock] for ours, theirs in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512], help="row lengths")
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, default=10, help="of each contestant in a round")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    report = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        for model in args.model:
            for tokens in args.tokens:
                for precision in args.precision:
                    for threads in args.threads:
                        recipe = make_recipe(folder, model, tokens, precision, args)
                        measured = measure(Contest(recipe, folder, threads), args)
                        title = {"model": model, "tokens": tokens, "precision": precision, "threads": threads}
                        report.append(title | summary(recipe, measured))
                        print_summary(report[-1])
                        if args.json is not None:
                            args.json.write_text(json.dumps(report, indent=1) + "\n")


def write_corpus(folder: Path) -> None:
    """Random documents in token shards: log-normal lengths, ids distributed as words are; and a tokenizer for them."""
    tokens = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(len(SPECIAL_TOKENS), VOCAB_SIZE))]
    tokenizer = Tokenizer(WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    write_tokenizer(tokenizer, folder / "tokenizer", lowercase=True)
    encoder = load_document_tokenizer(str(folder / "tokenizer"))
    draw = np.random.default_rng(0)
    ordinary = VOCAB_SIZE - len(SPECIAL_TOKENS)

    def documents() -> Iterator[NDArray[np.integer]]:
        for length in np.clip(draw.lognormal(np.log(120), 0.9, DOCUMENTS), 4, 4000).astype(int).tolist():
            ids = len(SPECIAL_TOKENS) + np.minimum(draw.zipf(1.2, length), ordinary).astype(np.int64) - 1
            ids[0], ids[-1] = encoder.cls_id, encoder.sep_id
            yield ids

    write_token_shards(folder / "shards", documents(), vocab_size=encoder.vocab_size, tokenizer=encoder.digest)


def make_recipe(folder: Path, model: str, tokens: int, precision: str, args: argparse.Namespace) -> MaskedLmRecipe:
    layers, hidden, heads = SHAPES[model]
    micro_rows = args.micro_batch_tokens // tokens
    config = {
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "hidden_dropout_prob": args.dropout,
        "attention_probs_dropout_prob": args.dropout,
    }
    values: dict[str, Any] = {
        "name": "bench",
        "task": "masked_lm",
        "model": {"architecture": "bert", "config": config},
        "tokenizer": str(folder / "tokenizer"),
        "data": {"train": str(folder / "shards"), "sequence_length": tokens, "lanes": micro_rows},
        "train": {
            "global_batch_rows": micro_rows * args.accumulation,
            "micro_batch_rows": micro_rows,
            "steps": 10**6,
            "precision": precision,
        },
        "optimizer": {"name": "adamw", "learning_rate": LEARNING_RATE},
        "checkpoint": {"every_steps": 10**6},
        "log": {"tensorboard": False},
    }
    return MaskedLmRecipe.model_validate_json(json.dumps(values))


def measure(contest: Contest, args: argparse.Namespace) -> Measured:
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = str(contest.threads)
    running: dict[str, tuple[Any, Connection]] = {}
    try:
        for name in args.contestants:
            ours, theirs = context.Pipe()
            process = context.Process(target=compete, args=(name, contest, theirs))
            process.start()
            theirs.close()
            running[name] = (process, ours)
            ours.recv()  # ready
            turn(ours, 2)  # allocators and kernels get warm
        seconds: dict[str, list[Seconds]] = {name: [] for name in running}
        for _ in range(args.repeats):
            for name, (_, connection) in running.items():
                seconds[name].append(turn(connection, args.steps))
    finally:
        for process, connection in running.values():
            if process.is_alive():
                connection.send(0)
            process.join(30)
            if process.is_alive():
                process.kill()
    return Measured(args.steps * contest.recipe.train.global_batch_rows * contest.recipe.data.sequence_length, seconds)


def turn(connection: Connection, steps: int) -> Seconds:
    """Let a contestant take this many steps; returns their seconds."""
    connection.send(steps)
    wall, cpu = connection.recv()
    return float(wall), float(cpu)


def summary(recipe: MaskedLmRecipe, measured: Measured) -> dict[str, Any]:
    flops = step_flops(recipe, model_shape(recipe.model)).model
    speeds = {name: measured.tokens_per_second(name) for name in measured.seconds}
    return {
        "micro_batch_rows": recipe.train.micro_batch_rows,
        "global_batch_rows": recipe.train.global_batch_rows,
        "tokens_per_second": {name: statistics.median(speed) for name, speed in speeds.items()},
        "rounds": speeds,
        "gflops_per_second": {
            name: statistics.median(speed) * flops / 1e9
            for name, speed in speeds.items()
            if not name.startswith("trainer")
        },
        "cpu_seconds": {name: [seconds[CPU] for seconds in rounds] for name, rounds in measured.seconds.items()},
        "ratios": {
            f"{a} / {b}": {"wall": measured.ratio(a, b, WALL), "cpu": measured.ratio(a, b, CPU)}
            for a, b in RATIOS
            if a in speeds and b in speeds
        },
    }


def print_summary(report: dict[str, Any]) -> None:
    print(
        f"\n{report['model']}, rows of {report['tokens']} tokens, {report['precision']}, {report['threads']} threads, "
        f"{report['global_batch_rows']} rows a step in micro-batches of {report['micro_batch_rows']}"
    )
    for name, speed in report["tokens_per_second"].items():
        rounds = report["rounds"][name]
        gflops = report["gflops_per_second"].get(name)
        rate = "" if gflops is None else f"  {gflops:6.0f} GFLOP/s"
        print(f"  {name:14} {speed:9,.0f} tokens/s  ({min(rounds):,.0f} … {max(rounds):,.0f}){rate}")
    for pair, ratio in report["ratios"].items():
        print(f"  {pair:24} {ratio['wall']:.3f} by the clock, {ratio['cpu']:.3f} by CPU time", flush=True)


if __name__ == "__main__":
    main()
