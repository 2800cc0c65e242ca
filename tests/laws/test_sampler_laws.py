"""What every sampler promises."""

import inspect
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from laws.discovery import examples, fresh
from sterna.runs import tree
from sterna.seams import Sampler

SAMPLERS = examples("samplers")
samplers = pytest.mark.parametrize("sampler", SAMPLERS)
SIZES = (1, 2, 3, 4)
GLOBAL_BATCH = 12


def made(like: Any, **changes: Any) -> Any:
    """A new sampler with some of the arguments of ``like`` changed, at the start."""
    arguments = {name: getattr(like, name) for name in inspect.signature(type(like)).parameters}
    return type(like)(**{**arguments, **changes})


def epoch(sampler: Sampler) -> list[list[int]]:
    return [index.tolist() for index in sampler]


def take(sampler: Sampler, count: int) -> list[list[int]]:
    """The next batches, over the ends of epochs."""
    found: list[list[int]] = []
    while len(found) < count:
        for index in sampler:
            found.append(index.tolist())
            sampler.observe(index, torch.ones(len(index)))
            if len(found) == count:
                break
    return found


def stored(state: Any) -> Any:
    """A state as a checkpoint gives it back."""
    tensors, rest = tree.split(state)
    return tree.join(tensors, json.loads(json.dumps(rest)))


@samplers
def test_indices_are_valid(sampler: Any) -> None:
    own = fresh(sampler)
    for number in range(3):
        assert own.epoch == number
        batches = list(own)
        assert len(batches) == len(own) >= 1
        for index in batches:
            assert isinstance(index, Tensor) and index.dtype == torch.int64
            assert index.dim() == 1 and 0 < len(index) <= sampler.batch_size
            assert int(index.min()) >= 0 and int(index.max()) < sampler.num_examples
        seen = [k for index in batches for k in index.tolist()]
        assert len(set(seen)) == len(seen), "an example comes at most once an epoch"
    assert own.epoch == 3


@samplers
@given(num=st.integers(12, 80), drop_last=st.booleans(), seed=st.integers(0, 5))
def test_workers_share_the_steps_of_one(sampler: Any, num: int, drop_last: bool, seed: int) -> None:
    """Disjoint parts whose union, step by step, does not depend on how many workers there are."""
    expected: list[set[int]] = []
    for size in SIZES:
        ranks = [
            epoch(
                made(
                    sampler,
                    num_examples=num,
                    batch_size=GLOBAL_BATCH // size,
                    rank=rank,
                    size=size,
                    seed=seed,
                    drop_last=drop_last,
                )
            )
            for rank in range(size)
        ]
        assert len({len(batches) for batches in ranks}) == 1, "every worker takes as many steps"
        steps = [set().union(*parts) for parts in zip(*ranks, strict=True)]
        for parts, union in zip(zip(*ranks, strict=True), steps, strict=True):
            sizes = [len(part) for part in parts]
            assert sum(sizes) == len(union), "no example goes to two workers"
            assert max(sizes) - min(sizes) <= 1
        if size == 1:
            expected = steps
            left = num % GLOBAL_BATCH if drop_last else 0
            assert sum(map(len, steps)) == num - left
        elif num % GLOBAL_BATCH >= size or drop_last:
            assert steps == expected
        else:
            assert steps == expected[: num // GLOBAL_BATCH]


@samplers
@pytest.mark.parametrize("drop_last", [True, False])
def test_resumes_at_every_position(sampler: Any, drop_last: bool) -> None:
    new = {"num_examples": 23, "batch_size": 3, "drop_last": drop_last}
    straight = take(made(sampler, **new), 30)
    per_epoch = len(made(sampler, **new))
    for position in range(2 * per_epoch + 2):
        interrupted = made(sampler, **new)
        assert take(interrupted, position) == straight[:position]
        state = stored(interrupted.state_dict())
        again = made(sampler, **new)
        again.load_state_dict(state)
        assert take(again, 30 - position) == straight[position:]
        assert take(interrupted, 30 - position) == straight[position:], "the same object goes on"


@samplers
def test_a_state_between_epochs_is_resumed(sampler: Any) -> None:
    straight = made(sampler, num_examples=20)
    first = epoch(straight)
    state = stored(straight.state_dict())
    second = epoch(straight)
    again = made(sampler, num_examples=20)
    again.load_state_dict(state)
    assert again.epoch == 1
    assert epoch(again) == second != first


@samplers
def test_asking_for_the_state_changes_nothing(sampler: Any) -> None:
    watched, alone = fresh(sampler), fresh(sampler)
    for a, b in zip(watched, alone, strict=True):
        assert torch.equal(a, b)
        watched.state_dict()


@samplers
def test_a_state_of_another_run_is_refused(sampler: Any) -> None:
    state = made(sampler, num_examples=20).state_dict()
    with pytest.raises(ValueError, match=type(sampler).__name__):
        made(sampler, num_examples=21).load_state_dict(state)
    with pytest.raises(ValueError, match=type(sampler).__name__):
        fresh(sampler).load_state_dict({})


@samplers
def test_order_changes_with_epoch_and_seed_alone(sampler: Any) -> None:
    large = {"num_examples": 64}
    own = made(sampler, **large)
    first, second = epoch(own), epoch(own)
    assert first != second, "each epoch has its own order"
    assert epoch(made(sampler, **large)) == first, "the same seed gives the same order"
    assert epoch(made(sampler, **large, seed=sampler.seed + 1)) != first


@samplers
def test_hears_losses(sampler: Any) -> None:
    own = fresh(sampler)
    for index in own:
        assert own.observe(index, torch.rand(len(index), generator=torch.Generator())) is None


@samplers
def test_batches_may_be_changed_by_their_receiver(sampler: Any) -> None:
    own, expected = fresh(sampler), epoch(fresh(sampler))
    for index, batch in zip(own, expected, strict=True):
        assert index.tolist() == batch
        index.fill_(-1)
