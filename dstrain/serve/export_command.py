"""`dstrain export`: from what was trained to what is used, as a Transformers folder or as ONNX."""

from argparse import Namespace
from pathlib import Path

from dstrain.convert.commands import export_command as export_checkpoint
from dstrain.errors import EXIT_DONE, UserError
from dstrain.predict.load_predictor import load_predictor
from dstrain.predict.loaded import GRAPH, transformers_folder


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
    from dstrain.predict.onnx import export_onnx
    from dstrain.serve.agreement import agreement, inputs_of

    out = Path(args.out) if args.out is not None else given.with_name(f"{given.name}-onnx") if plain else given / "onnx"
    folder = transformers_folder(given)
    items = inputs_of(load_predictor(folder), args.measure, args.text_field) if args.int8 else []
    difference = export_onnx(folder, out, int8=args.int8)
    size = (out / GRAPH).stat().st_size / 1e6
    print(
        f"{folder} → {out} ({size:,.0f} MB)\noutputs of the graph in fp32 and of the model differ by {difference:.1e}"
    )
    if args.int8:
        before, after = load_predictor(folder), load_predictor(out)
        label_field = args.label_field or getattr(before, "label_field", "label")
        print("\n".join(agreement(before, after, items, label_field)))
    return EXIT_DONE
