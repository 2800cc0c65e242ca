"""Local SGD with an outer optimiser as Algorithm 1 of DiLoCo and of SlowMo has it, by the entry."""

import numpy as np


def gradient(weights, inputs, targets):
    """Of half the mean squared error of a linear model."""
    total = np.zeros(len(weights))
    for x, y in zip(inputs, targets, strict=True):
        error = -y
        for entry, weight in zip(x, weights, strict=True):
            error += entry * weight
        total += error * np.asarray(x)
    return total / len(inputs)


class LocalOptimizer:
    """SGD with momentum; one for each worker, and nobody else sees its state."""

    def __init__(self, size, rate, momentum):
        self.rate, self.momentum, self.buffer = rate, momentum, np.zeros(size)

    def step(self, weights, slope):
        self.buffer = self.momentum * self.buffer + slope
        return weights - self.rate * self.buffer


def train(start, batches, every, local, outer):
    """Weights of every worker after every step.

    start: weights. batches: by step, by worker, (inputs, targets). local: (rate, momentum). outer:
    (rate, momentum, nesterov).
    """
    workers = len(batches[0])
    weights = [start.copy() for _ in range(workers)]
    optimizers = [LocalOptimizer(len(start), *local) for _ in range(workers)]
    theta, velocity, history = start.copy(), np.zeros(len(start)), []
    rate, momentum, nesterov = outer
    for t, batch in enumerate(batches, start=1):
        for i in range(workers):
            weights[i] = optimizers[i].step(weights[i], gradient(weights[i], *batch[i]))
        if t % every == 0:
            for k in range(len(theta)):
                delta = 0.0
                for i in range(workers):
                    delta += theta[k] - weights[i][k]
                delta /= workers
                velocity[k] = momentum * velocity[k] + delta
                move = delta + momentum * velocity[k] if nesterov else velocity[k]
                theta[k] -= rate * move
            weights = [theta.copy() for _ in range(workers)]
        history.append([w.copy() for w in weights])
    return history
