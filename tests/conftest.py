"""A tokenizer, a corpus and recipes small enough to train on in a second; made once per session."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.corpus.train_tokenizer import train_wordpiece, write_tokenizer
from dstrain.data.tokens import load_document_tokenizer
from dstrain.data.writer import write_token_shards
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import Recipe

VOCABULARY = 256
SHOWN = "shown"
LONG_FOLDERS = {"cluster", "extending", "proof", "sweep"}
RECIPE = """\
name: tiny
task: masked_lm
model:
  architecture: bert
  config: {{vocab_size: 256, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64,
            max_position_embeddings: 64, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}}
tokenizer: {tokenizer}
data: {{train: {corpus}/train, valid: {corpus}/valid, sequence_length: 32, lanes: 8, seed: 1, shuffle_window: 16}}
train: {{global_batch_rows: 8, micro_batch_rows: 2, steps: 100, precision: fp32, zero: {{stage: 0}}, seed: 3}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{warmup_steps: 4}}
checkpoint: {{every_steps: 1000, keep_last: 2}}
evaluate: {{every_steps: null, batches: 2}}
log: {{every_steps: 1, tensorboard: false}}
"""


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """300 documents of 3 to 60 words."""
    draw = random.Random(5)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(200)]
    return [" ".join(draw.choices(words, k=draw.randint(3, 60))) for _ in range(300)]


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    """Folder of a WordPiece tokenizer of 256 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_wordpiece(tiny_texts, VOCABULARY), folder, lowercase=True)
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str], tiny_tokenizer: Path) -> Path:
    """Folder with token shards in train/ (several) and valid/."""
    folder = tmp_path_factory.mktemp("corpus")
    encoder = load_document_tokenizer(tiny_tokenizer)
    for name, texts in (("train", tiny_texts[:250]), ("valid", tiny_texts[250:])):
        write_token_shards(
            folder / name,
            encoder.encode_many(texts),
            vocab_size=encoder.vocab_size,
            tokenizer=encoder.digest,
            shard_bytes=1 << 13,
            block_documents=16,
        )
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path
) -> Callable[..., Recipe]:
    """`tiny_recipe("train.zero.stage=2", …)`: a 2-layer BERT, 8 rows of 32 tokens a step, fp32, no dropout."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE.format(tokenizer=tiny_tokenizer, corpus=tiny_corpus))

    def make(*overrides: str) -> Recipe:
        return load_recipe(path, overrides).recipe

    return make


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`show(text)`: at the end of the session, also from a worker of xdist, whose output nobody sees."""
    return lambda text: request.node.user_properties.append((SHOWN, text))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes begin first, so that no worker sits idle at the end."""
    root = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(root).parts[0] not in LONG_FOLDERS)


def _skipped_without_need(config: pytest.Config) -> list[str]:
    """Tests that this machine could have run. Only a GPU may be missing."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []
    return [report.nodeid for report in reports if "gpu" not in report.keywords]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failure."""
    if os.environ.get("DSTRAIN_CI") and _skipped_without_need(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What tests have shown; and in CI, what is not accepted."""
    for report in (report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])):
        for text in (text for name, text in report.user_properties if name == SHOWN):
            terminalreporter.section(report.nodeid)
            terminalreporter.write_line(text)
    if os.environ.get("DSTRAIN_CI"):
        for test in _skipped_without_need(config):
            terminalreporter.write_line(f"CI: skipped, though this machine can run it: {test}", red=True)
