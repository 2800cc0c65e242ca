"""How the values of flags are shown in the help, and how they may be typed."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro

from sterna.cli.usage import UsageError, dashed, meant

_arg = tyro.conf.arg
_PLAIN = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
_NUMBERS = {int: "a whole number", float: "a number"}


def shown(name: str, kind: Any, default: Any) -> tuple[str, Any, Any]:
    """A parameter with the words of its help: no Python in the type, no default that is None.

    Args:
        name: of the parameter.
        kind: its type, annotated with what tyro is told.
        default: its field.
    """
    plain, *marks = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    (told,) = [mark for mark in marks if hasattr(mark, "help_behavior_hint")] or [_arg()]
    marks = [mark for mark in marks if mark is not told]
    text = getattr(told, "help", None) or ""
    usual = default.default
    metavar = getattr(told, "metavar", None) or _metavar(plain, offers_none=usual is not None)
    if tyro.conf.Positional in marks or any("POSITIONAL" in str(mark).upper() for mark in marks):
        metavar = f"[{metavar}]" if metavar and usual is not MISSING else metavar
    hint: dict[str, Any] = {}
    if usual is None and "default" not in text and "none" in text:
        hint["help_behavior_hint"] = "(default: none)"
    elif usual in (None, ()) or (usual is MISSING and get_origin(plain) is tuple):
        hint["help_behavior_hint"] = ""
    elif isinstance(usual, bool):
        hint["help_behavior_hint"] = f"(default: {'yes' if usual else 'no'})"
    return name, Annotated[plain, *marks, _arg(help=text, metavar=metavar, **hint)], default


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is tuple and get_args(kind)[1:] == (...,)


def _metavar(kind: Any, offers_none: bool) -> str | None:
    """The type in words; None where tyro's own will do."""
    choices = _choices(kind)
    words = []
    for choice in choices:
        if choice is type(None):
            continue
        if get_origin(choice) is Literal:
            words.append("{" + ",".join(map(str, get_args(choice))) + "}")
        elif _is_list(choice):
            inner = _metavar(get_args(choice)[0], False)
            words.append("" if inner is None else f"{inner} ...")
        else:
            words.append(_PLAIN.get(choice, ""))
    if not all(words):
        return None
    return "|".join([*words, *(["none"] if offers_none and type(None) in choices else [])])


def plain(arguments: Sequence[str], kinds: Mapping[str, Any]) -> list[str]:
    """The words as tyro wants them: ``none`` may be typed in small letters.

    Args:
        arguments: what the user typed.
        kinds: the type of every flag.
    """
    found = list(arguments)
    for flag, kind in _typed(kinds):
        if type(None) not in _choices(kind):
            continue
        for i, word in enumerate(found):
            if word.lower() == "none" and i and found[i - 1].replace("_", "-") == flag:
                found[i] = "None"
            elif word.replace("_", "-").lower() == f"{flag}=none":
                found[i] = f"{flag}=None"
    return found


def check_values(words: Sequence[str], kinds: Mapping[str, Any]) -> None:
    """Name the first word that is none of those which its flag takes, or no number where one is wanted.

    Args:
        words: what the user typed, and tyro did not take.
        kinds: the type of every flag.

    Raises:
        UsageError: there is one.
    """
    typed = dict(_typed(kinds))
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        flag = name.replace("_", "-")
        kind = typed.get(flag, str)
        after = takewhile(lambda w: not w.startswith("--"), words[i + 1 :])
        given = [value, *after] if equals else list(after)
        for one in given if any(map(_is_list, _choices(kind))) else given[:1]:
            must = _refusal(one, kind)
            if must:
                raise UsageError(f"{flag} must be {must}")


def _refusal(word: str, kind: Any) -> str:
    """What a flag must be, where a word is not that; empty where it is, or tyro has to tell."""
    kinds = [
        one
        for choice in _choices(kind)
        for one in (_choices(get_args(choice)[0]) if _is_list(choice) else (choice,))
    ]
    allowed = [str(v) for one in kinds if get_origin(one) is Literal for v in get_args(one)]
    must = [f"one of {', '.join(allowed)}"] if allowed else []
    for one in kinds:
        if one in _NUMBERS:
            try:
                one(word)
            except ValueError:
                must.append(_NUMBERS[one])
            else:
                return ""
        elif one is type(None):
            must += [] if allowed else ["none"]
        elif get_origin(one) is not Literal:
            return ""
    if word in allowed or (word == "None" and type(None) in kinds):
        return ""
    return f"{' or '.join(must)}; got {word}.{meant(word, allowed)}"


def _typed(kinds: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Every flag as it is typed, and its type without annotations."""
    return [
        (
            dashed(name),
            get_args(kind)[0] if get_origin(kind) is Annotated else kind,
        )
        for name, kind in kinds.items()
    ]
