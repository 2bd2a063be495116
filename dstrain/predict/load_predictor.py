"""What a folder predicts: the model of a Transformers folder, or the search of an index."""

from pathlib import Path

from dstrain.predict.predictors import Predictor, model_predictor
from dstrain.predict.search import INDEX, Searcher


def load_predictor(folder: Path, precision: str = "fp32") -> Predictor:
    """The model of a Transformers folder, or the search of an index. Raises UserError where nothing in it predicts.

    Args:
        folder: of the model, or one that `dstrain index` wrote.
        precision: of weights and arithmetic: fp32, or bf16, which is faster where the processor has it, and less exact.
    """
    return Searcher.open(folder) if (folder / INDEX).is_file() else model_predictor(folder, precision)
