"""A run of three phases on two sources, its documents accounted for, found, and shown: each way against the others."""

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from dstrain.cli import main
from dstrain.data.ledger import LEDGER_NAME, read_ledger
from dstrain.data.writer import write_text_shards
from dstrain.recipe.load import load_recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.train.main import run_rank

pytestmark = pytest.mark.ranks
Capture = pytest.CaptureFixture[str]
STEPS = 22
RECIPE = """\
name: mixed
task: masked_lm
model:
  architecture: bert
  config: {{vocab_size: 256, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,
            max_position_embeddings: 64, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}}
tokenizer: {tokenizer}
data:
  sources:
    docs: {{shards: {corpus}, weight: 0.8}}
    notes: {{shards: {notes}, weight: 0.2}}
    later: {{shards: {later}, weight: 0}}
  sequence_length: 32
  lanes: 4
  seed: 1
phases:
  - {{name: short, steps: 8, data: {{sequence_length: 16, masking: {{rate: {{from: 0.3, to: 0.1}}}}}}}}
  - {{name: long, steps: 8, train: {{global_batch_rows: 12}}}}
  - {{name: last, steps: 6, data: {{sources: {{docs: 1, later: 1}}}}}}
train: {{global_batch_rows: 8, micro_batch_rows: 4, precision: fp32}}
optimizer: {{learning_rate: 1e-3}}
checkpoint: {{every_steps: 5, keep_last: 9}}
evaluate: {{every_steps: null}}
log: {{every_steps: 1, tensorboard: false}}
"""


@dataclass(frozen=True)
class Run:
    """A run that is done, and all rows of its steps by `dstrain rows`."""

    folder: Path
    rows: list[dict[str, Any]]

    def ask(self, capsys: Capture, *words: str, code: int = 0) -> str:
        assert main([word.format(run=self.folder) for word in words]) == code
        return capsys.readouterr().out


def train(rank: int, world: int, run_dir: Path) -> str:
    return run_rank(run_dir, 1)


@pytest.fixture(scope="module")
def recipe_file(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path, tiny_texts: list[str]
) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    write_text_shards(folder / "notes", [f"{text} sea" for text in tiny_texts[:17]])
    write_text_shards(folder / "later", [f"{text} hill" for text in tiny_texts[40:99]], shard_bytes=1 << 12)
    values = {"tokenizer": tiny_tokenizer, "corpus": tiny_corpus / "train"}
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(**values, notes=folder / "notes", later=folder / "later"))
    return file


@pytest.fixture(scope="module")
def run(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    recipe = load_recipe(recipe_file, ['data.skip_rows=["30-40","170-171"]']).recipe
    (folder / "recipe.yaml").write_text(resolved_yaml(recipe))
    assert run_ranks(3, train, folder) == ["done"] * 3
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda text: lines.append(text))
        assert main(["rows", str(folder), "--steps", f"1-{STEPS}", "--json"]) == 0
    return Run(folder, [json.loads(line) for line in lines])


# ------------------------------------------------------------------ rows


def test_rows_are_those_of_the_ledger_with_the_batches_of_each_phase(run: Run) -> None:
    ledger = {entry.step: entry for entry in read_ledger(run.folder / LEDGER_NAME)}
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in run.rows:
        by_step.setdefault(row["step"], []).append(row)
    assert sorted(by_step) == list(range(1, STEPS + 1)) == sorted(ledger)
    for step, rows in by_step.items():
        first, last = ledger[step].rows
        assert [row["row"] for row in rows] == list(range(first, last + 1))
        (phase,) = {row["phase"] for row in rows}
        assert len(rows) == {"short": 8, "long": 12, "last": 8}[phase]
        assert {len(row["input_ids"]) for row in rows} == {16 if phase == "short" else 32}
        assert {row["source"] for row in rows} <= ({"docs", "later"} if phase == "last" else {"docs", "notes"})
        assert [row["lane"] for row in rows] == [row["row"] % 4 for row in rows]
    assert not {row["row"] for row in run.rows} & set(range(24, 48)), "batches of rows 30 to 40 were passed over"
    shares = Counter(row["source"] for row in run.rows if row["phase"] == "long")
    assert shares["notes"] == pytest.approx(0.2 * 96, abs=3)


def test_pieces_fill_rows_and_labels_are_what_was_masked(run: Run, capsys: Capture) -> None:
    for row in run.rows:
        assert sum(piece["tokens"] for piece in row["pieces"]) == len(row["input_ids"]) == len(row["labels"])
        masked = sum(label != -100 for label in row["labels"])
        assert 0 < masked <= round(0.3 * len(row["labels"]))
    decoded = json.loads(run.ask(capsys, "rows", "{run}", "--row", "5", "--json", "--decode"))
    assert decoded["text"].count("[MASK]") == decoded["input_ids"].count(4)
    for piece in decoded["pieces"]:
        assert piece.pop("text")
    assert decoded.pop("text")
    assert decoded == run.rows[5]


def test_a_recipe_has_the_rows_that_a_run_of_it_will_have(run: Run, recipe_file: Path, capsys: Capture) -> None:
    assert main(["rows", str(recipe_file), "--steps", "2-3", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [row for row in run.rows if row["step"] in (2, 3)]
    assert main(["rows", str(recipe_file), "--steps", "2", "--json", "data.seed=2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["input_ids"] != rows[0]["input_ids"]


def test_text_is_plain_without_a_terminal(run: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["rows", "{run}", "--steps", "9", "--row", "104", "--decode"]
    text = run.ask(capsys, *words)
    head, name, *_ = text.splitlines()
    assert re.fullmatch(r"step 9, row 104: lane 0, (docs|notes), long, \d+ masked", head)
    assert re.fullmatch(r"  .+\.tar:\S+, tokens [\d,]+ to [\d,]+", name)
    assert re.search(r"\[\S+ → \S+\]", text)
    assert "\x1b" not in text
    monkeypatch.setenv("FORCE_COLOR", "1")
    colored = run.ask(capsys, *words)
    assert "\x1b[" in colored
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == text
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*3\dm", run.ask(capsys, *words)), "borders and masks in bold at most"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0-3"], "--steps 0-3: give a step from 1 on, or several as in 3-5"),
        (["--steps", "3-2"], "--steps 3-2: give a step from 1 on"),
        (["--steps", "23"], "step 23: {run} has 22 steps; give steps from 1 to 22"),
        (["--steps", "1-2", "--row", "99"], "--row 99: these steps have rows of 0 to 15; give one of them, or"),
        ([], "--steps is missing; give steps as in 1-3, or a row with --row"),
    ],
)
def test_rows_that_are_not_there(run: Run, words: list[str], message: str, capsys: Capture) -> None:
    assert main(["rows", str(run.folder), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(run=run.folder)}")
    assert error.count("\n") == 1


# ------------------------------------------------------------------ find


def trained_on(run: Run) -> dict[tuple[str, str], Counter[tuple[int, int, int, int]]]:
    """By shard and document: (step, row, offset, tokens) of each of its pieces, as rows show them."""
    found: dict[tuple[str, str], Counter[tuple[int, int, int, int]]] = {}
    for row in run.rows:
        for piece in row["pieces"]:
            pieces = found.setdefault((piece["shard"], piece["document"]), Counter())
            pieces[row["step"], row["row"], piece["offset"], piece["tokens"]] += 1
    return found


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.integers(0, 10**6))
def test_every_token_of_a_document_is_found_in_exactly_the_rows_that_show_it(
    run: Run, choice: int, capsys: Capture
) -> None:
    shown = trained_on(run)
    shard, document = sorted(shown)[choice % len(shown)]
    answer = json.loads(run.ask(capsys, "find", "{run}", f"{shard}:{document}", "--json"))
    (found,) = answer["documents"]
    assert (found["shard"], found["document"]) == (shard, document)
    occurrences = Counter(
        (one["step"], one["row"], one["offset"], one["tokens"])
        for one in found["occurrences"]
        if one["fate"] == "trained"
    )
    assert occurrences == shown[shard, document]
    assert found["trained_tokens"] == sum(tokens * count for (*_, tokens), count in occurrences.items())
    skipped = {one["row"] for one in found["occurrences"] if one["fate"] == "skipped"}
    assert skipped <= {*range(24, 48), *range(160, 184)}


def test_a_document_is_found_by_its_text_in_the_batch_that_rows_show(
    run: Run, tiny_texts: list[str], tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "document.txt"
    for text in tiny_texts[:17]:
        file.write_text(f"{text} sea\n")
        answer = json.loads(run.ask(capsys, "find", "{run}", "--text-file", str(file), "--json"))
        (found,) = answer["documents"]
        assert found["source"] == "notes"
        if found["trained_tokens"]:
            break
    by_name = json.loads(run.ask(capsys, "find", "{run}", f"{found['shard']}:{found['document']}", "--json"))
    assert by_name["documents"] == answer["documents"]
    assert set(answer["rests_on"]) == {"law", "tokenizer", "corpora", "identity", "recipe", "checkpoint"}
    assert set(answer["rests_on"]["corpora"]) == {"docs", "notes", "later"}
    once = next(one for one in found["occurrences"] if one["fate"] == "trained")
    row = next(row for row in run.rows if row["row"] == once["row"])
    shown = json.loads(run.ask(capsys, "rows", "{run}", "--row", str(once["row"]), "--json", "--decode"))
    texts = [piece["text"] for piece in shown["pieces"] if piece["document"] == found["document"]]
    assert row["step"] == once["step"]
    assert texts
    assert f"step {once['step']}, row {once['row']:,}" in run.ask(capsys, "find", "{run}", "--text-file", str(file))

    file.write_text("nobody ever wrote this")
    assert "never: no document of docs or notes or later is it" in run.ask(
        capsys, "find", "{run}", "--text-file", str(file), code=1
    )


def test_a_document_that_is_to_come_and_one_that_never_is(run: Run, tmp_path: Path, capsys: Capture) -> None:
    """The same run, as it was after step 10: the source of the last phase is all to come."""
    early = tmp_path / "early"
    shutil.copytree(run.folder, early)
    lines = (early / LEDGER_NAME).read_text().splitlines()
    (early / LEDGER_NAME).write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= 10))
    for folder in (early / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > 10:
            shutil.rmtree(folder)
    shard, document = next(key for key in sorted(trained_on(run)) if "/later/" in key[0])
    answer = json.loads(Run(early, []).ask(capsys, "find", "{run}", f"{shard}:{document}", "--json"))
    (found,) = answer["documents"]
    assert (answer["steps_done"], answer["last_step"]) == (10, STEPS)
    assert {one["fate"] for one in found["occurrences"]} == {"to come"}
    whole = json.loads(run.ask(capsys, "find", "{run}", f"{shard}:{document}", "--json"))["documents"][0]
    expected, came = (
        [(one["step"], one["row"], one["offset"]) for one in document["occurrences"]] for document in (found, whole)
    )
    assert expected == came

    recipe = load_recipe(early / "recipe.yaml").recipe
    phases = [phase.model_copy(update={"steps": 2 if phase.name == "last" else phase.steps}) for phase in recipe.phases]
    (early / "recipe.yaml").write_text(resolved_yaml(recipe.model_copy(update={"phases": tuple(phases)})))
    every = json.loads(Run(early, []).ask(capsys, "find", "{run}", f"{Path(shard).name}:{document}", "--json"))
    assert every["last_step"] == 18


def test_what_find_cannot_understand(run: Run, capsys: Capture) -> None:
    for words, message in (
        (["train.tar"], "train.tar: give SHARD:KEY or SHARD:KEY:NUMBER, as in train-000000.tar:doc-000007"),
        ([], "say which document: SHARD:KEY or SHARD:KEY:NUMBER, or its text with --text-file FILE"),
        (["--text-file", "/nowhere"], "give a file of UTF-8 text"),
    ):
        assert main(["find", str(run.folder), *words]) == 2
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------ ledger


def test_the_ledger_accounts_for_documents_as_the_rows_do(run: Run, capsys: Capture) -> None:
    report = json.loads(run.ask(capsys, "ledger", "{run}", "--json"))
    documents = report["documents"]
    assert (documents["problems"], documents["missing"]) == ([], None)
    assert {1, STEPS} <= set(documents["remade_steps"])
    seen: dict[str, Counter[tuple[str, str, int]]] = {}
    for row in run.rows:
        for piece in row["pieces"]:
            counts = seen.setdefault(row["source"], Counter())
            counts.update((piece["shard"], piece["document"], piece["offset"] + n) for n in range(piece["tokens"]))
    for source in documents["sources"]:
        counts = seen[source["source"]]
        times = Counter(counts.values())
        never = source["corpus_tokens"] - len(counts)
        wanted = {str(number): tokens for number, tokens in sorted((times | Counter({0: never})).items()) if tokens}
        assert (source["times_seen"], source["exact"]) == (wanted, True)
        assert source["tokens"] == sum(counts.values())
        assert source["epochs"] == pytest.approx(source["tokens"] / source["corpus_tokens"])
    assert sum(source["passed_over"] for source in documents["sources"]) == 24 * 16 + 8 * 32
    text = run.ask(capsys, "ledger", "{run}")
    assert re.search(r"  notes +[\d,]+ tokens, [\d.]+ epochs; of its [\d,]+ tokens it saw .*once.*", text)
    assert "made anew    the rows of step 1, " in text


def test_a_ledger_of_other_rows_fails(run: Run, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    lines = [json.loads(line) for line in (run.folder / LEDGER_NAME).read_text().splitlines()]

    def rewritten(changed: list[dict[str, Any]]) -> list[str]:
        (copy / LEDGER_NAME).write_text("".join(json.dumps(line) + "\n" for line in changed))
        report = json.loads(Run(copy, []).ask(capsys, "ledger", "{run}", "--json", code=1))
        return [*report["problems"], *report.get("documents", {"problems": []})["problems"]]

    digest = [line | {"digest": "0" * 32} if line["step"] == STEPS else line for line in lines]
    pattern = f"step {STEPS}: its rows made anew have the digest [0-9a-f]{{32}}, the ledger has 0+"
    assert re.match(pattern, rewritten(digest)[0])
    first, second = (next(n for n, line in enumerate(lines) if line["step"] == step) for step in (2, 3))
    moved = list(lines)  # the border between two batches is elsewhere: no row is lost, and yet it is not the law
    border = lines[first]["rows"][1] - 3
    moved[first] = lines[first] | {"rows": [lines[first]["rows"][0], border]}
    moved[second] = lines[second] | {"rows": [border + 1, lines[second]["rows"][1]]}
    assert "where a global batch of this data has" in rewritten(moved)[0]


def test_changed_data_is_named_and_data_that_is_gone_is_said(run: Run, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace("seed: 1", "seed: 2", 1))
    out = Run(copy, []).ask(capsys, "ledger", "{run}", code=1)
    assert "was trained on other data than its recipe names now:" in out
    assert "data.seed: 1 → 2" in out
    assert main(["rows", str(copy), "--steps", "1"]) == 2
    assert "data.seed: 1 → 2" in capsys.readouterr().err
    notes = re.search(r"shards: (\S+/notes)", recipe)
    assert notes is not None
    (copy / "recipe.yaml").write_text(recipe.replace(notes[1], "/nowhere/notes"))
    assert "documents    not looked at: /nowhere/notes" in Run(copy, []).ask(capsys, "ledger", "{run}")
    moved = tmp_path / "elsewhere"
    shutil.copytree(notes[1], moved)
    words = ["find", "{run}", "train-000000.tar:nothing", f"data.sources.notes.shards={moved}"]
    assert "never: no document of" in Run(copy, []).ask(capsys, *words, code=1)
