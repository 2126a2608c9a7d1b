"""Which example is read when: by whom and in how many pieces makes no difference."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from transformers_aar.training.arguments import LoopArguments
from transformers_aar.training.sampling import ExampleStream, ValidationSet


class Keys(torch.utils.data.Dataset):
    """A dataset whose examples are what they were asked for by."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        assert 0 <= key[1] < self.length
        return key


def build_stream(length=10, batch_size=4, accumulation=1, rank=0, world=1, seed=0, num_workers=0) -> ExampleStream:
    args = LoopArguments(
        output_dir="run", per_device_batch_size=batch_size, gradient_accumulation_steps=accumulation, seed=seed
    )
    processes = SimpleNamespace(process_index=rank, num_processes=world)
    return ExampleStream(Keys(length), list, args, processes, num_workers)


def test_every_epoch_has_all_examples_in_an_order_of_its_own():
    stream = build_stream(length=50)
    orders = []
    for epoch in range(4):
        keys = [stream.example(position) for position in range(50 * epoch, 50 * (epoch + 1))]
        assert {key[0] for key in keys} == {epoch}
        orders.append([key[1] for key in keys])
        assert sorted(orders[-1]) == list(range(50))
    assert len({tuple(order) for order in orders}) == 4
    assert [stream.example(position)[1] for position in range(50)] == orders[0]  # whatever was read in between
    assert [build_stream(length=50, seed=1).example(position)[1] for position in range(50)] != orders[0]


def test_batches_run_on_from_epoch_to_epoch():
    batches = list(build_stream(length=10, batch_size=4).loader(range(5)))
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(key for batch in batches for key in batch) == [(epoch, i) for epoch in range(2) for i in range(10)]


def test_a_batch_larger_than_the_dataset():
    (batch,) = build_stream(length=3, batch_size=8).loader(range(1))
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("world, accumulation", [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (2, 4), (8, 1)])
def test_processes_and_micro_batches_share_a_batch_in_its_order(world, accumulation):
    """Process by process, and within each micro-batch by micro-batch."""
    whole = list(build_stream(batch_size=8).loader(range(3)))
    batch_size = 8 // (world * accumulation)
    shares = [
        list(build_stream(batch_size=batch_size, accumulation=accumulation, rank=rank, world=world).loader(range(3)))
        for rank in range(world)
    ]
    for share in shares:
        assert [len(batch) for batch in share] == [batch_size] * 3 * accumulation
    for step in range(3):
        micro_batches = [share[step * accumulation : (step + 1) * accumulation] for share in shares]
        assert [key for own in micro_batches for batch in own for key in batch] == whole[step]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_going_on_from_a_step_reads_what_would_have_come(num_workers):
    options = {"batch_size": 2, "accumulation": 2, "rank": 1, "world": 2, "num_workers": num_workers}
    everything = list(build_stream(**options).loader(range(9)))
    assert list(build_stream(**options).loader(range(4, 9))) == everything[8:]
    assert len(build_stream(**options).loader(range(4, 9))) == 10


def test_shares_of_positions_that_cant_be_shared_evenly():
    shares = [build_stream(rank=rank, world=3).share_of(range(5, 15)) for rank in range(3)]
    assert [position for share in shares for position in share] == list(range(5, 15))
    assert [len(share) for share in shares] == [3, 3, 4]


def test_reading_positions_as_one_batch():
    stream = build_stream()
    assert stream.read(range(7, 13)) == [stream.example(position) for position in range(7, 13)]


def as_batch(keys: list) -> dict:
    """A batch none of whose files can be read."""
    return {"keys": keys, "skipped": [(str(key), "broken") for key in keys]}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_validation_set_is_spread_over_the_dataset_and_shared(world):
    shares = [
        ValidationSet(Keys(100), as_batch, 10, 4, SimpleNamespace(process_index=rank, num_processes=world))
        for rank in range(world)
    ]
    read = [key for share in shares for batch in share.batches() for key in batch["keys"]]
    assert sorted(read) == [(0, index) for index in range(0, 100, 10)]
    assert all(len(batch["keys"]) <= 4 for share in shares for batch in share.batches())
    # with the spare ones all processes have equally many
    assert len({len([*share.batches(), *share.spare_batches()]) for share in shares}) == 1
    assert shares[0].skipped == {str((0, index)): "broken" for index in range(0, 100, 10 * world)}


def test_a_validation_set_of_all_there_are():
    validation_set = ValidationSet(Keys(3), as_batch, 10, 4, Accelerator(cpu=True))
    assert [batch["keys"] for batch in validation_set.batches()] == [[(0, 0), (0, 1), (0, 2)]]
