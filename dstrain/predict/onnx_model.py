"""A graph that onnxruntime runs, as the model of a Transformers folder."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch
from torch import Tensor
from transformers import AutoConfig

from dstrain.errors import UserError


class OnnxModel:
    """A graph behind the interface of a Transformers model: `model(input_ids=…, attention_mask=…).logits`."""

    def __init__(self, folder: Path, graph: Path) -> None:
        """`folder` has the model's config; `graph` is the file."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()  # as many as a model of torch has here
        self.config = AutoConfig.from_pretrained(folder, local_files_only=True)
        try:
            self._session = onnxruntime.InferenceSession(str(graph), options)
        except Exception as error:  # onnxruntime has a class for each of its codes, and none for all
            raise UserError(f"{graph} cannot be loaded: {error}; export it again with --onnx") from error
        self._inputs = [given.name for given in self._session.get_inputs()]
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, **inputs: Tensor) -> Any:
        """The outputs by name, as tensors."""
        nothing = torch.zeros_like(inputs["input_ids"])  # token types of a single text
        given = {name: inputs.get(name, nothing).numpy() for name in self._inputs}
        values = self._session.run(self._outputs, given)
        return SimpleNamespace(
            **{name: torch.from_numpy(value) for name, value in zip(self._outputs, values, strict=True)}
        )
