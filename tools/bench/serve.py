"""Serving under load: requests per second beside the bare model, and what overload looks like.

    python tools/bench/serve.py                    # a random MiniLM-sized classifier; needs wrk (apt-get install wrk)
    python tools/bench/serve.py --model runs/sentiment --texts texts.txt

One text a request, in all rows:
  direct    the model called in a loop in a process of its own, one text at a time: what a plain Flask view does
  served    `dstrain serve` and wrk on the same cores, over 128 connections that ask again as soon as they are answered
  overload  requests at twice that rate, over as many connections as it takes: the excess must get 429, nothing else

`direct` and `served` take turns, the server without work in between; the ratio is taken round by round.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx

SENTENCE = "my card was charged twice for the same transfer please tell me when the refund will be on account"
SCRIPT = """\
local bodies = {%s}
local next_body = 0
function delay() return math.random(0, 2 * %d) end
request = function()
  next_body = next_body %% #bodies + 1
  return wrk.format("POST", "/predict", {["Content-Type"] = "application/json"}, bodies[next_body])
end
done = function(summary, latency, requests)
  io.write(string.format("RESULT %%d %%d %%d %%d %%d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99),
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a run or an exported classifier (default: random, MiniLM's size)")
    parser.add_argument("--texts", type=Path, help="texts, one a line (default: 64 of 6 to 20 words)")
    parser.add_argument("--seconds", type=int, default=6, help="of each row (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="direct and served, in turn (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16, of all rows (default: %(default)s)")
    parser.add_argument("--batch-rows", type=int, default=32, help="of the server (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the server (default: %(default)s)")
    parser.add_argument("--queue-rows", type=int, default=256, help="of the server (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=128, help="of `served` (default: %(default)s)")
    args = parser.parse_args()
    texts = args.texts.read_text().splitlines() if args.texts else made_up_texts()
    if shutil.which("wrk") is None:
        sys.exit("wrk, the load generator, is missing; install Debian's package of that name")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or random_classifier(Path(folder) / "model", texts)
        script = Path(folder) / "post.lua"
        bodies = ", ".join(json.dumps(json.dumps({"inputs": [text]})) for text in texts)
        command = [sys.executable, "-m", "dstrain", "serve", str(model), "--port", "0"]
        for option in ("batch_rows", "threads", "queue_rows", "precision"):
            command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[3]
            script.write_text(SCRIPT % (bodies, 0))
            served(address, script, args.connections, 2)
            rates, ratios = [], []
            for _ in range(args.rounds):
                direct = calls_per_second(model, texts, args.seconds, args.precision)
                rate, shown = served(address, script, args.connections, args.seconds)
                rates.append(rate)
                ratios.append(rate / direct)
                print(f"direct {direct:5,.0f} texts/s, served {rate:5,.0f} = {ratios[-1]:.2f} ×; {shown}", flush=True)
            print(f"served / direct: median {median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
            # Each connection waits between its requests, so that together they ask twice as often as was answered.
            connections = 4 * (args.queue_rows + args.batch_rows)
            script.write_text(SCRIPT % (bodies, round(1000 * connections / (2 * median(rates)))))
            rate, shown = served(address, script, connections, args.seconds)
            print(f"overload, {connections:,} connections: answered {rate:,.0f} texts/s; {shown}")
        finally:
            server.terminate()
            server.wait()


def served(address: str, script: Path, connections: int, seconds: int) -> tuple[float, str]:
    """Texts answered per second, and what else is to be said."""
    before = codes(address)
    result = load(address, script, connections, seconds)
    counts = {code: n - before.get(code, 0) for code, n in codes(address).items()}
    latency = f"p50 {result['p50']:.0f} ms, p99 {result['p99']:.0f} ms"
    return counts.get("200", 0) / result["seconds"], f"{latency}, codes {counts}, {result['broken']} broken"


def calls_per_second(model: Path, texts: list[str], seconds: int, precision: str) -> float:
    """Texts per second of the bare model, called with one at a time."""
    code = (
        "import sys, time, json; from pathlib import Path\n"
        "from dstrain.predict.loaded import transformers_folder\n"
        "from dstrain.predict.load_predictor import load_predictor\n"
        "model = load_predictor(transformers_folder(Path(sys.argv[1])), sys.argv[4]); texts = json.loads(sys.argv[2])\n"
        "[model.answers([(text,)], 1) for text in texts[:8]]\n"
        "begin, done = time.perf_counter(), 0\n"
        "while time.perf_counter() - begin < float(sys.argv[3]):\n"
        "    model.answers([(texts[done % len(texts)],)], 1); done += 1\n"
        "print(done / (time.perf_counter() - begin))\n"
    )
    command = [sys.executable, "-c", code, str(model), json.dumps(texts), str(seconds), precision]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def load(address: str, script: Path, connections: int, seconds: int) -> dict[str, float]:
    """Run wrk. Latencies in milliseconds, refusals included."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout=30s", "-s", str(script), address]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)", out)
    assert found, out
    requests, micros, p50, p99, broken = map(int, found.groups())
    return {"requests": requests, "seconds": micros / 1e6, "p50": p50 / 1e3, "p99": p99 / 1e3, "broken": broken}


def codes(address: str) -> dict[str, int]:
    """Requests by status code so far."""
    time.sleep(1.0)  # those in flight when wrk hung up are counted when they are answered
    text = httpx.get(f"{address}/metrics").text
    return {code: int(float(n)) for code, n in re.findall(r'dstrain_requests_total\{code="(\d+)"\} (\S+)', text)}


def made_up_texts() -> list[str]:
    """64 texts of 6 to 20 words."""
    words = SENTENCE.split()
    return [" ".join(words[(start + i) % len(words)] for i in range(6 + start % 15)) for start in range(64)]


def random_classifier(folder: Path, texts: list[str]) -> Path:
    """As large as all-MiniLM-L6: 6 layers of 384, 22 million parameters."""
    from transformers import BertConfig, BertForSequenceClassification

    from dstrain.corpus.train_tokenizer import train_wordpiece, write_tokenizer

    write_tokenizer(train_wordpiece(texts * 3, 90), folder, lowercase=True)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    labels = {number: f"label {number}" for number in range(77)}
    BertForSequenceClassification(BertConfig(vocab_size=30522, id2label=labels, **sizes)).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
