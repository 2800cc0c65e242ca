"""``sterna list methods``: what there is, a line each."""

import ast
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import sterna

WIDTH = 80
_PACKAGES: Mapping[str, str] = {
    "codecs": "what travels instead of a gradient",
    "exchange": "how workers agree",
    "server": "how late gradients are used, and who waits",
    "objectives": "what is minimised",
    "samplers": "who sees which example",
}
PHRASES: Mapping[str, str] = {
    "codecs.entropy": "another codec's message, coded losslessly at its entropy",
    "codecs.error_feedback": "what a codec loses in one step is sent in the next",
    "codecs.identity": "the gradient travels as it is",
    "codecs.quantise": "every entry is rounded to a whole number of steps",
    "codecs.terngrad": "signs drawn by chance, two bits an entry",
    "codecs.warm_up": "the first messages travel less compressed",
    "exchange.all_reduce": "the mean of all gradients, at every step",
    "exchange.ddp_hook": "any codec inside your own DistributedDataParallel loop",
    "exchange.local": "none: every worker trains its own copy",
    "exchange.model_average": "local steps, then the average of the weights",
    "exchange.slim_dp": "only the weights that matter travel, and some others",
    "exchange.two_phase": "the mean of small integer codes, in two phases",
    "server.adadelay": "a late gradient makes a smaller step",
    "server.admission": "never wait, wait a little (SSP), or wait for all",
    "server.delay_compensation": "DC-ASGD: moves a late gradient to the new weights",
    "server.delays": "how long a simulated worker takes for a gradient",
    "server.gap_aware": "divides each entry by how far its weight has moved",
    "server.staleness_scaled": "divides the step by the staleness",
    "server.trace": "recorded delays, replayed under other rules",
    "objectives.augment": "random shifts and mirror images of the pictures",
    "objectives.cross_entropy": "between the softmax of outputs and the right class",
    "objectives.force": "filters pull each other towards fewer directions",
    "objectives.group_lasso": "a penalty on whole structures, which go to zero",
    "samplers.shuffle": "every example once an epoch, divided over the workers",
}
"""Of methods whose docstring begins with a sentence too long for a line."""


def methods() -> dict[str, str]:
    """Every method module, and a short phrase: the one above, or the first sentence of its docstring.

    A method module is one whose docstring says what a step costs.
    """
    found = {}
    root = Path(sterna.__file__).parent
    for package in _PACKAGES:
        for module in pkgutil.iter_modules([str(root / package)]):
            source = (root / package / f"{module.name}.py").read_text(encoding="utf-8")
            text = ast.get_docstring(ast.parse(source)) or ""
            if "Cost per step:" in text:
                name = f"{package}.{module.name}"
                found[name] = PHRASES.get(name) or _phrase(text)
    return found


def lines() -> Iterator[str]:
    """The list, with a heading for each package."""
    found = methods()
    column = max(len(name.partition(".")[2]) for name in found) + 4
    for package, heading in _PACKAGES.items():
        yield f"sterna.{package}: {heading}"
        for name, phrase in found.items():
            if name.startswith(f"{package}."):
                yield shortened(f"  {name.partition('.')[2]}".ljust(column) + phrase, WIDTH)
    yield ""
    yield "Equations, cost and paper of one: python -m pydoc sterna.codecs.terngrad"


def shortened(text: str, width: int) -> str:
    """The text, or as many of its words as fit into ``width`` characters with an ellipsis.

    Example:
        >>> shortened("one two three", 9), shortened("one two", 9)
        ('one two…', 'one two')
    """
    if len(text) <= width:
        return text
    return text[:width].rpartition(" ")[0].rstrip(" ,;:") + "…"


def _phrase(text: str) -> str:
    """The first sentence of a docstring, without its name before the colon."""
    first = text.strip().partition("\n")[0].replace("``", "").rstrip(".")
    return first.partition(": ")[2] or first
