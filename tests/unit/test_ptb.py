"""Penn Treebank: how the text becomes windows, and that it is the published one."""

import hashlib
import io
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from sterna.data import PERPLEXITY, DataError, files, ptb
from sterna.data.files import Published
from sterna.data.ptb import encode, vocabulary, windows, words_of

NAMED = os.environ.get("STERNA_DATA", "")
SHARED = Path(NAMED) if NAMED else Path(__file__).resolve().parents[3] / "shared" / "data"
needs_text = pytest.mark.skipif(
    not (SHARED / "ptb").exists(), reason=f"{SHARED / 'ptb'} is not here (set STERNA_DATA)"
)
TEXTS = {
    "train": " the cat sat on the mat \n the dog sat \n" * 3,
    "valid": " the dog sat on the cat \n" * 2,
    "test": " on the mat the cat sat \n" * 2,
}


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """An empty cache, no STERNA_DATA, no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("STERNA_DATA", raising=False)

    def no_network(url):
        raise OSError("no network in tests")

    monkeypatch.setattr(files, "_open", no_network)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Small texts that pass for the published ones."""
    folder = tmp_path / "data" / "ptb"
    folder.mkdir(parents=True)
    published = {}
    for part, text in TEXTS.items():
        (folder / f"ptb.{part}.txt").write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        published[part] = Published(name=f"ptb.{part}.txt", checksum=digest, urls=("https://x/y",))
    monkeypatch.setattr(ptb, "FILES", published)
    return folder.parent


def test_every_line_ends_with_eos():
    assert words_of(" a b \n c\n\n") == ["a", "b", "<eos>", "c", "<eos>", "<eos>"]
    assert words_of("") == []


def test_words_are_numbered_by_frequency_then_by_alphabet():
    numbers = vocabulary(["b", "a", "c", "c", "a", "d"])
    assert numbers == {"a": 0, "c": 1, "b": 2, "d": 3}
    assert encode(["d", "a"], numbers).tolist() == [3, 0]
    with pytest.raises(DataError, match="the word 'x' is not in the vocabulary of 4 words"):
        encode(["a", "x"], numbers)


@pytest.mark.parametrize("count", [8, 9, 10, 11])
def test_targets_are_the_next_words(count):
    words = torch.arange(count)
    found = windows(words, 3)
    assert found.inputs.shape == found.targets.shape == ((count - 1) // 3, 3)
    assert found.inputs.dtype == found.targets.dtype == torch.int64
    assert torch.equal(found.targets, found.inputs + 1)
    assert found.inputs.flatten().tolist() == list(range((count - 1) // 3 * 3))


def test_parts_and_cuts(small):
    valid, test = ptb.load(small, positions=4), ptb.load(small, positions=4, part="test")
    assert valid.name == "Penn Treebank (validation text, windows of 4)"
    assert test.name == "Penn Treebank (test text, windows of 4)"
    assert valid.merit == test.merit == PERPLEXITY and valid.classes == 7
    numbers = vocabulary(words_of(TEXTS["train"]))
    for data, part in ((valid, "valid"), (test, "test")):
        expected = encode(words_of(TEXTS[part]), numbers)
        assert torch.equal(data.test.inputs.flatten(), expected[:12])
        assert torch.equal(data.test.targets.flatten(), expected[1:13])
    cut = ptb.load(small, positions=4, train_words=9, part_words=5)
    assert (len(cut.train), len(cut.test), cut.classes) == (2, 1, 7)
    assert torch.equal(cut.train.inputs, valid.train.inputs[:2])
    assert cut.name.endswith("of 4), 9 words to train, 5 words to judge by")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": "train"}, r"ptb.load: part must be 'valid' or 'test'; got 'train'"),
        ({"positions": 0}, r"ptb.load: positions must be at least 1; got 0"),
        ({"positions": 14}, r"positions must be below the 14 words of the valid text; got 14"),
        ({"positions": 33}, r"positions must be below the 33 words of the train text; got 33"),
        ({"positions": 4, "train_words": 4}, r"train_words must leave a window of 4 .*; got 4"),
        ({"positions": 4, "train_words": 99}, r"train_words .* at most the 33 there are; got 99"),
        ({"positions": 4, "part_words": 15}, r"part_words .* at most the 14 there are; got 15"),
    ],
)
def test_arguments_out_of_range(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        ptb.load(small, **arguments)


def test_a_damaged_or_missing_file_is_named(small):
    (small / "ptb" / "ptb.valid.txt").write_text("another text\n")
    with pytest.raises(DataError, match=r"ptb.valid.txt is not the published file"):
        ptb.load(small)
    assert len(ptb.load(small, positions=4, part="test").test) == 3
    (small / "ptb" / "ptb.train.txt").unlink()
    with pytest.raises(DataError, match=r"ptb.train.txt was not found"):
        ptb.load(small)


def test_fetched_into_the_cache(small, monkeypatch):
    texts = iter([TEXTS["train"], TEXTS["valid"]])
    monkeypatch.setattr(files, "_open", lambda url: io.BytesIO(next(texts).encode()))
    fetched = ptb.load(positions=4)
    monkeypatch.setattr(files, "_open", None)
    assert torch.equal(fetched.train.inputs, ptb.load(small, positions=4).train.inputs)
    assert torch.equal(fetched.test.inputs, ptb.load(positions=4).test.inputs)


def test_a_text_may_be_split_for_tuning(small):
    tuning = ptb.load(small, positions=4).validation_split(0.5, seed=0)
    assert (len(tuning.train), len(tuning.test), tuning.merit) == (4, 4, PERPLEXITY)


@needs_text
def test_the_published_text():
    data = ptb.load(SHARED, part="test")
    assert data.classes == 10_000
    assert data.train.inputs.shape == ((929_589 - 1) // 35, 35)
    assert data.test.inputs.shape == ((82_430 - 1) // 35, 35)
    assert len(words_of((SHARED / "ptb" / "ptb.valid.txt").read_text())) == 73_760
    counts = Counter(data.train.inputs.flatten().tolist())
    assert [word for word, _ in counts.most_common(3)] == [0, 1, 2]  # the, <unk>, <eos>
    first = ["aer", "banknote", "berlitz", "calloway", "centrust", "cluett"]
    numbers = vocabulary(words_of((SHARED / "ptb" / "ptb.train.txt").read_text()))
    assert data.train.inputs[0, :6].tolist() == [numbers[word] for word in first]
    assert numbers["<eos>"] == 2 and int(data.train.inputs[0, 24]) == 2
