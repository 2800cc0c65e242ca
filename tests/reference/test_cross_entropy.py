"""Cross entropy and its gradient, written out number by number in NumPy, over ten steps of SGD."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sterna.objectives import CrossEntropy
from sterna.randomness import generator, isolated
from sterna.seams import Batch


def literal(weights, inputs, targets, epsilon):
    """Loss of each example and the gradient of their mean by the weights (features x classes)."""
    features, classes = weights.shape
    losses, gradient = [], np.zeros_like(weights)
    predictions = [(n, t) for n in range(len(targets)) for t in range(len(targets[n]))]
    totals = np.zeros(len(targets))
    for n, t in predictions:
        z = [sum(inputs[n][t][i] * weights[i][c] for i in range(features)) for c in range(classes)]
        normaliser = sum(math.exp(value) for value in z)
        p = [math.exp(value) / normaliser for value in z]
        q = [
            (1 - epsilon) * (1 if c == targets[n][t] else 0) + epsilon / classes
            for c in range(classes)
        ]
        totals[n] += -sum(q[c] * math.log(p[c]) for c in range(classes))
        for i in range(features):
            for c in range(classes):
                share = 1 / len(targets[n]) / len(targets)
                gradient[i][c] += share * (p[c] - q[c]) * inputs[n][t][i]
    losses = [totals[n] / len(targets[n]) for n in range(len(targets))]
    return np.array(losses), gradient


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("time", [None, 3])
def test_ten_steps(epsilon, time):
    rng = generator(0, "reference")
    shape = (4,) if time is None else (4, time)
    inputs = torch.randn(*shape, 5, generator=rng, dtype=torch.float64)
    targets = torch.randint(6, shape, generator=rng)
    with isolated(0, "model"):
        model = nn.Linear(5, 6, bias=False, dtype=torch.float64)
    weights = torch.randn(5, 6, generator=rng, dtype=torch.float64).numpy()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weights).T)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    objective = CrossEntropy(label_smoothing=epsilon)
    batch = Batch(inputs, targets, torch.arange(4))
    plain_inputs = inputs.reshape(4, -1, 5).tolist()
    plain_targets = targets.reshape(4, -1).tolist()
    for _ in range(10):
        loss = objective(model, batch, rng)
        losses, gradient = literal(weights, plain_inputs, plain_targets, epsilon)
        np.testing.assert_allclose(loss.per_example.detach().numpy(), losses, rtol=1e-10)
        assert loss.penalty.item() == 0
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        weights = weights - 0.5 * gradient
        np.testing.assert_allclose(model.weight.detach().numpy().T, weights, rtol=1e-9, atol=1e-12)
