"""Slim-DP with a parameter server: workers push and pull single entries, by the entry."""

import numpy as np


def ranking(weights, update, c):
    """Entries from the most to the least significant."""
    mean_weight = sum(abs(w) for w in weights) / len(weights)
    mean_update = sum(abs(u) for u in update) / len(update)
    scores = []
    for w, u in zip(weights, update, strict=True):
        score = abs(w) / mean_weight if mean_weight else 0.0
        score += c * abs(u) / mean_update if mean_update else 0.0
        scores.append(score)
    return sorted(range(len(scores)), key=lambda k: -scores[k])


class Server:
    def __init__(self, start, num_core, refresh_every, c):
        self.weights, self.since = start.copy(), np.zeros(len(start))
        self.num_core, self.refresh_every, self.c = num_core, refresh_every, c
        self.round, self.core = 0, []

    def begin(self):
        if self.round % self.refresh_every == 0:
            self.core = ranking(self.weights, self.since, self.c)[: self.num_core]
            self.since[:] = 0
        self.round += 1
        return set(self.core)

    def merge(self, pushed):
        """``pushed``: by worker, entry to residual."""
        for k in set().union(*pushed):
            total = sum(push.get(k, 0.0) for push in pushed) / len(pushed)
            self.weights[k] += total
            self.since[k] += total


def train(start, gradients, every, rate, server, explore, num_explorer):
    """Weights of server and workers after every step.

    gradients: by step, by worker, a function of the weights. explore: (round, residual by worker,
    entries outside the core) to the order in which each worker takes those entries.
    """
    workers = [start.copy() for _ in gradients[0]]
    history = []
    for t, slopes in enumerate(gradients, start=1):
        for i, slope in enumerate(slopes):
            workers[i] = workers[i] - rate * slope(workers[i])
        if t % every == 0:
            core = server.begin()
            outside = [k for k in range(len(start)) if k not in core]
            residuals = [w - server.weights for w in workers]
            orders = explore(server.round - 1, residuals, outside)
            chosen = [core | set(order[:num_explorer]) for order in orders]
            pushed = [{k: r[k] for k in mine} for r, mine in zip(residuals, chosen, strict=True)]
            server.merge(pushed)
            for w, mine in zip(workers, chosen, strict=True):
                for k in mine:
                    w[k] = server.weights[k]
        history.append((server.weights.copy(), [w.copy() for w in workers]))
    return history


def best_responses(turn, residuals, outside):
    """Each worker takes first what it alone knows most of."""
    return [sorted(outside, key=lambda k, r=r: -abs(r[k])) for r in residuals]
