"""What a layer's attention costs on a CPU, forward and backward, by implementation and row length.

    python tools/bench/attention.py                 # 4,096 tokens, 12 heads of 64, two documents a row, one thread

Milliseconds of CPU time, medians; CPU time is steadier than wall time where a machine is shared.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dstrain.model.attention import matmul_attention
from dstrain.model.encoder import additive_mask, document_mask
from dstrain.runtime.runtime import keep_freed_memory

TOKENS, WIDTH = 4096, 64  # in a micro-batch; of a head
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).contiguous()


def matmul(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return matmul_attention(nn.Identity(), query, key, value, mask)[0]


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """As in Transformers: scores in the precision of the model."""
    scores = torch.matmul(query, key.transpose(2, 3)) * WIDTH**-0.5 + mask
    return torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2).contiguous()


CONTESTANTS: dict[str, Attention] = {"sdpa": sdpa, "matmul": matmul, "eager": eager}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 1024])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for precision in (torch.bfloat16, torch.float32):
        for length in args.lengths:
            spent = measure(precision, length, args.heads, args.repeats)
            figures = "  ".join(f"{name} {milliseconds:6.1f}" for name, milliseconds in spent.items())
            print(f"{str(precision).removeprefix('torch.'):9} rows of {length:5,}: {figures}", flush=True)


def measure(precision: torch.dtype, length: int, heads: int, repeats: int) -> dict[str, float]:
    rows = TOKENS // length
    inputs = [torch.randn(rows, length, heads, WIDTH, dtype=precision, requires_grad=True) for _ in range(3)]
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs)
    gradient = torch.randn(rows, length, heads, WIDTH, dtype=precision)
    mask = additive_mask(document_mask(torch.arange(length).remainder(length // 2).expand(rows, -1)), precision)
    spent: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(repeats + 1):
        for name, attention in CONTESTANTS.items():
            started = time.process_time()
            attention(query, key, value, mask).backward(gradient)
            spent[name].append(1000 * (time.process_time() - started))
    return {name: statistics.median(times[1:]) for name, times in spent.items()}  # the first warms up


if __name__ == "__main__":
    main()
