"""The arithmetic of an encoder: its parameters, FLOPs and activations without the model. Imports no torch.

The methods count an encoder of BERT's kind. An architecture that differs has a subclass which says in what.
"""

from dataclasses import dataclass

# Objectives whose heads see every token's hidden state: no pooler comes before them.
TOKEN_OBJECTIVES = ("token_classification", "question_answering", "sentence_extraction")


@dataclass(frozen=True)
class EncoderShape:
    """An encoder's sizes. `*_bias` say whether the matrices and norms of that part have one."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    learned_positions: int  # 0 where positions are rotary
    token_types: int
    gated_mlp: bool
    attention_bias: bool
    mlp_bias: bool
    norm_bias: bool
    decoder_bias: bool
    dropout: bool  # of hidden states, in training
    attention_dropout: bool

    @property
    def layer_counts(self) -> tuple[int, ...]:
        """How many layers each stack has: an encoder has one."""
        return (self.layers,)

    def has_linear(self, name: str) -> bool:
        """Whether layers of this shape have a linear layer of that name, of those that the architecture may have."""
        return True

    # ------------------------------------------------------------ parameters

    @property
    def norm(self) -> int:
        """Parameters of one norm."""
        return self.hidden_size * (2 if self.norm_bias else 1)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: attention, MLP and two norms."""
        hidden, inner = self.hidden_size, self.intermediate_size
        up = 2 * inner if self.gated_mlp else inner
        attention = 4 * hidden * hidden + (4 * hidden if self.attention_bias else 0)
        mlp = hidden * up + inner * hidden + (up + hidden if self.mlp_bias else 0)
        return attention + mlp + 2 * self.norm

    @property
    def stack_parameters(self) -> int:
        """Parameters of all layers."""
        return self.layers * self.layer_parameters

    @property
    def outer_parameters(self) -> int:
        """Parameters below the head that are in no layer and no embedding of tokens, positions and types: norms."""
        return self.norm

    @property
    def matrix_parameters(self) -> int:
        """A layer's parameters that are in matrices: without biases and norms."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return 4 * hidden * hidden + (3 if self.gated_mlp else 2) * hidden * inner

    def transform_parameters(self, objective: str) -> int:
        """Parameters of what a head has before its last matrix: a masked-LM head's transform, or a pooler."""
        hidden = self.hidden_size
        if objective in TOKEN_OBJECTIVES:
            return 0
        masked = objective in ("masked_lm", "paired_masked_lm")
        return hidden * hidden + hidden + (self.norm if masked else 0)

    def parameters(self, objective: str, labels: int = 2) -> dict[str, int]:
        """The exact number of parameters by part; the decoder is tied to the token embeddings and counted there.

        Args:
            objective: the recipe's, which decides the head.
            labels: outputs of a classifier.
        """
        hidden = self.hidden_size
        counts = {
            "token embeddings": self.vocab_size * hidden,
            "position and type embeddings": (self.learned_positions + self.token_types) * hidden,
            "encoder layers": self.stack_parameters,
            "norms outside layers": self.outer_parameters,
        }
        transform = self.transform_parameters(objective)
        if objective in ("masked_lm", "paired_masked_lm"):
            counts["prediction head"] = transform + (self.vocab_size if self.decoder_bias else 0)
            if objective == "paired_masked_lm":
                counts["pair head"] = hidden * hidden + hidden + 2 * (hidden + 1)  # BERT's pooler comes before it
        elif objective != "retrieval":
            counts["classification head"] = transform + labels * (hidden + 1)
        return counts

    def frozen_parameters(self, layers: int) -> int:
        """Parameters of the embeddings, of what is frozen with them, and of the first `layers` layers."""
        embeddings = (self.vocab_size + self.learned_positions + self.token_types) * self.hidden_size
        return embeddings + self.outer_parameters + layers * self.layer_parameters

    # ------------------------------------------------------------ FLOPs

    def attention_flops(self, length: int) -> float:
        """Operations of one layer's attention per token of a row of `length`, beside the layer's own matrices."""
        return 4 * length * self.hidden_size

    # ------------------------------------------------------------ activations

    @property
    def layer_elements(self) -> int:
        """Elements per token that a layer keeps for the backward pass, but for attention's scores and for dropout.

        8h + 2i: the layer's input; query, key, value; attention's output; first norm's input and output; second norm's
        input; the activation function's input and output.
        """
        return 8 * self.hidden_size + 2 * self.intermediate_size

    @property
    def dropped_elements(self) -> int:
        """Elements per token and layer that pass a dropout."""
        return 2 * self.hidden_size if self.dropout else 0

    @property
    def unrotated_elements(self) -> int:
        """Elements per token and layer that a fused attention keeps from before positions are rotated."""
        return 0

    def score_bytes(self, kernel: str, element: int, dropped: int) -> int:
        """Bytes for each pair of tokens and head that an attention which is not fused keeps of its scores.

        Args:
            kernel: `eager` or `matmul`.
            element: bytes of an element.
            dropped: bytes that a dropout keeps of one.
        """
        return 2 * element + dropped if self.attention_dropout else element

    def shared_elements(self, length: int) -> int:
        """Elements per token of what is made once and used by all layers: the mask."""
        return length
