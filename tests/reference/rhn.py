"""A recurrent highway network as the paper writes it: one word, one layer, one unit at a time."""

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def states(words, embedding, input_h, input_gate, layers):
    """s_t^L of every word; ``layers``: (R_H, b_H, R_T, b_T) of each layer, weights as rows of outputs."""
    size = embedding.shape[1]
    state, found = np.zeros(size), []
    for word in words:
        x = embedding[word]
        for depth, (r_h, b_h, r_t, b_t) in enumerate(layers):
            new = np.zeros(size)
            for k in range(size):
                h, gate = r_h[k] @ state + b_h[k], r_t[k] @ state + b_t[k]
                if depth == 0:
                    h, gate = h + input_h[k] @ x, gate + input_gate[k] @ x
                carry = 1.0 - sigmoid(gate)
                new[k] = np.tanh(h) * sigmoid(gate) + state[k] * carry
            state = new
        found.append(state)
    return np.stack(found)
