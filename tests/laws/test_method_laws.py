"""What holds for every method, whatever its seam."""

import dataclasses
import inspect
import math
import re
from typing import Any, get_type_hints

import pytest

from laws.discovery import (
    METHOD_PACKAGES,
    examples,
    fresh,
    method_modules,
    modules_of,
    sources,
)

ALL = examples()
DATACLASSES = [case for case in ALL if dataclasses.is_dataclass(case.values[0])]
SHAPE_OF_SEAM = {
    "codecs": ({"init", "encode", "decode"},),
    "exchange": ({"init", "__call__"},),
    "objectives": ({"__call__"},),
    "samplers": ({"__iter__", "observe", "state_dict", "load_state_dict"},),
    "server": ({"admits"}, {"init", "correct"}, {"__call__"}),
}


@pytest.mark.parametrize(
    ("package", "at_least"),
    [("codecs", 4), ("exchange", 2), ("objectives", 2), ("samplers", 1), ("server", 14)],
)
def test_discovery_finds_the_methods(package: str, at_least: int) -> None:
    assert len({type(case.values[0]) for case in examples(package)}) >= at_least
    for name, module in method_modules(package).items():
        assert isinstance(module.EXAMPLES, tuple) and module.EXAMPLES, f"{name}: EXAMPLES is empty"


@pytest.mark.parametrize("package", METHOD_PACKAGES)
def test_every_method_has_examples(package: str) -> None:
    """A class with the methods of the seam is an example; what siblings import is a helper."""
    modules = modules_of(package)
    covered = {type(case.values[0]) for case in examples(package)}
    helpers = {
        name
        for name in modules
        for other, path in sources().items()
        if other != name and other.startswith(f"sterna.{package}.")
        if re.search(rf"\b(from|import) {re.escape(name)}\b", path.read_text(encoding="utf-8"))
    } - set(method_modules(package))
    for name, module in modules.items():
        if name in helpers:
            continue
        for value in vars(module).values():
            if (
                inspect.isclass(value)
                and value.__module__ == name
                and not value.__name__.startswith("_")
                and any(shape <= set(dir(value)) for shape in SHAPE_OF_SEAM[package])
                and dataclasses.is_dataclass(value)
            ):
                assert value in covered, f"{name}: {value.__name__} stands in no EXAMPLES"


@pytest.mark.parametrize("method", ALL)
def test_repr_evaluates_back(method: Any) -> None:
    again = fresh(method)
    assert again is not method
    assert again == method
    assert repr(again) == repr(method)


@pytest.mark.parametrize("module", list(method_modules()))
def test_examples_are_of_their_module_and_differ(module: str) -> None:
    found = method_modules()[module].EXAMPLES
    assert {type(example).__module__ for example in found} == {module}
    assert len({repr(example) for example in found}) == len(found)


@pytest.mark.parametrize(
    "method", [c for c in ALL if "samplers" not in type(c.values[0]).__module__]
)
def test_methods_are_frozen_keyword_only_dataclasses(method: Any) -> None:
    """Samplers are the exception: their position is their state."""
    assert dataclasses.is_dataclass(method)
    for field in dataclasses.fields(method):
        # What a wrapper wraps may be given by position: ErrorFeedback(Entropy(TernGrad())).
        assert field.kw_only or field.name == "inner", f"{field.name} must be keyword-only"
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, getattr(method, field.name))
    assert "__dict__" not in dir(method) or not (
        set(vars(method)) - {f.name for f in dataclasses.fields(method)}
    ), "a method holds nothing but its hyperparameters"


@pytest.mark.parametrize("method", DATACLASSES)
def test_equal_methods_hash_equal(method: Any) -> None:
    assert hash(method) == hash(fresh(method))


@pytest.mark.parametrize("module", list(method_modules()))
def test_module_docstring_has_its_sections(module: str) -> None:
    text = method_modules()[module].__doc__ or ""
    assert re.match(r"\S.*[.:]$", text.splitlines()[0]), "the first line is one sentence"
    assert "Cost per step:" in text
    if "Reference:" in text:
        assert text.index("Reference:") < text.index("Differs from the paper:")
        assert text.index("Differs from the paper:") < text.index("Cost per step:")
        said = text.partition("Reference:")[2].partition("Differs from")[0]
        assert re.search(r"\b(19|20)\d\d\b|none needed", said), "the reference has its year"


@pytest.mark.parametrize("method", ALL)
def test_class_docstring_documents_every_field(method: Any) -> None:
    documented = inspect.getdoc(type(method)) or ""
    _, found, arguments = documented.partition("Args:\n")
    names = list(inspect.signature(type(method)).parameters)
    assert found or not names, "there is no Args section"
    for name in names:
        assert re.search(rf"^    {name}: \S", arguments, re.MULTILINE), f"{name} is not described"


def _numeric_fields() -> list[Any]:
    found = []
    for case in DATACLASSES:
        hints = get_type_hints(type(case.values[0]))
        for field in dataclasses.fields(case.values[0]):
            kinds = {float, int} & ({hints[field.name]} | set(_parts(hints[field.name])))
            if kinds:
                found.append(pytest.param(case.values[0], field.name, id=f"{case.id}-{field.name}"))
    return found


def _parts(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", ())


def test_there_are_numeric_hyperparameters() -> None:
    assert len(_numeric_fields()) >= 3


@pytest.mark.parametrize(("method", "name"), _numeric_fields())
def test_nan_is_refused_by_name(method: Any, name: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        dataclasses.replace(method, **{name: math.nan})
    assert name in str(caught.value)
    assert type(method).__name__ in str(caught.value)
    assert "nan" in str(caught.value), "the error shows the value it received"


@pytest.mark.parametrize(("method", "name"), _numeric_fields())
def test_words_are_refused(method: Any, name: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        dataclasses.replace(method, **{name: "much"})


@pytest.mark.parametrize("value", [math.inf, -math.inf, -1.0, -1e30, 1e30, -1])
@pytest.mark.parametrize(("method", "name"), _numeric_fields())
def test_what_is_refused_is_refused_by_name(method: Any, name: str, value: float) -> None:
    try:
        changed = dataclasses.replace(method, **{name: value})
    except (ValueError, TypeError) as error:
        assert name in str(error)
        assert type(method).__name__ in str(error)
    else:
        assert getattr(changed, name) == value
