"""Examples, Dataset and the stratified split."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sterna.data import Dataset, Examples
from sterna.data.split import stratified
from sterna.randomness import generator
from sterna.seams import Batch


def numbered(n: int = 6, classes: int = 2) -> Examples:
    return Examples(torch.arange(2.0 * n).view(n, 2), torch.arange(n) % classes)


def test_indexing_gives_the_named_examples_in_order():
    batch = numbered()[torch.tensor([4, 0, 4])]
    assert isinstance(batch, Batch)
    assert batch.inputs.tolist() == [[8, 9], [0, 1], [8, 9]]
    assert batch.targets.tolist() == [0, 0, 0]
    assert batch.index.tolist() == [4, 0, 4]


def test_a_batch_is_a_copy():
    examples = numbered()
    examples[torch.tensor([0])].inputs.fill_(9)
    assert examples.inputs[0].tolist() == [0, 1]


@pytest.mark.parametrize("index", [3, slice(2), [1, 2], torch.tensor(1), torch.ones(6).bool()])
def test_any_other_index_is_refused(index):
    with pytest.raises(TypeError, match=r"Examples: index must be a one-dimensional int64 tensor"):
        numbered()[index]


@pytest.mark.parametrize("index", [[-1], [0, 6]])
def test_an_index_out_of_range_is_named(index):
    with pytest.raises(IndexError, match=r"every index must lie in \[0, 6\)"):
        numbered()[torch.tensor(index)]


@pytest.mark.parametrize(
    ("inputs", "targets", "error", "message"),
    [
        ([1.0], torch.zeros(1), TypeError, r"inputs must be a torch.Tensor; got list"),
        (torch.zeros(()), torch.zeros(1), ValueError, r"inputs must have shape \(examples, ...\)"),
        (torch.zeros(0, 2), torch.zeros(0), ValueError, r"at least one example; got \(0, 2\)"),
        (torch.zeros(3, 2), torch.zeros(2), ValueError, r"got \(3, 2\) and \(2,\)"),
        (torch.zeros(1), torch.zeros(1, device="meta"), ValueError, r"the same device; got cpu"),
    ],
)
def test_examples_check_their_parts(inputs, targets, error, message):
    with pytest.raises(error, match=f"Examples: .*{message}"):
        Examples(inputs, targets)


def test_examples_cannot_be_changed_and_move_to_a_device():
    with pytest.raises(AttributeError):
        numbered().inputs = torch.zeros(1)
    assert numbered().to("meta").inputs.device.type == "meta"
    data = Dataset("toy", numbered(), numbered(), classes=2)
    assert data.to("cpu").test.targets.device.type == "cpu"


def test_a_data_loader_fetches_whole_batches():
    loader = DataLoader(
        numbered(),
        sampler=[torch.tensor([1, 2]), torch.tensor([0])],
        batch_size=None,
        generator=generator(0),
    )
    assert [batch.index.tolist() for batch in loader] == [[1, 2], [0]]


@pytest.mark.parametrize(
    ("train", "test", "classes", "message"),
    [
        (numbered(), numbered(), 0, "classes must be at least 1; got 0"),
        (
            numbered(),
            numbered(),
            1,
            r"targets of train must lie in \[0, 1\), the classes; got 0..1",
        ),
        (numbered(), numbered(6, 3), 2, r"targets of test must lie in \[0, 2\)"),
        (numbered(), Examples(torch.zeros(2, 3), torch.zeros(2)), 2, "inputs of train and test"),
        (
            Examples(torch.zeros(2, 3), torch.zeros(2)),
            Examples(torch.zeros(2, 3), torch.zeros(2)),
            2,
            r"targets of train must be int64 classes; got torch.float32. Convert",
        ),
    ],
)
def test_a_dataset_checks_its_parts(train, test, classes, message):
    with pytest.raises(ValueError, match=f"Dataset: {message}"):
        Dataset("toy", train, test, classes=classes)


def test_validation_comes_out_of_train_only_and_is_stratified():
    train = Examples(torch.arange(100.0).view(-1, 1), torch.arange(100) % 4)
    test = Examples(torch.full((3, 1), -1.0), torch.zeros(3, dtype=torch.int64))
    data = Dataset("toy", train, test, classes=4)
    tuning = data.validation_split(0.2, seed=3)
    assert (len(tuning.train), len(tuning.test)) == (80, 20)
    assert tuning.test.targets.bincount().tolist() == [5] * 4
    both = torch.cat([tuning.train.inputs, tuning.test.inputs]).flatten()
    assert both.sort().values.tolist() == list(range(100))
    again, other = data.validation_split(0.2, seed=3), data.validation_split(0.2, seed=4)
    assert torch.equal(again.test.inputs, tuning.test.inputs)
    assert not torch.equal(other.test.inputs, tuning.test.inputs)
    assert tuning.name == "toy (validation 0.2)"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 0.01, 0.99, float("nan")])
def test_validation_must_leave_something_on_both_sides(fraction):
    data = Dataset("toy", numbered(), numbered(), classes=2)
    with pytest.raises(ValueError, match=r"validation_split: fraction must lie in \(0, 1\)"):
        data.validation_split(fraction, seed=0)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_stratified_divides_all_and_every_class_fairly(targets, share, seed):
    classes = torch.tensor(targets)
    count = int(share * len(targets))
    kept, cut = stratified(classes, count, generator(seed))
    assert len(cut) == count
    assert torch.cat([kept, cut]).sort().values.tolist() == list(range(len(targets)))
    expected = classes.bincount() * count / len(targets)
    got = classes[cut].bincount(minlength=len(expected))
    assert (got - expected).abs().max() <= len(expected)


def test_targets_of_several_positions_are_one_stratum():
    kept, cut = stratified(torch.zeros(10, 3, dtype=torch.int64), 4, generator(0))
    assert (len(kept), len(cut)) == (6, 4)
