"""By what a trained model is judged: the one place that knows which figure counts, and how it is written."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Merit:
    """A figure that says how good a trained model is, measured on the test part.

    Args:
        name: its key in ``summary.json`` and in the evaluations of ``metrics.jsonl``.
        title: heading of its curve.
        higher_is_better: which way it improves.
        factor: by which it is multiplied when it is written.
        unit: what then stands behind it.
        points: what a difference of two of them is counted in.

    Example:
        >>> ACCURACY.text(0.9871), PERPLEXITY.text(114.53)
        ('98.71 %', '114.53')
    """

    name: str
    title: str
    higher_is_better: bool
    factor: float = 1.0
    unit: str = ""
    points: str = ""

    def text(self, value: float) -> str:
        """The value as it is written in a sentence."""
        return f"{value * self.factor:,.2f}{self.unit}"


ACCURACY = Merit(
    name="accuracy",
    title="Test accuracy",
    higher_is_better=True,
    factor=100.0,
    unit=" %",
    points=" points",
)
"""The share of the test part's predictions that are right: of classifiers."""

PERPLEXITY = Merit(name="perplexity", title="Test perplexity", higher_is_better=False)
"""``exp`` of the mean cross entropy of a prediction: of language models. 1 at best."""

RETURN = Merit(name="return", title="Return", higher_is_better=True)
"""The sum of rewards of an episode: of agents."""

MERITS = {merit.name: merit for merit in (ACCURACY, PERPLEXITY, RETURN)}
"""By name; a run reports one of them."""
