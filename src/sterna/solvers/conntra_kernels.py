"""What the loss becomes if one weight changes, without running the network again.

`Searched` is a parameter of a `Chain`: codes and grid. `Evaluation` holds every layer's values on one
batch, by unit (unit, example), so that a change of weight (j, i) of layer l reads and writes whole rows:

    z' = z_j + (v - w_ji) h_i,   d = f(z') - f(z_j)                                    (1)

d is pushed through the layers above. One layer below the logits (and at the logits, where d is the change
itself) that takes no matrix product: logit k moves by w_k d, and the w_k of a finite set take few values
u, so with E_k = exp(logit_k - max) and the sums of E over the k of one value, kept by unit,

    loss' = log sum_u exp(u d) sum_{k: w_k = u} E_k - (logit_y - max) - w_y d          (2)

costs one exponential for each value that is not 0, not one for each class. Cross entropy is convex in
the logits: a change whose slope at d = 0 is not negative cannot lower it, and (2) is left out.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, fx, nn

from sterna.solvers.conntra_chain import Chain, Layer
from sterna.value_sets import Grids, Sets, ValueSet, choose, nearest

Rows = Float[Tensor, "units batch"]
Candidates = Float[Tensor, " candidates"]
Targets = Int64[Tensor, " batch"]

_FAR = 100.0  # exponents up to here keep (2) exact to the last digits in float64


@dataclass
class Searched:
    """One searched parameter: the layer it is of, its codes, flat, and its grid in float64.

    ``others[c]`` are the codes beside c, ``moves[c]`` what the weight grows by to get there.
    """

    name: str
    layer: int
    is_bias: bool
    codes: list[int]
    grid: Tensor
    others: list[list[int]] = field(init=False)
    moves: list[Tensor] = field(init=False)
    values: list[float] = field(init=False)

    def __post_init__(self) -> None:
        num = len(self.grid)
        self.others = [[v for v in range(num) if v != c] for c in range(num)]
        self.values = self.grid.tolist()
        self.moves = [self.grid[o] - self.grid[c] for c, o in enumerate(self.others)]

    @classmethod
    def all_of(
        cls, chain: Chain, model: nn.Module, sets: Sets, grids: Grids | None, who: str
    ) -> tuple[list["Searched"], dict[str, str]]:
        """Every parameter that is to be searched, rounded; and the weights that cannot be, with the reason.

        Raises:
            ValueError: a named one cannot be searched, or none can; one of them is not finite.
        """
        named = dict(model.named_parameters())
        unknown = set(grids or ()) - set(named)
        if unknown or grids == {}:
            raise ValueError(
                f"{who}: grids must name parameters of the model, at least one; got "
                f"{sorted(unknown)[:4] or 'none'}, and the model has {list(named)[:6]}. Give the grids "
                "that were reported for this model."
            )
        places = _places(chain)
        chosen: Mapping[str, ValueSet | tuple[float, ...]] = grids or choose(sets, named, who)
        left = {name: why for name in chosen if (why := _unfit(name, places, chain, model))}
        if left and (grids is not None or not isinstance(sets, ValueSet)):
            name, why = next(iter(left.items()))
            raise ValueError(
                f"{who}: every searched parameter must be the weight or bias of one nn.Linear, "
                f"with only elementwise functions from there to the logits; {name!r} {why}. "
                f'Name those that are: sets=(("{chain.layers[-1].name}.weight", ValueSet()),).'
            )
        if len(left) == len(chosen):
            name, why = list(left.items())[-1]
            raise ValueError(f"{who}: no weight can be searched; the last, {name!r}, {why}.")
        found = []
        for name, values in chosen.items():
            if name in left:
                continue
            x = named[name].detach()
            if isinstance(values, ValueSet):
                codes, grid = values.round(x, name)
            else:
                grid = x.new_tensor(sorted(values))
                codes = nearest(x, grid)
            found.append(cls(name, *places[name], codes.flatten().tolist(), grid.double()))
        return found, left

    def place(self, position: int, layers: list[Layer]) -> tuple[int, int, int]:
        """Layer, row and column of a flat position; column -1 for a bias."""
        if self.is_bias:
            return self.layer, position, -1
        return self.layer, *divmod(position, layers[self.layer].weight.shape[1])

    def write(self, target: Tensor) -> None:
        """Write the values into a tensor of the parameter's shape."""
        codes = torch.tensor(self.codes, device=self.grid.device)
        target.copy_(self.grid[codes].view_as(target))

    def write_layer(self, layers: list[Layer]) -> None:
        """Write the values into the chain's own copy."""
        target = layers[self.layer].bias if self.is_bias else layers[self.layer].weight
        if target is not None:
            self.write(target)


@dataclass
class Evaluation:
    """The values of every layer on one batch, and the loss: the mean cross entropy of the batch."""

    layers: list[Layer]
    targets: Targets
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    loss: float = 0.0

    @classmethod
    def on(cls, layers: list[Layer], features: Tensor, targets: Targets) -> "Evaluation":
        """All values from ``features``, shape (example, number)."""
        found = cls(layers, targets, [features.T.contiguous()])
        found.refresh()
        return found

    def refresh(self, first: int = 0) -> None:
        """Compute the values of layer ``first`` and of all above anew."""
        del self.inputs[first + 1 :], self.outputs[first:]
        for layer in self.layers[first:]:
            z = layer.weight @ self.inputs[-1]
            self.outputs.append(z if layer.bias is None else z.add_(layer.bias[:, None]))
            if len(self.outputs) < len(self.layers):
                self.inputs.append(layer.function(z))
        self._finish()

    def _finish(self) -> None:
        logits = self.outputs[-1]
        shifted = logits - logits.amax(0)
        self._right = shifted.gather(0, self.targets[None])[0]
        self._exp = shifted.exp_()
        self._sum = self._exp.sum(0)
        self.loss = float((self._sum.log() - self._right).mean())

    def losses(self, layer: int, unit: int, source: int, changes: Candidates) -> Tensor:
        """The loss if weight (unit, source) of a layer grew by each of ``changes``.

        Args:
            layer: position in the chain.
            unit: row of the weight.
            source: column of the weight; -1 for the bias.
            changes: what is added to the weight.

        Returns:
            Shape (candidates,); infinite for what cannot be lower than the loss as it is.
        """
        move = changes[:, None]
        if source >= 0:
            move = move * self.inputs[layer][source]
        last = len(self.layers) - 1
        if layer < last:
            function = self.layers[layer].function
            move = function(self.outputs[layer][unit] + move) - self.inputs[layer + 1][unit]
            if layer + 1 < last:
                return self._through(layer + 1, unit, move)
            weights = self.layers[last].weight[:, unit]
        else:
            weights = torch.zeros(len(self._exp), dtype=move.dtype, device=move.device)
            weights[unit] = 1
        return self._near(weights, move.expand(-1, len(self.targets)))

    def _near(self, weights: Tensor, move: Tensor) -> Tensor:
        """(2), where logit k moves by ``weights[k] * move``."""
        values, where = torch.unique(weights, return_inverse=True)
        share = torch.zeros(len(values), len(weights), dtype=weights.dtype, device=weights.device)
        share.scatter_(0, where[None], 1.0)
        share = share @ self._exp
        right = weights[self.targets]
        slope = move @ (values @ share / self._sum - right)
        found = torch.full_like(slope, torch.inf)
        alive = slope < 0
        if not bool(alive.any()):
            return found
        move = move[alive]
        if float(move.abs().max()) * float(values.abs().max()) > _FAR:
            logits = self.outputs[-1] + weights[:, None] * move[:, None]
            found[alive] = self._cross_entropy(logits)
            return found
        total = torch.zeros_like(move)
        for value, part in zip(values.tolist(), share, strict=True):
            if value == 0:
                total += part
            else:
                total += (move * value).exp_().mul_(part)
        total.log_().addcmul_(move, right, value=-1)
        found[alive] = total.mean(1) - self._right.mean()
        return found

    def _through(self, layer: int, unit: int, move: Tensor) -> Tensor:
        """The loss where input ``unit`` of a layer moves; shape of ``move``: (candidates, batch)."""
        z = self.outputs[layer] + self.layers[layer].weight[:, unit, None] * move[:, None]
        for k in range(layer, len(self.layers) - 1):
            above = self.layers[k + 1]
            z = above.weight @ self.layers[k].function(z)
            if above.bias is not None:
                z += above.bias[:, None]
        return self._cross_entropy(z)

    def _cross_entropy(self, logits: Tensor) -> Tensor:
        """Mean over the batch; shape of ``logits``: (candidates, classes, batch)."""
        right = logits.gather(1, self.targets.expand(len(logits), 1, -1))[:, 0]
        return (logits.logsumexp(1) - right).mean(1)

    def change(self, layer: int, unit: int, source: int, value: float) -> None:
        """Give weight (unit, source) of a layer its new value; bring what depends on it up to date."""
        here = self.layers[layer]
        row = here.bias if here.bias is not None and source < 0 else here.weight[unit]
        place = unit if source < 0 else source
        move = value - float(row[place])
        row[place] = value
        self.outputs[layer][unit] += move if source < 0 else move * self.inputs[layer][source]
        if layer + 1 < len(self.layers):
            new = here.function(self.outputs[layer][unit])
            difference = new - self.inputs[layer + 1][unit]
            self.inputs[layer + 1][unit] = new
            column = self.layers[layer + 1].weight[:, unit, None]
            self.outputs[layer + 1].addcmul_(column, difference)
            if layer + 2 < len(self.layers):
                self.inputs[layer + 2] = self.layers[layer + 1].function(self.outputs[layer + 1])
                self.refresh(layer + 2)
                return
        self._finish()


def _places(chain: Chain) -> dict[str, tuple[int, bool]]:
    """By parameter, the layer it is of and whether it is a bias."""
    places = {}
    for k, layer in enumerate(chain.layers):
        prefix = f"{layer.name}." if layer.name else ""
        places[f"{prefix}weight"] = (k, False)
        if layer.bias is not None:
            places[f"{prefix}bias"] = (k, True)
    return places


def _unfit(name: str, places: Mapping[str, object], chain: Chain, model: nn.Module) -> str:
    """Why a parameter cannot be searched, to follow its name; empty if it can."""
    counts = Counter(id(x) for _, x in model.named_parameters(remove_duplicate=False))
    owner, made, _ = f".{name}".partition(".parametrizations.")
    if made:
        return (
            f"is a part of what {owner[1:] or 'the model'} makes its weight of; first remove that with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if name in places:
        graph = isinstance(chain.features, fx.GraphModule)
        before = dict(chain.features.named_parameters(remove_duplicate=False)) if graph else {}
        return "is shared" if counts[id(model.get_parameter(name))] > 1 or name in before else ""
    kind = type(model.get_submodule(name.rpartition(".")[0]))
    if not issubclass(kind, nn.Linear):
        return f"is of {kind.__name__}, and only nn.Linear is searched"
    return f"does not lie above {chain.blocked}"


def check_targets(targets: Tensor, num: int, classes: int) -> None:
    """Raise unless there is a class for each example."""
    fits = targets.dtype == torch.int64 and targets.shape == (num,)
    if not fits or int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise ValueError(
            f"CoNNTrA: targets must be classes in [0, {classes}), the model's outputs, int64 of shape "
            f"({num},); got {targets.dtype} {tuple(targets.shape)}. Use .long(), one class an example."
        )
