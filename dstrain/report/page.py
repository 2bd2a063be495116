"""A report as sections of tables and pictures, written as Markdown and as one HTML file without anything beside it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.base.extras import require
from dstrain.errors import UserError
from dstrain.recipe.definition import definitions
from dstrain.report import figures
from dstrain.report.intervals import Judged, intervals, worst
from dstrain.report.runs import RunSummary, differ_by_chance_alone, read_metrics, spreads, summarize_run
from dstrain.report.text import setting_rows, source_rows
from dstrain.tasks.calibration import BINS, calibration

WORST = 20
SHOWN_CHARACTERS = 400
CURVES = (("loss", "training loss"), ("tokens_per_second", "tokens per second"), ("learning_rate", "learning rate"))
PREDICTIONS = "predictions-{}.jsonl"
SPLITS = {"valid": "held out", "test": "test"}


@dataclass(frozen=True)
class Picture:
    """An SVG with its title."""

    title: str
    svg: str


@dataclass(frozen=True)
class Section:
    """A part of a report: a table, pictures, and text as it is."""

    title: str
    note: str = ""
    heading: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    text: str = ""


def write_report(
    run_dirs: Sequence[Path],
    html: Path | None,
    markdown: Path | None,
    pooled: Mapping[str, list[Judged]] | None = None,
) -> None:
    """Write the report of a run, or of several side by side.

    Args:
        run_dirs: folders of runs.
        html: where to, if at all.
        markdown: where to, if at all.
        pooled: by name, predictions that all runs made together: those out of fold.

    Raises:
        UserError: one of the folders is no run's, a file cannot be written, or the extra `report` is not installed.
    """
    require("report", "a report with figures")
    runs = [summarize_run(run_dir) for run_dir in run_dirs]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    sections = report_sections(run_dirs, runs)
    for name, judged in (pooled or {}).items():
        sections += [_scores(name, [title], [judged], [{}]), *_details(name, {}, judged)]
    for path, text in ((html, as_html), (markdown, as_markdown)):
        if path is None:
            continue
        temporary = path.with_name(f".{path.name}.new")
        try:
            temporary.write_text(text(title, sections), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}; write the report elsewhere") from error


def report_sections(run_dirs: Sequence[Path], runs: Sequence[RunSummary]) -> list[Section]:
    """What there is to say; what a task does not have is left out."""
    names = _names(runs)
    sections = [
        Section("Settings and outcome", heading=("", *names), rows=[(key, *cells) for key, cells in setting_rows(runs)])
    ]
    if differ_by_chance_alone(runs):
        heading = ("", "mean", "deviation", "least", "most", "runs")
        note = "The runs are of one recipe, but for seeds and what is held out. Deviations are those of a sample."
        rows: list[tuple[str, ...]] = [
            (name, *(f"{value:.4f}" for value in (s.mean, s.deviation, s.least, s.most)), str(s.runs))
            for name, s in spreads(runs).items()
        ]
        sections.append(Section("Mean and deviation", note, heading, rows))
    sections += [_sources(name, run) for name, run in zip(names, runs, strict=True) if run.sources]
    sections.append(Section("Curves", pictures=_curves(run_dirs, names)))
    for split, words in SPLITS.items():
        judged = [read_predictions(run_dir, split) for run_dir in run_dirs]
        reports = [run.classification or {} for run in runs] if split == "valid" else list(map(_test_report, run_dirs))
        if any(judged):
            sections.append(_scores(words, names, judged, reports))
        if len(runs) == 1 and judged[0]:
            sections += _details(words, reports[0], judged[0])
    sections.append(Section("Speed", heading=("", *names), rows=_speed(runs)))
    return [section for section in sections if section.rows or section.pictures or section.text]


def read_predictions(run_dir: Path, split: str) -> list[Judged]:
    """What the run's last evaluation said of each example; empty where it did not. Raises UserError if damaged."""
    path = run_dir / PREDICTIONS.format(split)
    if not path.is_file():
        return []
    try:
        # a text may hold other line ends, such as U+0085, at which str.splitlines would cut it
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete it, or run the recipe's last step again") from error


# ---------------------------------------------------------------- sections


def _names(runs: Sequence[RunSummary]) -> list[str]:
    """Names of the columns: the recipes', or where these are alike the folders'."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [run.run for run in runs]


def _sources(name: str, run: RunSummary) -> Section:
    """What was read of each source of a mixture, with its curves."""
    (_, heading), *rows = source_rows(run)
    training = read_metrics(Path(run.run) / "metrics.jsonl").training
    by_source = {
        source: [(entry["step"], loss) for entry in training if _is_number(loss := _source_loss(entry, source))]
        for source in run.sources
    }
    curves = {source: curve for source, curve in by_source.items() if len(curve) > 1}
    pictures = [Picture("training loss by source", figures.curves(curves, "training loss"))] if curves else []
    note = "Losses are of the rows since the step that was logged before."
    return Section(f"Sources, {name}", note, ("", *heading), [(name, *cells) for name, cells in rows], pictures)


def _source_loss(entry: dict[str, Any], source: str) -> Any:
    return entry.get("sources", {}).get(source, {}).get("loss")


def _curves(run_dirs: Sequence[Path], names: Sequence[str]) -> list[Picture]:
    logged = [read_metrics(folder / "metrics.jsonl") for folder in run_dirs if (folder / "metrics.jsonl").is_file()]
    if len(logged) != len(run_dirs):
        return []
    wanted = [(name, title, [each.training for each in logged]) for name, title in CURVES]
    evaluations = [each.evaluations for each in logged]
    # Of what is measured of the model: that which it is compared with never changes.
    for name in dict.fromkeys(name for _, definition in definitions() for name in definition.measures):
        wanted.append((f"valid_{name}", f"held-out {name.replace('_', ' ')}", evaluations))
    of_sources = {key for entries in evaluations for entry in entries for key in entry if key.startswith("valid_loss.")}
    wanted += [(key, f"held-out loss, {key.partition('.')[2]}", evaluations) for key in sorted(of_sources)]
    pictures = []
    for key, title, entries_of in wanted:
        by_run = {
            name: [(entry["step"], entry[key]) for entry in entries if _is_number(entry.get(key))]
            for name, entries in zip(names, entries_of, strict=True)
        }
        by_run = {name: curve for name, curve in by_run.items() if len(curve) > 1}
        if by_run:
            pictures.append(Picture(title, figures.curves(by_run, title)))
    return pictures


def _scores(
    words: str, names: Sequence[str], judged: Sequence[list[Judged]], reports: Sequence[dict[str, Any]]
) -> Section:
    found = [intervals(each, report.get("labels", ())) for each, report in zip(judged, reports, strict=True)]
    rows = []
    for score in dict.fromkeys(name for each in found for name in each):
        cells = [each.get(score) for each in found]
        shown = ["–" if c is None else f"{c.value:.4f}  [{c.low:.4f}, {c.high:.4f}]" for c in cells]
        rows.append((score.replace("_", " "), *shown))
    sizes = ", ".join(f"{len(each):,}" for each in judged)
    note = f"In brackets 95 % confidence intervals, by bootstrap over the {sizes} examples."
    return Section(f"Scores, {words}", note, ("", *names), rows)


def _details(words: str, report: dict[str, Any], judged: list[Judged]) -> list[Section]:
    sections = []
    shared, alike = (report.get(f"texts_{how}_in_train") or 0 for how in ("also", "alike"))
    if shared or alike:
        seen = f"{shared:,} of these texts are in the training file too, {alike:,} but for case and spaces"
        sections.append(Section(f"Leakage, {words}", text=f"{seen}: the scores flatter."))
    dropped: list[tuple[str, ...]] = [
        (name, f"{count:,}", reason)
        for name, reasons in report.get("dropped", {}).items()
        for reason, count in reasons.items()
    ]
    if dropped:
        note = "Examples that were left out when the files were read."
        sections.append(Section(f"Dropped, {words}", note, ("file", "examples", "why"), dropped))
    if "baselines" in report:
        sections.append(_baselines(words, report))
    pictures = []
    labels = list(report.get("labels", {}))
    if "confusion" in report and len(labels) <= figures.LARGEST_MATRIX:
        pictures.append(Picture("confusion", figures.confusion(labels, report["confusion"])))
    by_type: list[tuple[str, ...]] = [
        (kind, *(f"{scores[name]:.3f}" for name in ("precision", "recall", "f1")), f"{scores['entities']:,}")
        for kind, scores in report.get("entities", {}).items()
    ]
    heading = ("entities", "precision", "recall", "F1", "number") if by_type else ()
    text = report.get("classification_report") or report.get("token_report", "")
    sections.append(Section(f"By label, {words}", "", heading, by_type, pictures, text))
    return [*sections, _calibration(words, judged), _worst(words, judged)]


def _calibration(words: str, judged: list[Judged]) -> Section:
    bins, error = calibration(judged)
    rows: list[tuple[str, ...]] = [
        (f"{each.predictions:,}", f"{each.confidence:.3f}", f"{each.accuracy:.3f}") for each in bins
    ]
    count = sum(each.predictions for each in bins)
    note = (
        f"Expected calibration error {error:.3f}: how far, on average over {count:,} predictions, confidence is from "
        f"accuracy in {BINS} bins of like confidence."
    )
    pictures = [Picture("calibration", figures.reliability(bins))] if bins else []
    return Section(f"Calibration, {words}", note, ("predictions", "confidence", "accuracy"), rows, pictures)


def _worst(words: str, judged: list[Judged]) -> Section:
    found = worst(judged, WORST)
    sure = any("confidence" in each for each in found)
    rows: list[tuple[str, ...]] = [
        (
            *(str(each[name]) for name in ("line", "true", "predicted")),
            *([f"{each['confidence']:.3f}"] if sure else []),
            _cut(str(each["text"])),
        )
        for each in found
    ]
    note = f"The {len(rows)} that went most wrong, the worst first" + (", then the most confident." if sure else ".")
    heading = ("line", "true", "predicted", *(["confidence"] if sure else []), "text")
    return Section(f"Worst examples, {words}", note, heading, rows)


def _baselines(words: str, report: dict[str, Any]) -> Section:
    """What the model reached beside what needs no model, and how it was counted."""
    metrics = list(next(iter(report["baselines"].values())))
    lines = {"the model": report, **report["baselines"]}
    rows = [(name, *(f"{scores[metric]:.4f}" for metric in metrics)) for name, scores in lines.items()]
    note = "; ".join(f"{name}: {signature}" for name, signature in report.get("signature", {}).items())
    return Section(f"For comparison, {words}", note, ("", *metrics), rows)


def _speed(runs: Sequence[RunSummary]) -> list[tuple[str, ...]]:
    return [
        ("tokens/s (median)", *("–" if r.tokens_per_second is None else f"{r.tokens_per_second:,.0f}" for r in runs)),
        ("ranks", *(str(r.ranks or "–") for r in runs)),
        ("waited for data", *("–" if r.data_wait_share is None else f"{r.data_wait_share:.1%}" for r in runs)),
    ]


def _test_report(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "test.json"
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["report"] if file.is_file() else {}
    return report


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------- writing


def as_html(title: str, sections: Sequence[Section]) -> str:
    """One page with everything in it; texts are escaped."""
    from jinja2 import Environment

    template = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(title=title, sections=sections)


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """Tables and texts; pictures are in the HTML."""
    parts = [f"# {title}"]
    for section in sections:
        if not (section.rows or section.text or section.note):
            continue
        parts.append(f"## {section.title}")
        if section.note:
            parts.append(section.note)
        if section.rows:
            heading = section.heading or tuple("" for _ in section.rows[0])
            lines = [heading, tuple("---" for _ in heading), *section.rows]
            parts.append("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))
        if section.text:
            parts.append(f"```\n{section.text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """A table's cell: one line, with nothing in it that Markdown or a browser would take for more than text."""
    for character in "\\|<>`*_[]":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())
