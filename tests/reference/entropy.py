"""Quantising and entropy coding by the letter: entry by entry, with whole numbers of any length.

The coder is the textbook's: a state x of any length takes up symbol v of frequency f(v) out of M by
x -> (x // f(v)) M + c(v) + x % f(v), where c(v) adds up the frequencies before v.
"""

import math
from collections import Counter

import numpy as np


def root_mean_square(values):
    return math.sqrt(math.fsum(float(v) ** 2 for v in values) / len(values)) if len(values) else 0.0


def relative_step(values, step):
    """So many root mean squares, and no more than the largest magnitude."""
    return min(step * root_mean_square(values), max((abs(float(v)) for v in values), default=0.0))


def quantise(values, step):
    """Code, or None beyond 127 steps; and what arrives."""
    codes, arrived = [], []
    for v in values:
        q = int(np.rint(np.float32(v) / np.float32(step))) if step else 0
        codes.append(q if abs(q) <= 127 else None)
        arrived.append(np.float32(q) * np.float32(step) if abs(q) <= 127 else np.float32(v))
    return codes, arrived


def entropy_bits(symbols):
    """Shannon's, of all symbols together."""
    counts = Counter(symbols)
    return sum(n * math.log2(len(symbols) / n) for n in counts.values())


class Coder:
    def __init__(self, symbols):
        self.frequency = Counter(symbols)
        self.total = len(symbols)
        self.before, below = {}, 0
        for v in sorted(self.frequency):
            self.before[v] = below
            below += self.frequency[v]

    def encode(self, symbols):
        x = 1
        for v in reversed(symbols):
            f = self.frequency[v]
            x = (x // f) * self.total + self.before[v] + x % f
        return x

    def decode(self, x, number):
        symbols = []
        for _ in range(number):
            place = x % self.total
            v = max((s for s in self.before if self.before[s] <= place), key=self.before.get)
            symbols.append(v)
            x = self.frequency[v] * (x // self.total) + place - self.before[v]
        return symbols
