"""The first line of a run, said before torch is loaded, which takes seconds."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

_EXPERIMENTS = Path(__file__).parents[1] / "experiments"
WORKERS = {"run": 1, "compare": 4}
SEEDS = 3
"""What stands for ``--workers`` and ``--seeds`` where they are not typed."""


def announcement(arguments: Sequence[str]) -> str:
    """What a command line starts; empty for what trains nothing, is to be quiet, or is typed wrongly.

    Args:
        arguments: what the user typed, from the command on.

    Example:
        >>> announcement(["run", "digits.sync", "--workers", "4"])
        'Starting digits.sync: data digits, 4 workers'
    """
    command, *rest = arguments
    if command not in WORKERS or {"-h", "--help", "--quiet"} & set(rest):
        return ""
    if os.environ.get("RANK", "0") != "0":  # another process of torchrun says it
        return ""
    for flag, text in (("--resume", "Going on with"), ("--replay", "Doing again")):
        folder = _value(rest, flag)
        if command == "run" and folder:
            return f"{text} {folder}" if (Path(folder) / "run.json").is_file() else ""
    flags = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    names = rest[:flags]
    counts = _value(rest, "--workers"), _value(rest, "--seeds")
    workers = counts[0] or os.environ.get("WORLD_SIZE") or str(WORKERS[command])
    seeds = counts[1] or str(SEEDS)
    counted = all(count.isdigit() and int(count) > 0 for count in (workers, seeds))
    enough = len(names) > (command == "compare")
    if not (enough and counted and all(map(_is_there, names))):
        return ""
    data = dict.fromkeys(name.partition(".")[0] for name in names if ".py" not in name)
    parts = [f"data {', '.join(data)}"] if data else []
    parts += [_counted(int(workers), "worker")]
    parts += [_counted(int(seeds), "seed")] if command == "compare" else []
    return f"Starting {', '.join(names)}: {', '.join(parts)}"


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit}{'s' * (number != 1)}"


def _value(words: Sequence[str], flag: str) -> str:
    """What follows a flag; empty if it is not there."""
    for i, word in enumerate(words):
        if word == flag:
            return words[i + 1] if i + 1 < len(words) else ""
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return ""


def _is_there(name: str) -> bool:
    """Whether an experiment has a file and a function, as far as its text tells."""
    if ".py" in name:
        return Path(name.partition(":")[0]).is_file()
    module, _, function = name.partition(".")
    path = _EXPERIMENTS / f"{module}.py"
    if function.startswith("_") or not (function.isidentifier() and path.is_file()):
        return False
    return re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), re.M) is not None
