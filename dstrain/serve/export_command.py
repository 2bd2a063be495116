"""`dstrain export`: from what was trained to what is used, as a Transformers folder or as ONNX."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from dstrain.checkpoint.commands import export_command as export_checkpoint
from dstrain.errors import EXIT_DONE, UserError
from dstrain.tasks.predictors import GRAPH, TextClassifier, transformers_folder
from dstrain.tasks.records import Reading, records_of

BATCH_ROWS = 32


def export_command(args: Namespace) -> int:
    """`dstrain export MODEL [--out DIR] [--step N] [--onnx] [--int8 --measure FILE]`."""
    given = Path(args.path)
    if args.measure and not args.int8:
        raise UserError("--measure compares int8 with fp32; give --int8 as well, or leave it out")
    if args.int8 and not (args.onnx and args.measure):
        raise UserError("--int8 needs --onnx, and --measure FILE with texts on which its loss of quality is measured")
    plain = (given / "config.json").is_file()
    if not args.onnx:
        if plain:
            raise UserError(f"{given} is a Transformers folder already; --onnx makes ONNX of it")
        return export_checkpoint(args)
    from dstrain.serve.onnx import export_onnx

    out = Path(args.out) if args.out is not None else given.with_name(f"{given.name}-onnx") if plain else given / "onnx"
    folder = transformers_folder(given)
    difference = export_onnx(folder, out, int8=args.int8)
    size = (out / GRAPH).stat().st_size / 1e6
    print(
        f"{folder} → {out} ({size:,.0f} MB)\noutputs of the graph in fp32 and of the model differ by {difference:.1e}"
    )
    if args.int8:
        print(measured(folder, out, args.measure, args.text_field, args.label_field))
    return EXIT_DONE


def measured(folder: Path, quantized: Path, file: str, text_field: str, label_field: str) -> str:
    """What 8-bit weights cost on a file of texts: how often the labels agree, and accuracies where it has labels.

    Raises:
        UserError: the file cannot be read, or has no text.
    """
    records = [each.fields for each in records_of(file, Reading(), {text_field: "--text-field"}) if not each.problem]
    records = [fields for fields in records if str(fields.get(text_field) or "").strip()]
    if not records:
        raise UserError(f"--measure {file} has no text in {text_field!r}; give --text-field")
    texts = [str(fields[text_field]) for fields in records]
    true = [str(fields[label_field]) if label_field in fields else None for fields in records]
    found = {}
    for name, model in (("fp32", folder), ("int8", quantized)):
        classifier = TextClassifier(model)
        batches = [texts[start : start + BATCH_ROWS] for start in range(0, len(texts), BATCH_ROWS)]
        found[name] = [prediction.label for batch in batches for prediction in classifier.predict(batch)]
    lines = [
        f"int8 gives the label of fp32 on {_share(found['fp32'], found['int8']):.2%} of {len(texts):,} texts of {file}"
    ]
    if None not in true:
        lines.append(f"accuracy: fp32 {_share(found['fp32'], true):.4f}, int8 {_share(found['int8'], true):.4f}")
    return "\n".join(lines)


def _share(some: Sequence[str], others: Sequence[str | None]) -> float:
    return sum(a == b for a, b in zip(some, others, strict=True)) / len(others)
