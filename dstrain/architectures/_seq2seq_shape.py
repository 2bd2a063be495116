"""The arithmetic of an encoder with a decoder: parameters and activations without the model. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Seq2SeqShape:
    """Sizes of both stacks. `attention_size` is that of all heads together; `outside` counts what is in no layer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    heads: int
    attention_size: int
    layers: int  # of the encoder
    decoder_layers: int
    intermediate_size: int
    decoder_intermediate_size: int
    gated_mlp: bool
    biased: bool  # matrices and norms
    token_embeddings: int  # how often they are there: once where both stacks and the head share them
    outside: int  # positions, token types, and norms that are in no layer
    pooler: int  # of the encoder: there, and never used
    fixed: int  # what is never trained: the pooler, sines
    head: int  # what the head has beside the token embeddings
    dropout: bool
    attention_dropout: bool

    @property
    def token_types(self) -> int:
        """Kinds of token that the model tells apart: a source is one text."""
        return 0

    @property
    def layer_counts(self) -> tuple[int, ...]:
        """How many layers each stack has: the encoder and the decoder."""
        return (self.layers, self.decoder_layers)

    def has_linear(self, name: str) -> bool:
        """Whether layers of this shape have a linear layer of that name, of those that the architecture may have."""
        return True

    # ------------------------------------------------------------ parameters

    def parameters(self, objective: str, labels: int = 2) -> dict[str, int]:
        """The exact number of parameters by part; what is tied to the token embeddings is counted there.

        Both arguments are those of an encoder's shape; here the head is the same whatever the task.
        """
        attention = self.attention_parameters
        norm = self.hidden_size * (2 if self.biased else 1)
        encoder_layer = attention + self.mlp_parameters(self.intermediate_size) + 2 * norm
        decoder_layer = 2 * attention + self.mlp_parameters(self.decoder_intermediate_size) + 3 * norm
        counts = {
            "token embeddings": self.token_embeddings * self.vocab_size * self.hidden_size,
            "positions, types and outer norms": self.outside,
            "encoder layers": self.layers * encoder_layer,
            "decoder layers": self.decoder_layers * decoder_layer,
        }
        counts |= {"pooler (unused)": self.pooler} if self.pooler else {}
        return counts | ({"prediction head": self.head} if self.head else {})

    @property
    def top_parameters(self) -> int:
        """Parameters after the last layer, which are trained beside adapters: the head's own."""
        return self.head

    @property
    def attention_parameters(self) -> int:
        """Parameters of one attention: query, key, value and output."""
        biases = 3 * self.attention_size + self.hidden_size if self.biased else 0
        return 4 * self.hidden_size * self.attention_size + biases

    def mlp_parameters(self, inner: int) -> int:
        """Parameters of one layer's MLP of `inner` features."""
        matrices = 3 if self.gated_mlp else 2
        return matrices * self.hidden_size * inner + (inner + self.hidden_size if self.biased else 0)

    # ------------------------------------------------------------ activations

    def stack_elements(self, inner: int) -> int:
        """Elements per token that self attention and an MLP of `inner` features keep for the backward pass.

        4h + 4a + 2i: norms' inputs and outputs; query, key, value and attention's output of a features; what is around
        the MLP's activation.
        """
        features = (9 if self.gated_mlp else 2) * inner
        return 4 * self.hidden_size + 4 * self.attention_size + features

    def dropped_elements(self, inner: int) -> int:
        """Elements per token and layer that pass a dropout, in self attention and an MLP of `inner` features."""
        return 2 * self.hidden_size if self.dropout else 0

    def shared_elements(self, source: int, target: int) -> int:
        """Elements of a row of what is made once and used by all layers of a stack."""
        return 0
