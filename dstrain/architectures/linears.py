"""The linear layers that an architecture's layers have: where adapters may be. Imports no torch."""

from collections.abc import Iterable

from dstrain.architectures.keys import Lora

Linears = dict[str, tuple[str, str, int]]  # by name within the layer: from which size of a shape to which, times that
T5_INNER = {"wi": False, "wi_0": True, "wi_1": True}  # whether it is of a gated MLP
_BERT_LINEARS: Linears = {
    "attention.self.query": ("hidden_size", "hidden_size", 1),
    "attention.self.key": ("hidden_size", "hidden_size", 1),
    "attention.self.value": ("hidden_size", "hidden_size", 1),
    "attention.output.dense": ("hidden_size", "hidden_size", 1),
    "intermediate.dense": ("hidden_size", "intermediate_size", 1),
    "output.dense": ("intermediate_size", "hidden_size", 1),
}
_BART_LINEARS: Linears = {
    **{f"self_attn.{name}_proj": ("hidden_size", "hidden_size", 1) for name in ("q", "k", "v", "out")},
    "fc1": ("hidden_size", "intermediate_size", 1),
    "fc2": ("intermediate_size", "hidden_size", 1),
}
_T5_LINEARS: Linears = {
    **{f"layer.0.SelfAttention.{name}": ("hidden_size", "attention_size", 1) for name in "qkv"},
    "layer.0.SelfAttention.o": ("attention_size", "hidden_size", 1),
}


def _t5_mlp(place: int) -> Linears:
    """One of the two that widen is there in a plain MLP, both others in a gated one."""
    inner = {f"layer.{place}.DenseReluDense.{name}": ("hidden_size", "intermediate_size", 1) for name in T5_INNER}
    return {**inner, f"layer.{place}.DenseReluDense.wo": ("intermediate_size", "hidden_size", 1)}


def _decoder(linears: Linears, cross: Linears) -> Linears:
    """Those of a decoder's layers: with another attention, and an inner size of their own."""
    inner = {"intermediate_size": "decoder_intermediate_size"}
    return {
        name: (inner.get(inputs, inputs), inner.get(outputs, outputs), times)
        for name, (inputs, outputs, times) in (linears | cross).items()
    }


def _renamed(linears: Linears, start: str, new: str) -> Linears:
    return {new + name.removeprefix(start): sizes for name, sizes in linears.items() if name.startswith(start)}


_MODERNBERT_LINEARS: Linears = {
    "attn.Wqkv": ("hidden_size", "hidden_size", 3),
    "attn.Wo": ("hidden_size", "hidden_size", 1),
    "mlp.Wi": ("hidden_size", "intermediate_size", 2),
    "mlp.Wo": ("intermediate_size", "hidden_size", 1),
}
_BART_STACKS = (_BART_LINEARS, _decoder(_BART_LINEARS, _renamed(_BART_LINEARS, "self_attn.", "encoder_attn.")))
# By architecture, of each stack's layers: the encoder's and, where there is one, the decoder's.
STACK_LINEARS: dict[str, tuple[Linears, ...]] = {
    "bert": (_BERT_LINEARS,),
    "roberta": (_BERT_LINEARS,),
    "modernbert": (_MODERNBERT_LINEARS,),
    "bart": _BART_STACKS,
    "marian": _BART_STACKS,
    "t5": (
        _T5_LINEARS | _t5_mlp(1),
        _decoder(_T5_LINEARS | _t5_mlp(2), _renamed(_T5_LINEARS, "layer.0.SelfAttention.", "layer.1.EncDecAttention.")),
    ),
    "encoder-decoder": (
        _BERT_LINEARS,
        _decoder(_BERT_LINEARS, _renamed(_BERT_LINEARS, "attention.", "crossattention.")),
    ),
}
_QUERIES_AND_VALUES = {
    "modernbert": ("Wqkv",),
    "t5": ("q", "v"),
    **dict.fromkeys(("bert", "roberta", "encoder-decoder"), ("query", "value")),
    **dict.fromkeys(("bart", "marian"), ("q_proj", "v_proj")),
}


def lora_targets(architecture: str, lora: Lora) -> tuple[str, ...]:
    """What the names of linear layers with an adapter end in."""
    return lora.target_modules or _QUERIES_AND_VALUES[architecture]


def is_target(name: str | None, targets: Iterable[str]) -> bool:
    """Whether a linear layer of this name within its encoder layer (None: of none) is among the targets."""
    return name is not None and any(name == target or name.endswith(f".{target}") for target in targets)


def linear_names(architecture: str) -> list[str]:
    """The linear layers that any layer of an architecture has, by their names within it."""
    return list(dict.fromkeys(name for linears in STACK_LINEARS[architecture] for name in linears))
