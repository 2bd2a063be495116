"""`dstrain serve` as a process: what it refuses to start with, what it answers, and how it ends."""

import json
import signal
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path

import pytest

from dstrain.cli import main
from dstrain.corpus.train_tokenizer import train_wordpiece, write_tokenizer

pytestmark = pytest.mark.slow

TEXTS = ["red apple", "green leaf of the tree", "the blue sky " * 12, "apple"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier, slow enough (30 ms for a batch, say) that requests are in flight when it is told to stop."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("classifier")
    write_tokenizer(train_wordpiece(TEXTS * 3, 45), folder, lowercase=True)
    sizes = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 1024}
    config = BertConfig(vocab_size=64, max_position_embeddings=64, id2label={0: "fruit", 1: "plant"}, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_a_signal_lets_what_is_in_flight_be_answered_and_exits_0(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str, tolerance: float
) -> None:
    command = [sys.executable, "-m", "dstrain", "serve", str(classifier), "--port", "0", "--batch-rows", "4"]
    command += ["--precision", precision]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "serving" in line, process.communicate()[1]
        clients = [HTTPConnection(line.split()[3].removeprefix("http://"), timeout=60) for _ in range(40)]
        for client in clients:  # a connection each, which the server knows
            client.request("GET", "/health")
            client.getresponse().read()
        for client in clients:
            client.request("POST", "/predict", json.dumps({"inputs": TEXTS}), {"Content-Type": "application/json"})
        answers = [clients[0].getresponse()]  # by now it has read them all
        process.send_signal(signal.SIGTERM)
        answers += [client.getresponse() for client in clients[1:]]
        assert [answer.status for answer in answers] == [200] * 40
        served = [json.loads(answer.read()) for answer in answers]
        errors = process.communicate(timeout=30)[1]
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.wait()

    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    assert main(["predict", str(classifier), str(tmp_path / "texts.txt")]) == 0
    predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for answer in served:  # whatever the batch it was in
        for mine, other in zip(answer["predictions"], predicted, strict=True):
            assert mine["label"] == other["label"] or abs(other["probability"] - 0.5) < tolerance
            assert mine["probability"] == pytest.approx(other["probability"], abs=tolerance)


def test_a_signal_is_heard_as_soon_as_the_address_is_said(classifier: Path) -> None:
    """Between that line and the first request there is a moment in which nobody listened to signals."""
    command = [sys.executable, "-m", "dstrain", "serve", str(classifier), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "serving" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=30)[1]
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.wait()


def token_file(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "token"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "nobody is asked for a token; give --token-file"),
        (["--host", "::"], "nobody is asked for a token"),
        (["--host", "no.such.host.invalid", "--token-file", "GOOD"], "no.such.host.invalid --port 8000: "),
        (["--port", "99999999"], "--port 99999999: ports go from 0"),
        (["--queue-rows", "8"], "holds no batch of --batch-rows 32"),
        (["--threads", "0"], "--threads 0 must be more than 0"),
        (["--timeout-seconds", "0"], "--timeout-seconds 0.0 must be more than 0"),
        (["--token-file", "SHORT"], "must hold one word of 16"),
        (["--token-file", "OPEN"], "can be read by others; run: chmod 600"),
        (["--token-file", "/no/such/token"], "No such file"),
        (["--port", "0"], "has no config.json"),
    ],
)
def test_what_it_does_not_start_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    files = {"GOOD": ("x" * 20, 0o600), "SHORT": ("x", 0o600), "OPEN": ("x" * 20, 0o644)}
    given = [token_file(tmp_path, *files[option]) if option in files else option for option in options]
    assert main(["serve", str(tmp_path), *given]) == 2
    assert says in capsys.readouterr().err
