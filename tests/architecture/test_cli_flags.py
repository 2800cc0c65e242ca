"""The flags that users type: they stay, or somebody decides that they do not."""

import dataclasses
import difflib
import re
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from sterna.cli import compress, flags

SNAPSHOT = Path(__file__).with_name("cli_flags.txt")
HOW = f"If that is meant: .venv/bin/python {Path(*Path(__file__).parts[-3:])}"
COMMANDS: dict[str, Any] = {
    "run EXPERIMENT": flags.RunFlags,
    "run --resume": flags.ResumeFlags,
    "compare EXPERIMENT...": flags.CompareFlags,
    "report": flags.ReportFlags,
    "list": flags.ListFlags,
    "compress": compress.CompressFlags,
    "export": compress.ExportFlags,
}


def _kind(hint: Any) -> str:
    text = getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint)
    return re.sub(r"\b(typing|pathlib|pathlib\._local)\.", "", text)


def lines_of(command: str) -> list[str]:
    """One line per flag: command, flag, type, default."""
    found = []
    plain, full = (get_type_hints(COMMANDS[command], include_extras=x) for x in (False, True))
    for field in dataclasses.fields(COMMANDS[command]):
        marks = get_args(full[field.name])[1:]
        positional = any("positional" in str(mark).lower() for mark in marks)
        name = field.name.upper() if positional else f"--{field.name.replace('_', '-')}"
        default = "required" if field.default is dataclasses.MISSING else repr(field.default)
        found.append(f"sterna {command}: {name} {_kind(plain[field.name])} = {default}")
    return found


def current() -> list[str]:
    return [line for command in COMMANDS for line in lines_of(command)]


def test_snapshot() -> None:
    before = SNAPSHOT.read_text().splitlines()
    changed = difflib.unified_diff(before, current(), "before", "now", lineterm="", n=0)
    assert before == current(), "\n".join(["the flags changed:", *changed, HOW])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The snapshot is of what the parser really takes."""
    with pytest.raises(SystemExit) as ended:
        flags.parse(COMMANDS[command], [], ["--help"], f"sterna {command}")
    assert ended.value.code == 0
    shown = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) - {"--help"}
    snapshot = {flag for line in lines_of(command) for flag in re.findall(r": (--[a-z-]+) ", line)}
    assert snapshot == {flag for flag in shown if not flag.startswith("--no-")}


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(current()) + "\n")
    sys.stdout.write(f"wrote {SNAPSHOT}\n")
