"""The names that users import."""

import inspect
import sys
from pathlib import Path

import pytest

import sterna

SNAPSHOT = Path(__file__).with_name("public_names.txt")
HOW = f"If that is meant: .venv/bin/python {Path(*Path(__file__).parts[-3:])}"


def current() -> list[str]:
    return sorted(sterna.__all__)


def test_snapshot() -> None:
    before = SNAPSHOT.read_text().split()
    gone, new = sorted(set(before) - set(current())), sorted(set(current()) - set(before))
    assert before == current(), f"sterna's public names changed: gone {gone}, new {new}. {HOW}"


def test_all_is_the_lazy_table() -> None:
    assert sterna.__all__ == list(sterna._HOMES) == sorted(sterna._HOMES)


@pytest.mark.parametrize("name", sterna.__all__)
def test_every_public_name_imports_and_is_described(name: str) -> None:
    value = getattr(sterna, name)
    assert value.__name__ == name
    assert value.__module__.startswith("sterna."), "the library exports its own names only"
    text = inspect.getdoc(value) or ""
    assert text and not text.startswith(f"{name}("), "a dataclass's made-up docstring says nothing"
    for attribute, member in vars(value).items() if inspect.isclass(value) else ():
        if inspect.isfunction(member) and not attribute.startswith("_"):
            assert inspect.getdoc(member), f"{name}.{attribute} has no docstring"


def test_the_lazy_names_are_those_that_type_checkers_see() -> None:
    source = inspect.getsource(sterna).partition("if TYPE_CHECKING:")[2].partition("__version__")[0]
    seen = {
        word.strip()
        for line in source.splitlines()
        if " import " in line
        for word in line.partition(" import ")[2].split(",")
    }
    assert seen == set(sterna.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Ternagrad'"):
        _ = sterna.Ternagrad


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(current()) + "\n")
    sys.stdout.write(f"wrote {SNAPSHOT}\n")
