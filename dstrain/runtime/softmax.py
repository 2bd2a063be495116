"""The gradient of a softmax from its output alone."""

import torch
from torch import Tensor


def softmax_backward(gradient: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the input of a softmax over the last dimension, as torch's own backward pass has it.

    Torch has no public name for the kernel. Autograd by itself would have to keep the softmax's input, in fp32.

    Args:
        gradient: of the output.
        output: of the softmax.
        dtype: of the result.
    """
    return torch._softmax_backward_data(gradient, output, -1, dtype)
