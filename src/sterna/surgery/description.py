"""A shrunk model on disk: its weights, and in the same file which sizes differ from the original's.

A model's class builds the original sizes. `save` writes the weights as safetensors with a plain JSON
description in the file's header; `load` takes a freshly built original, applies the description and loads
the weights. Nothing is unpickled, no code travels, no class is named.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sterna.surgery.factorise import Form, factorise
from sterna.surgery.program import copied
from sterna.surgery.shrink_lstm import RecurrentStack

_KEY, _VERSION = "sterna.shrunk", 1
_BLOCKS = {"identity": nn.Identity, "relu": nn.ReLU}


@dataclass(frozen=True, kw_only=True)
class Description:
    """How a shrunk model differs from the original.

    Args:
        shapes: of the parameters and buffers that changed, by their names in the shrunk model.
        attributes: by module, attributes that changed.
        stacks: recurrent layers that became a `RecurrentStack`, and its widths.
        replaced: blocks that went, and what stands there: ``"identity"`` or ``"relu"``.
        factored: layers that became two of lower rank, after all else: the rank, and the form of
            `sterna.surgery.low_rank`.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    stacks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    factored: Mapping[str, tuple[int, Form]] = field(default_factory=dict)

    def then(self, later: "Description") -> "Description":
        """One description for two edits in a row: this one of the original, ``later`` of its result.

        Raises:
            ValueError: layers were factored first and cut or replaced later.

        Example:
            >>> first = Description(shapes={"a.weight": (3, 4), "b.weight": (2, 3)})
            >>> both = first.then(Description(shapes={"a.weight": (1, 4)}, replaced={"b": "identity"}))
            >>> dict(both.shapes)
            {'a.weight': (1, 4)}
        """

        if self.factored and (later.shapes or later.stacks or later.replaced):
            raise ValueError(
                "Description.then: layers must be factored last, after units and blocks are removed; got "
                f"{sorted(self.factored)[0]!r} factored first. Shrink, then factor."
            )

        def alive(name: str) -> bool:
            return not any(name == gone or name.startswith(f"{gone}.") for gone in later.replaced)

        def moved(name: str) -> bool:
            return any(name.startswith(f"{path}.") for path in later.stacks)

        shapes = {k: v for k, v in self.shapes.items() if alive(k) and not moved(k)}
        attributes = {k: dict(v) for k, v in self.attributes.items() if alive(k)}
        for path, changed in later.attributes.items():
            attributes.setdefault(path, {}).update(changed)
        return Description(
            shapes=shapes | dict(later.shapes),
            attributes=attributes,
            stacks={k: v for k, v in self.stacks.items() if alive(k)} | dict(later.stacks),
            replaced={k: v for k, v in self.replaced.items() if alive(k)} | dict(later.replaced),
            factored=dict(self.factored) | dict(later.factored),
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an edit did.

    Args:
        parameters_before: numbers in the model's parameters, shared ones counted once.
        parameters_after: the same in the smaller model.
        multiply_adds_before: for the example as it was given, all of its batch.
        multiply_adds_after: the same of the smaller model.
        widths: units before and after, for each group that changed.
        replaced: blocks that went, and what stands there.
        difference: largest absolute change of the output on the example.
        description: how to rebuild the smaller model; see `save` and `load`.
    """

    parameters_before: int
    parameters_after: int
    multiply_adds_before: int
    multiply_adds_after: int
    widths: Mapping[str, tuple[int, int]]
    replaced: Mapping[str, str]
    difference: float
    description: Description


def resize(model: nn.Module, description: Description) -> nn.Module:
    """A copy of the original in the sizes of a description; what changed its size is zero.

    Raises:
        ValueError: the description names something that the model lacks.

    Example:
        >>> small = resize(nn.Linear(4, 3), Description(shapes={"weight": (2, 4), "bias": (2,)}))
        >>> small
        Linear(in_features=4, out_features=2, bias=True)
    """
    instead: dict[nn.Module, nn.Module] = {}
    for path, kind in description.replaced.items():
        if kind not in _BLOCKS:
            raise ValueError(f"resize: replaced must be one of {sorted(_BLOCKS)}; got {kind!r}.")
        instead[_module(model, path)] = _BLOCKS[kind]()
    for path, widths in description.stacks.items():
        layer = _module(model, path)
        if not isinstance(layer, nn.RNNBase):
            raise _unfit(
                model, f"{path} is {type(layer).__name__}, and an LSTM, GRU or RNN is needed"
            )
        instead[layer] = RecurrentStack(layer, tuple(widths))
    model = copied(model, instead)
    for name, shape in description.shapes.items():
        _resize_one(model, name, tuple(shape))
    for path, changed in description.attributes.items():
        module = _module(model, path)
        for attribute, value in changed.items():
            if type(vars(module).get(attribute)) is not int or type(value) is not int:
                raise _unfit(
                    model,
                    f"{path or 'the model'} ({type(module).__name__}) has no whole number "
                    f"{attribute!r} that could be {value!r}",
                )
            setattr(module, attribute, value)
    for name in description.shapes:
        _agree(_module(model, name.rpartition(".")[0]))
    pairs: dict[nn.Module, nn.Module] = {}
    for path, (rank, form) in description.factored.items():
        layer = _module(model, path)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            raise _unfit(model, f"{path} is {type(layer).__name__}, and cannot be factored")
        pairs[layer] = factorise(layer, rank, form)
    return copied(model, pairs) if pairs else model


def save(model: nn.Module, description: Description, path: Path) -> None:
    """Write a shrunk model: weights, and the description in the header.

    Args:
        model: what an edit returned, perhaps trained further.
        description: of all edits since the original (`Description.then`).
        path: a file, usually ``*.safetensors``.
    """
    seen: set[int] = set()
    tensors = {}
    for name, tensor in named(model).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            # Copies, because safetensors refuses tensors that share memory.
            tensors[name] = tensor.detach().clone().contiguous()
    plain = {"version": _VERSION, **asdict(description)}
    if not description.factored:
        del plain["factored"]
    save_file(tensors, path, metadata={_KEY: json.dumps(plain, sort_keys=True)})


def load(original: nn.Module, path: Path) -> nn.Module:
    """The shrunk model of a file that `save` wrote, on the original's device, number for number.

    Args:
        original: freshly built by the user's own code, in the original sizes and in the type of the
            saved numbers; it is not changed.
        path: the file.

    Raises:
        ValueError: the file is damaged, or holds no description, or one that does not fit the original;
            or its numbers are of another type than the original's, since casting would change them.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"load: {path} is not a safetensors file, or not a whole one: {str(error).rstrip('.')}. Copy "
            "the file again, or save the model again."
        ) from error
    if header is None:
        raise ValueError(
            f"load: {path} holds no description of a shrunk model. A file of plain weights loads with "
            "model.load_state_dict(safetensors.torch.load_file(path)), one of few values with "
            "sterna.surgery.ternary.load_packed(path, model)."
        )
    try:
        plain = json.loads(header)
        version = plain.pop("version", None)
        description = _read(plain) if version == _VERSION else Description()
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"load: the description in {path} must be one of save; reading it gave {error!r}. Save the "
            "model again."
        ) from error
    if version != _VERSION:
        raise ValueError(f"load: {path} was written by another version; expected {_VERSION}.")
    try:
        model = resize(original, description)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"load: {path}: {str(error).removeprefix('resize: ')}") from error
    seen: set[int] = set()
    for name, tensor in named(model).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        value = tensors.pop(name, None)
        if value is None or value.shape != tensor.shape:
            found = "nothing" if value is None else f"shape {tuple(value.shape)}"
            raise _unfit(original, f"{name} has shape {tuple(tensor.shape)}, the file has {found}")
        if value.dtype != tensor.dtype:
            raise ValueError(
                f"load: {name} is {value.dtype} in {path} and {tensor.dtype} in the model. Build the "
                f"original in the type of the file: original.to({value.dtype})."
            )
        tensor.data.copy_(value)
    if tensors:
        raise _unfit(original, f"the file also holds {sorted(tensors)[0]}, which the model lacks")
    return model


def _read(plain: dict[str, Any]) -> Description:
    """What `save` wrote; an error of any kind where it is something else."""

    def whole(value: Any) -> int:
        if type(value) is not int or value < 0:
            raise TypeError(f"{value!r} is not a whole number")
        return value

    return Description(
        shapes={k: tuple(map(whole, v)) for k, v in plain["shapes"].items()},
        attributes={
            path: {k: whole(v) for k, v in changed.items()}
            for path, changed in plain["attributes"].items()
        },
        stacks={k: tuple(map(whole, v)) for k, v in plain["stacks"].items()},
        replaced={k: str(v) for k, v in plain["replaced"].items()},
        factored={k: (whole(n), form) for k, (n, form) in plain.get("factored", {}).items()},
    )


def named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a file holds; shared ones under each of their names."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _unfit(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"resize: the description does not fit {type(model).__name__}: {why}. Build the model that was "
        "shrunk, in its original sizes and with the same shared weights."
    )


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise _unfit(model, f"it has no module {path!r}") from error


def _resize_one(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    path, _, leaf = name.rpartition(".")
    old = getattr(_module(model, path), leaf, None)
    if not isinstance(old, Tensor):
        raise _unfit(model, f"it has no parameter or buffer {name!r}")
    if len(shape) != old.dim():
        raise _unfit(model, f"{name} has {old.dim()} dimensions, and {shape} {len(shape)}")
    new: Tensor = old.detach().new_zeros(shape)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in model.modules():
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            if value is old:
                setattr(module, key, new)
                _agree(module)


def _agree(module: nn.Module) -> None:
    """Let the sizes that a stock layer remembers agree with its parameters."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, _ConvNd):
        one, other = module.weight.shape[0], module.weight.shape[1] * module.groups
        swap = isinstance(module, _ConvTransposeNd)
        module.in_channels, module.out_channels = (one, other) if swap else (other, one)
    elif isinstance(module, nn.RNNBase):
        first = dict(module.named_parameters())
        module.hidden_size = first["weight_hh_l0"].shape[1]
        module.input_size = first["weight_ih_l0"].shape[1]
    elif isinstance(module, nn.RNNCellBase):
        module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]
