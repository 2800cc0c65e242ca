"""What is compressed or exported: a trained model with its data, from a run folder or a user's own file.

A folder of ``sterna compress`` says in ``original.json`` how its original is built, so that the smaller
model can be loaded into it; nothing is unpickled.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD

from sterna.data import Dataset
from sterna.evaluation import logits_of
from sterna.procedures.training import Training
from sterna.randomness import isolated
from sterna.runs.experiment import UnknownExperiment, located, resolve, restored
from sterna.runs.files import StoreError, read_json
from sterna.runs.recorder import plain_arguments
from sterna.runs.reopen import described
from sterna.runs.request import Request, build
from sterna.schedules import Polynomial
from sterna.surgery.description import load
from sterna.surgery.program import refuse_converted
from sterna.surgery.ternary import load_packed

LOADERS = ("digits", "mnist", "fashion_mnist", "cifar10")
ORIGINAL = "original.json"
_AGAIN = "Save this model's weights again."


class NotNamed(ValueError):
    """The weights or the data of a user's module were not named, or are not there."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained model, and what it was trained with.

    Args:
        name: of the run or the user's function, for reports.
        model: trained, in evaluation mode, on the CPU.
        data: the whole data set.
        training: how phases train and judge it, on ``data``.
        original: how a fresh one is built, as plain values for ``original.json``.
        compressed: whether the weights are of a shrunk, factored or packed model already.
    """

    name: str
    model: nn.Module
    data: Dataset
    training: Training
    original: Mapping[str, Any]
    compressed: bool = False

    @property
    def example(self) -> Tensor:
        """Two inputs, shape (2, ...)."""
        return self.data.train.inputs[:2]


def of_run(folder: Path) -> Subject:
    """The trained model of a run folder, or the smaller one of a folder of ``sterna compress``.

    Raises:
        StoreError: the folder is neither, is not finished, or its weights do not fit.
    """
    if (folder / ORIGINAL).exists():
        return _of_compressed(folder)
    _, request = described(folder, quiet=True)
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise StoreError(
            f"{folder} is not finished: it has no model.safetensors. Go on with `sterna run --resume "
            f"{folder}`."
        )
    original = {
        "kind": "run",
        "experiment": request.experiment,
        "source": request.source,
        "arguments": plain_arguments(request.arguments),
        "seed": request.seed,
    }
    return _filled(_fresh_of_run(request, original), weights)


def of_module(
    spec: str,
    weights: Path | None,
    data: str | None,
    *,
    lr: float = 0.01,
    batch_size: int = 64,
    seed: int = 0,
) -> Subject:
    """A user's own trained model.

    Args:
        spec: ``path/to/file.py:function``, which returns the module with weights of any value.
        weights: a safetensors file of its state, or of a shrunk or packed one.
        data: one of `LOADERS`, or ``path/to/file.py:function``, which returns a `Dataset`.
        lr: learning rate of training phases: SGD with momentum 0.9.
        batch_size: examples per step.
        seed: of all that is drawn.

    Raises:
        NotNamed: the weights or the data are missing.
        StoreError: something does not fit.
        UnknownExperiment: there is no such file or function.
    """
    for flag, value, way in (
        ("--weights", weights, "the safetensors file of the trained model"),
        ("--data", data, f"{', '.join(LOADERS)}, or your_file.py:function"),
    ):
        if value is None:
            raise NotNamed(f"{spec} needs {flag}: {way}.")
    if not Path(str(weights)).is_file():
        raise NotNamed(f"{weights} does not exist; name the safetensors file of the trained model.")
    data_source = str(data) if data in LOADERS else located(str(data))
    original = {
        "kind": "module",
        "experiment": spec,
        "source": located(spec),
        "data": data_source,
        "lr": lr,
        "batch_size": batch_size,
        "seed": seed,
    }
    return _filled(_fresh_of_module(original), Path(str(weights)))


def _of_compressed(folder: Path) -> Subject:
    original = read_json(folder / ORIGINAL, "a folder of sterna compress")
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise StoreError(
            f"{folder} holds no smaller model: the target was not met. See {folder / 'compress.json'}."
        )
    if original.get("kind") == "module":
        return _filled(_fresh_of_module(original), weights)
    request = Request(
        experiment=original["experiment"],
        source=original["source"],
        arguments=restored(resolve(original["source"]), original["arguments"]),
        folder=folder,
        seed=original["seed"],
    )
    return _filled(_fresh_of_run(request, original), weights)


def _fresh_of_run(request: Request, original: Mapping[str, Any]) -> Subject:
    run = build(request)
    with isolated(request.seed, "model"):
        model = run.model()
    training = Training(
        data=run.data,
        optimizer=run.optimizer,
        objective=run.objective,
        schedule=run.schedule,
        batch_size=run.batch_size,
        clip_norm=run.clip_norm,
        seed=request.seed,
    )
    name = f"{request.experiment}, seed {request.seed}"
    return Subject(name=name, model=model, data=run.data, training=training, original=original)


def _fresh_of_module(original: Mapping[str, Any]) -> Subject:
    spec, seed = original["source"], original["seed"]
    with isolated(seed, "model"):
        model = _called(spec, nn.Module)
    data = _data(original["data"], model)
    training = Training(
        data=data,
        optimizer=partial(SGD, lr=original["lr"], momentum=0.9),
        schedule=Polynomial(power=0.5),
        batch_size=original["batch_size"],
        seed=seed,
    )
    name = original["experiment"]
    return Subject(name=name, model=model, data=data, training=training, original=original)


def _called(spec: str, kind: type[Any]) -> Any:
    try:
        function: Callable[..., Any] = resolve(spec)
    except UnknownExperiment:
        raise UnknownExperiment(
            f"There is no function {spec}; name one that returns a {kind.__name__}, called without "
            "arguments, as your_file.py:function."
        ) from None
    value = function()
    if not isinstance(value, kind):
        raise StoreError(
            f"{spec} must return a {kind.__name__}, called without arguments; got "
            f"{type(value).__name__}."
        )
    return value


def _data(source: str, model: nn.Module) -> Dataset:
    """A data set; the digits as images where the model takes no vectors."""
    if source not in LOADERS:
        if ".py" not in source:
            raise NotNamed(
                f"--data must be one of {', '.join(LOADERS)}, or your_file.py:function; got {source!r}."
            )
        found: Dataset = _called(source, Dataset)
        return found
    loader = importlib.import_module(f"sterna.data.{source}").load
    data: Dataset = loader()
    if source == "digits" and _complaint(model, data.train.inputs[:2]):
        images: Dataset = loader(shape="image")
        data = data if _complaint(model, images.train.inputs[:2]) else images
    return data


def _complaint(model: nn.Module, inputs: Tensor) -> str:
    """Why a model does not run on some inputs; empty if it does."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), isolated(0, "subject"):
            model(inputs)
    except Exception as error:
        (first, *_) = str(error).splitlines() or [type(error).__name__]
        return first.rstrip(".")
    finally:
        model.train(was_training)
    return ""


def _filled(subject: Subject, weights: Path) -> Subject:
    """The subject with the weights of a file: plain, shrunk or packed."""
    name = subject.name
    try:
        with safe_open(weights, framework="pt") as file:
            about = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        why = str(error).rpartition("header: ")[2].rstrip(".")
        raise StoreError(
            f"{weights} is not a safetensors file, or not a whole one: {why}. {_AGAIN}"
        ) from error
    model = subject.model
    try:
        refuse_converted(model)
        if "sterna.shrunk" in about:
            model = load(model, weights)
        elif "packed" in about:
            model, _ = load_packed(weights, model)
        else:
            tensors = load_file(weights)
            wrong = _misfit(model, tensors)
            if wrong:
                raise ValueError(f"{wrong}. {_AGAIN}")
            model.load_state_dict(tensors, strict=False)  # tied names are stored once
    except (ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise StoreError(f"{weights} does not fit the model of {name}: {why[:400]}") from error
    model.eval()
    wrong = _complaint(model, subject.example)
    if wrong:
        first = subject.example
        raise StoreError(
            f"The model of {name} does not run on {subject.data.name} (inputs of shape "
            f"{tuple(first.shape[1:])}, {str(first.dtype).rpartition('.')[2]}): {wrong}. Name the data that "
            "it was trained on."
        )
    train = subject.data.train
    highest = train.targets.reshape(len(train), -1).amax(dim=1).argmax().view(1)
    try:
        with torch.no_grad(), isolated(0, "subject"):
            logits_of(model(train.inputs[highest]), train.targets[highest])
    except ValueError as error:
        raise StoreError(f"The model of {name} does not fit {subject.data.name}: {error}") from None
    return Subject(
        name=name,
        model=model,
        data=subject.data,
        training=subject.training,
        original=subject.original,
        compressed="sterna.shrunk" in about or "packed" in about,
    )


def _misfit(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """What is missing in a model's state, too much, or of another shape; empty if nothing is."""
    own = model.state_dict()
    there = {_place(own[name]) for name in tensors if name in own}
    lacking = [name for name, x in own.items() if name not in tensors and _place(x) not in there]
    strange = [name for name in tensors if name not in own]
    parts = [f"it lacks {_few(lacking)}"] if lacking else []
    parts += [f"it has {_few(strange)}, which the model has not"] if strange else []
    for name, tensor in own.items():
        if not parts and name in tensors and tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, in the model {tuple(tensor.shape)}"
            parts.append(f"the shape of {name} is {shapes}")
    return ", and ".join(parts)


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """The same for tied tensors, of which safetensors stores one."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
