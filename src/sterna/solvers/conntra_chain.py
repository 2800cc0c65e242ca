"""The end of a network that can be searched: linear layers with elementwise functions between them.

What comes before is run once, as features. The layers are read off the graph of torch.fx; of a model that
it cannot trace, the last layer alone is searched, whose input is caught while the model runs.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

Function = Callable[[Tensor], Tensor]

_CHUNK = 1024
_FEW = 8


@dataclass
class Layer:
    """One linear layer: weights (out, in) and bias (out,) in float64, and the function above it."""

    name: str
    weight: Tensor
    bias: Tensor | None
    function: Function = torch.clone

    @classmethod
    def of(cls, name: str, linear: nn.Linear) -> "Layer":
        """A copy of a layer's numbers."""
        bias = None if linear.bias is None else linear.bias.detach().double().clone()
        return cls(name, linear.weight.detach().double().clone(), bias)


@dataclass(frozen=True)
class Chain:
    """``features`` maps inputs to rows (example, number); ``layers`` map those to logits.

    ``blocked`` is what lies under the layers; ``dtype`` is what the model was made in.
    """

    features: nn.Module
    layers: list[Layer]
    blocked: str
    dtype: torch.dtype = torch.float64

    @classmethod
    def copied(cls, model: nn.Module, inputs: Tensor, who: str) -> "Chain":
        """`of` a copy of any model.

        Raises:
            ValueError: as there; or a weight is no parameter, and the model cannot be copied.
        """
        _require_parameters(model, who)
        dtype = next((p.dtype for p in model.parameters()), torch.float64)
        return cls.of(deepcopy(model).double().eval(), who, inputs, dtype)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        who: str,
        inputs: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> "Chain":
        """The longest such end of a float64 model in evaluation mode.

        Args:
            model: it is changed; give a copy.
            who: class or function for errors.
            inputs: examples to run a model on that torch.fx cannot trace; without them it is refused.
            dtype: what the model was made in, for models that do not run in float64.

        Raises:
            ValueError: the model cannot be traced, or does not end in a linear layer.
        """
        if isinstance(model, nn.Linear):
            return cls(nn.Identity(), [Layer.of("", model)], "the input", dtype)
        try:
            graph = _Tracer().trace(model)
        except Exception as error:
            if inputs is not None:
                return cls._caught(model, who, inputs[:_FEW], dtype)
            raise ValueError(
                f"{who}: the model must be one that torch.fx can trace; got {type(model).__name__}, "
                f"which fails with: {error}. Write what is to be searched as an nn.Sequential."
            ) from error
        modules = dict(model.named_modules())
        node = next(n for n in graph.nodes if n.op == "output").args[0]
        layers: list[Layer] = []
        start, used = node, set()
        above: list[fx.Node] = []
        while isinstance(node, fx.Node) and _continues(node):
            linear = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(linear, nn.Linear):
                device = linear.weight.device
                function = _function(above[::-1], modules, device) if layers else None
                if (layers and function is None) or (above and not layers) or linear in used:
                    break
                used.add(linear)
                layer = Layer.of(str(node.target), linear)
                layer.function = function or layer.function
                layers.insert(0, layer)
                start, above = node.all_input_nodes[0], []
            else:
                above.append(node)
            node = node.all_input_nodes[0]
        if not layers:
            raise ValueError(
                f"{who}: the model must end in an nn.Linear that gives the logits; "
                f"{_end(above or [node], modules)}. Leave a softmax at the end to the loss."
            )
        if above:
            blocked = ", ".join(_said(n, modules) for n in above[2::-1])
        else:
            blocked = _said(node, modules) if isinstance(node, fx.Node) else "its output"
        for later in [n for n in reversed(graph.nodes) if n.op != "placeholder"]:
            if later.op == "output":
                later.args = (start,)
            elif not later.users:
                graph.erase_node(later)
        return cls(fx.GraphModule(model, graph), layers, blocked, dtype)

    @classmethod
    def _caught(cls, model: nn.Module, who: str, inputs: Tensor, dtype: torch.dtype) -> "Chain":
        """The last layer alone, of a model that torch.fx cannot trace."""
        before = _Before(model, who)
        found = _run(before, inputs, dtype)
        (linear,) = before.last
        layer = Layer.of(before.names[linear], linear)
        linear.weight.zero_()
        alone = torch.equal(_run(before, inputs, dtype), found)
        linear.weight.copy_(layer.weight)
        if not alone:
            raise ValueError(
                f"{who}: the weight of the last layer must be used there alone; that of {layer.name!r} "
                "is used before it, too."
            )
        blocked = f"the input of {layer.name}: torch.fx cannot trace {type(model).__name__}"
        return cls(before, [layer], blocked, dtype)

    def rows(self, inputs: Tensor) -> Tensor:
        """The features of all examples, shape (example, number), float64.

        Raises:
            ValueError: they are not of that shape, or the model does not run.
        """
        device = self.layers[0].weight.device
        parts = [_run(self.features, x.to(device), self.dtype) for x in torch.split(inputs, _CHUNK)]
        found = torch.cat(parts).double()
        if found.dim() != 2:
            given = (*found.shape[:-1], len(self.layers[-1].weight))
            raise ValueError(
                "CoNNTrA: the model must give one row of logits an example, shape (examples, classes); "
                f"got {tuple(given)}, from features {tuple(found.shape)}. Models that give a class for "
                "each of several positions, such as language models, are not searched; if one class an "
                "example is meant, the model must flatten, or take a mean, before its linear layers."
            )
        return found


def _require_parameters(model: nn.Module, who: str) -> None:
    """Refuse tensors that are computed from parameters, which cannot be copied."""
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            own = [name for name, _ in module.named_parameters(recurse=False)]
            from_others = any(name.startswith(f"{attribute}_") for name in own)
            if isinstance(value, Tensor) and (value.grad_fn is not None or from_others):
                name = f"{path}.{attribute}" if path else attribute
                raise ValueError(
                    f"{who}: every weight must be a parameter; {name!r} is computed from others. After "
                    "pruning or weight norm make it one with torch.nn.utils.prune.remove or "
                    "torch.nn.utils.remove_weight_norm."
                )


class _Before(nn.Module):
    """What the last linear layer of a model is given; ``last`` is that layer, after a run."""

    def __init__(self, model: nn.Module, who: str) -> None:
        super().__init__()
        self.model, self.who = model, who
        self.names = {m: n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.last: list[nn.Linear] = []

    def forward(self, x: Tensor) -> Tensor:
        """The input of that layer."""
        calls: list[tuple[nn.Linear, Tensor, Any]] = []

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            calls.append((module, (*args, *kwargs.values())[0].clone(), out))

        watched = self.last or list(self.names)
        handles = [m.register_forward_hook(note, with_kwargs=True) for m in watched]
        try:
            logits = self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        ends = [(module, given) for module, given, out in calls if out is logits]
        if len(ends) != 1 or sum(module is ends[0][0] for module, _, _ in calls) > 1:
            raise ValueError(
                f"{self.who}: the model must end in an nn.Linear that gives the logits and is called "
                f"once; {type(self.model).__name__}, which torch.fx cannot trace, gives a "
                f"{type(logits).__name__} that is not what such a layer gives."
            )
        self.last = [ends[0][0]]
        return ends[0][1]


def _run(features: nn.Module, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Features in float64, or as the model was made where its code asks for that."""
    try:
        found: Tensor = features(inputs.double() if inputs.is_floating_point() else inputs)
    except RuntimeError:
        features.to(dtype)
        try:
            found = features(inputs)
        except Exception as error:
            (why, *_) = str(error).splitlines() or [type(error).__name__]
            raise ValueError(
                f"CoNNTrA: the model must run on the examples in evaluation mode; it fails with: {why}"
            ) from error
        finally:
            features.double()
    return found.double()


class _Tracer(fx.Tracer):
    """Looks into a module only where there is a linear layer inside: activations may be any code."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = any(isinstance(x, nn.Linear) for x in m.modules())
        return not inside or super().is_leaf_module(m, module_qualified_name)


def _continues(node: fx.Node) -> bool:
    calls = ("call_module", "call_function", "call_method")
    return node.op in calls and len(node.all_input_nodes) == 1 and len(node.users) == 1


def _said(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    if node.op == "call_module":
        kind = type(modules[str(node.target)])
        place = "" if kind.__module__.startswith("torch.nn.modules") else f"{kind.__module__}."
        return f"{node.target} ({place if kind.__name__ == 'Linear' else ''}{kind.__name__})"
    return "the input" if node.op == "placeholder" else node.name


def _end(nodes: list[Any], modules: Mapping[str, nn.Module]) -> str:
    """What a model ends in, and the last layer with parameters if that is another."""
    last = nodes[0]
    if not isinstance(last, fx.Node):
        return f"it gives a {type(last).__name__.removeprefix('immutable_')}, not a tensor"
    weights = (
        n
        for n in nodes
        if n.op == "call_module" and any(True for _ in modules[str(n.target)].parameters())
    )
    layer = next(weights, last)
    behind = "" if layer is last else f", and the last layer is {_said(layer, modules)}"
    return f"it ends in {_said(last, modules)}{behind}"


def _always(x: Tensor) -> Callable[[fx.Node], Tensor]:
    return lambda _: x


def _function(
    nodes: list[fx.Node], modules: Mapping[str, nn.Module], device: torch.device
) -> Function | None:
    """The function that the nodes compute one after another; None if it is not elementwise."""

    steps = [(n.op, n.target, (n.args, n.kwargs)) for n in nodes]  # nodes forget when erased

    def run(x: Tensor) -> Tensor:
        out = x.clone()  # it may be changed in place, or handed back as it is
        for op, target, arguments in steps:
            args, kwargs = fx.node.map_arg(arguments, _always(out))
            if op == "call_module":
                out = modules[str(target)](*args, **kwargs)
            elif op == "call_method":
                out = getattr(args[0], str(target))(*args[1:], **kwargs)
            elif callable(target):
                out = target(*args, **kwargs)
        return out.to(x.dtype)

    # Elementwise: each number has the same result alone as among the others.
    probe = torch.linspace(-3.1, 3.3, 35, dtype=torch.float64, device=device)
    try:
        together, alone = run(probe.view(5, 7)), run(probe.view(35, 1))
    except Exception:
        return None
    same = together.shape == (5, 7) and alone.shape == (35, 1)
    return run if same and torch.allclose(together.view(-1, 1), alone, 1e-12, 1e-12) else None
