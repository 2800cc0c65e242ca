"""TernGrad as the paper's Algorithm 1 has it, one worker, one tensor, one entry at a time."""

import math

import numpy as np


def clip(gradient, factor):
    entries = [float(entry) for entry in np.ravel(gradient)]
    if factor is None or len(set(entries)) <= 1:
        return entries
    mean = math.fsum(entries) / len(entries)
    sigma = math.sqrt(math.fsum((entry - mean) ** 2 for entry in entries) / len(entries))
    clipped = []
    for entry in entries:
        if entry > factor * sigma:
            clipped.append(factor * sigma)
        elif entry < -factor * sigma:
            clipped.append(-factor * sigma)
        else:
            clipped.append(entry)
    return clipped


def scaler(clipped):
    return max((abs(entry) for entry in clipped), default=0.0)


def ternarise(clipped, scale, uniforms):
    codes = []
    for entry, u in zip(clipped, uniforms, strict=True):
        if scale == 0:
            codes.append(0)
        elif u < abs(entry) / scale:
            codes.append(1 if entry > 0 else -1)
        else:
            codes.append(0)
    return codes


def step(gradients, uniforms, factor, share):
    """All workers' step.

    gradients: by worker, by name, an array. uniforms: the same, flat. Returns scalers and codes by
    worker and name, and by name the average that every worker applies.
    """
    workers, names = range(len(gradients)), list(gradients[0])
    clipped = [{name: clip(gradients[w][name], factor) for name in names} for w in workers]
    scalers = [{name: scaler(clipped[w][name]) for name in names} for w in workers]
    if share:
        largest = {name: max(scalers[w][name] for w in workers) for name in names}
        scalers = [dict(largest) for _ in workers]
    codes = [
        {name: ternarise(clipped[w][name], scalers[w][name], uniforms[w][name]) for name in names}
        for w in workers
    ]
    average = {}
    for name in names:
        total = np.zeros(np.size(gradients[0][name]))
        for w in workers:
            total += scalers[w][name] * np.array(codes[w][name], dtype=float)
        average[name] = (total / len(gradients)).reshape(np.shape(gradients[0][name]))
    return scalers, codes, average
