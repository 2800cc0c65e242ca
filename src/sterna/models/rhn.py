"""A language model of words: embedding, recurrent highway network, linear decoder.

From one word to the next the state passes through L highway layers. With x_t the embedding of word t,
s_t^0 = s_{t-1}^L, and for the layers l = 1 ... L (eq. 6 to 9 of the paper)::

    h_t^l = tanh([l = 1] W_H x_t + R_H^l s_t^{l-1} + b_H^l)
    g_t^l = sigmoid([l = 1] W_T x_t + R_T^l s_t^{l-1} + b_T^l)
    s_t^l = h_t^l * g_t^l + s_t^{l-1} * (1 - g_t^l)
    z_t   = V s_t^L + b

The sums over s_t^{l-1} keep unit k of every layer in one line: it is removed from all layers, embedding
columns and decoder together, or from none.

Reference: J. G. Zilly, R. K. Srivastava, J. Koutnik, J. Schmidhuber: Recurrent highway networks. ICML
2017, arXiv:1607.03474.

Differs from the paper: the carry gate is 1 - g as in its experiments; no dropout; embedding and decoder
may share their weights (``tied``), as in its best models.

Cost per step: a word takes 2 h (e + L h) multiply-adds, and h times the vocabulary in the decoder. The
layers follow one another in time: L small products per word, one after the other.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

Words = Int64[Tensor, "batch positions"]
Logits = Float[Tensor, "batch positions vocabulary"]


class RHNLanguageModel(nn.Module):
    """Logits of the next word at every position.

    Args:
        vocabulary: number of words.
        hidden: units of the state, and size of the embedding.
        depth: L, highway layers from one word to the next.
        tied: whether the decoder's weights are the embedding's.
        spread: all weights start uniform in [-spread, spread].
        transform_bias: where the biases of the gates g start; below 0 the state is mostly kept.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> model = RHNLanguageModel(vocabulary=10, hidden=4, depth=3)
        >>> model(torch.zeros(2, 7, dtype=torch.int64)).shape
        torch.Size([2, 7, 10])
    """

    def __init__(
        self,
        vocabulary: int = 10_000,
        hidden: int = 200,
        depth: int = 4,
        tied: bool = False,
        spread: float = 0.04,
        transform_bias: float = -2.0,
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("hidden", hidden), ("depth", depth)):
            if value < 1:
                raise ValueError(f"RHNLanguageModel: {name} must be at least 1; got {value}.")
        if not 0 < spread < float("inf"):
            raise ValueError(f"RHNLanguageModel: spread must be above 0, finite; got {spread}.")
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.into_h = nn.Linear(hidden, hidden, bias=False)
        self.into_gate = nn.Linear(hidden, hidden, bias=False)
        self.h = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.gate = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.decoder = nn.Linear(hidden, vocabulary)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -spread, spread)
        for layer in self.gate:
            nn.init.constant_(layer.bias, transform_bias)  # type: ignore[arg-type]
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, words: Words) -> Logits:
        """Logits, shape (batch, positions, vocabulary), with a state that starts at zero."""
        x = self.embedding(words)
        input_h, input_gate = self.into_h(x), self.into_gate(x)
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(words.shape[1]):
            for layer, (to_h, to_gate) in enumerate(zip(self.h, self.gate, strict=True)):
                h, gate = to_h(state), to_gate(state)
                if layer == 0:
                    h, gate = h + input_h[:, t], gate + input_gate[:, t]
                state = state + torch.sigmoid(gate) * (torch.tanh(h) - state)
            states.append(state)
        out: Tensor = self.decoder(torch.stack(states, dim=1))
        return out
