"""Shuffle: every example once, the same steps on any number of workers, resumable."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from sterna.data import Examples
from sterna.randomness import generator
from sterna.samplers import Shuffle


def lists(sampler):
    return [batch.tolist() for batch in sampler]


@given(
    num_examples=st.integers(1, 60),
    batch_size=st.integers(1, 7),
    size=st.integers(1, 5),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_workers_share_an_epoch_without_overlap(num_examples, batch_size, size, drop_last, seed):
    step = batch_size * size
    if num_examples < (step if drop_last else size):
        with pytest.raises(ValueError, match="Shuffle: num_examples must be at least"):
            Shuffle(num_examples, batch_size, size=size, drop_last=drop_last)
        return
    workers = [
        Shuffle(num_examples, batch_size, rank=rank, size=size, seed=seed, drop_last=drop_last)
        for rank in range(size)
    ]
    batches = [list(worker) for worker in workers]
    assert {len(b) for b in batches} == {len(workers[0])}
    everything = torch.cat([part for b in batches for part in b])
    assert everything.dtype == torch.int64
    assert len(everything.unique()) == len(everything)
    assert 0 <= everything.min() <= everything.max() < num_examples
    left = num_examples % step
    whole = drop_last or left < size
    assert len(everything) == num_examples - (left if whole else 0)
    for parts in zip(*batches, strict=True):
        sizes = {len(part) for part in parts}
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
    for parts in list(zip(*batches, strict=True))[: num_examples // step]:
        assert {len(part) for part in parts} == {batch_size}


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.booleans(), st.integers(12, 80))
def test_a_step_has_the_same_examples_on_any_number_of_workers(size, drop_last, num_examples):
    alone = Shuffle(num_examples, 12, drop_last=drop_last)
    workers = [
        Shuffle(num_examples, 12 // size, rank=rank, size=size, drop_last=drop_last)
        for rank in range(size)
    ]
    for _ in range(2):
        for whole, *parts in zip(alone, *workers, strict=False):
            assert torch.equal(torch.cat(parts), whole)


def test_every_epoch_has_its_own_order_and_every_seed_too():
    sampler = Shuffle(20, 20)
    first, second = lists(sampler)[0], lists(sampler)[0]
    assert first != second
    assert sorted(first) == sorted(second) == list(range(20))
    assert lists(Shuffle(20, 20, seed=1))[0] != first
    assert lists(Shuffle(20, 20))[0] == first
    assert sampler.epoch == 2


def test_position_and_epoch_advance_as_batches_are_taken():
    sampler = Shuffle(10, 3)
    seen = [(sampler.epoch, sampler.position) for _ in sampler]
    assert seen == [(0, 1), (0, 2), (0, 3)]
    assert (sampler.epoch, sampler.position) == (1, 0)
    assert len(sampler) == 3


def test_a_loop_that_was_left_goes_on_where_it_was():
    sampler, whole = Shuffle(10, 3), lists(Shuffle(10, 3))
    for batch in sampler:
        assert batch.tolist() == whole[0]
        break
    assert lists(sampler) == whole[1:]


@given(st.integers(0, 11), st.booleans())
def test_a_checkpoint_after_any_batch_goes_on_behind_it(taken, as_tensors):
    def endless(sampler):
        while True:
            yield from sampler

    settings = {"batch_size": 2, "rank": 1, "size": 2, "seed": 3, "drop_last": False}
    first = Shuffle(19, **settings)
    stream = endless(first)
    for _ in range(taken):
        next(stream)
    state = first.state_dict()
    if as_tensors:
        state = {name: torch.tensor(value) for name, value in state.items()}
    second = Shuffle(19, **settings)
    second.load_state_dict(state)
    resumed = endless(second)
    for _ in range(8):
        assert torch.equal(next(stream), next(resumed))


def test_a_checkpoint_after_the_last_batch_begins_the_next_epoch():
    sampler = Shuffle(6, 3)
    stream = iter(sampler)
    next(stream), next(stream)
    assert (sampler.epoch, sampler.position) == (0, 2)
    resumed = Shuffle(6, 3)
    resumed.load_state_dict(sampler.state_dict())
    assert (resumed.epoch, resumed.position) == (1, 0)


def test_the_state_of_one_worker_serves_all():
    a, b = Shuffle(12, 2, rank=0, size=2), Shuffle(12, 2, rank=1, size=2)
    next(iter(a)), next(iter(b))
    fresh = Shuffle(12, 2, rank=1, size=2)
    fresh.load_state_dict(a.state_dict())
    assert fresh == b


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "sampler with seed=0; got seed=1. Resume with the settings"),
        ({"size": 3}, "sampler with size=2; got size=3"),
        ({"batch_size": 4}, "sampler with batch_size=2; got batch_size=4"),
        ({"num_examples": 13}, "sampler with num_examples=12"),
        ({"drop_last": 0}, "sampler with drop_last=1; got drop_last=0"),
        ({"position": 4}, r"position in \[0, 3\]; got epoch=0, position=4"),
        ({"epoch": -1}, r"epoch >= 0"),
        ({"extra": 1}, "the state must hold .*got .*extra"),
    ],
)
def test_a_foreign_state_is_refused(change, message):
    sampler = Shuffle(12, 2, size=2)
    with pytest.raises(ValueError, match=f"Shuffle: .*{message}"):
        sampler.load_state_dict({**sampler.state_dict(), **change})
    assert sampler == Shuffle(12, 2, size=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"size": 0}, "size must be at least 1; got 0"),
        ({"rank": 2, "size": 2}, r"rank must lie in \[0, 2\), the workers; got 2"),
        ({"rank": -1}, r"rank must lie in \[0, 1\)"),
        (
            {"batch_size": 6, "size": 2},
            "num_examples must be at least 12, .* got 10. Take a smaller",
        ),
        ({"size": 11, "drop_last": False}, "num_examples must be at least 11"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"Shuffle: {message}"):
        Shuffle(10, **{"batch_size": 2, **arguments})


def test_repr_evaluates_back_to_a_fresh_sampler():
    sampler = Shuffle(11, 2, rank=1, size=2, seed=9, drop_last=False)
    assert eval(repr(sampler)) == sampler
    next(iter(sampler))
    assert eval(repr(sampler)) != sampler
    assert sampler != Shuffle(11, 2, rank=0, size=2, seed=9, drop_last=False)
    assert sampler != 3


def test_it_is_a_batch_sampler_of_a_data_loader():
    data = TensorDataset(torch.arange(10) * 10)
    loader = DataLoader(data, batch_sampler=Shuffle(10, 4), generator=generator(0))
    assert len(loader) == 2
    expected = Shuffle(10, 4)
    for _ in range(2):
        assert [batch[0].tolist() for batch in loader] == [
            [10 * k for k in batch] for batch in lists(expected)
        ]


def test_it_is_a_sampler_of_whole_batches():
    examples = Examples(torch.arange(10.0).view(10, 1), torch.arange(10))
    loader = DataLoader(examples, sampler=Shuffle(10, 4), batch_size=None, generator=generator(0))
    assert [batch.index.tolist() for batch in loader] == lists(Shuffle(10, 4))


def test_losses_change_nothing_and_batches_may_be_written_to():
    sampler = Shuffle(6, 3)
    for batch in sampler:
        sampler.observe(batch, torch.ones(3))
        batch.fill_(0)
    assert lists(sampler) == lists_of_epoch_one()


def lists_of_epoch_one():
    other = Shuffle(6, 3)
    list(other)
    return lists(other)
