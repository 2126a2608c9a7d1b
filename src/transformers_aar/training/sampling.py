"""Which example is read when, as a function of the step alone: a run that goes on needs nothing but its number."""

import signal
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from .arguments import LoopArguments


class ExampleStream:
    """
    A dataset as an endless sequence of examples, dealt out to the processes of a training.

    All examples come once per epoch, in an order that is drawn anew for each; epochs follow each other without a gap,
    so that every batch is full. A step's examples are dealt out in their order, process by process, and within a
    process micro-batch by micro-batch, so that it makes no difference how many of them share the work.

    Args:
        dataset (`Dataset`): examples by `(epoch, index)`.
        collate (`Callable`): makes a batch of a list of examples.
        args ([`LoopArguments`]): batch sizes and the seed.
        accelerator (`Accelerator`): the processes.
        num_workers (`int`): processes that read for each of them; 0 reads in the process itself.
    """

    def __init__(
        self, dataset: Dataset, collate: Callable, args: LoopArguments, accelerator: Accelerator, num_workers: int
    ):
        self.dataset = dataset
        self.collate = collate
        self.seed = args.seed
        self.batch_size = args.per_device_batch_size
        self.share = args.per_device_batch_size * args.gradient_accumulation_steps
        self.accelerator = accelerator
        self.num_workers = num_workers
        self._order = lru_cache(maxsize=2)(self._draw_order)

    @property
    def global_batch_size(self) -> int:
        """Examples of an optimizer step."""
        return self.share * self.accelerator.num_processes

    def loader(self, steps: range) -> DataLoader:
        """This process's micro-batches of these steps."""
        return DataLoader(
            self.dataset,
            batch_sampler=MicroBatches(self, steps),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_signals,
        )

    def example(self, position: int) -> tuple[int, int]:
        """`(epoch, index)` of the example at a position in the sequence of all epochs."""
        epoch, offset = divmod(position, len(self.dataset))
        return epoch, int(self._order(epoch)[offset])

    def read(self, positions: range) -> dict:
        """The examples at these positions as one batch."""
        return self.collate([self.dataset[self.example(position)] for position in positions])

    def share_of(self, positions: range) -> range:
        """The part of a range of positions that is this process's."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return positions[len(positions) * rank // world : len(positions) * (rank + 1) // world]

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.dataset))


class MicroBatches(Sampler):
    """What one process reads in a range of steps: lists of `(epoch, index)`, one per micro-batch."""

    def __init__(self, stream: ExampleStream, steps: range):
        self.stream = stream
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps) * self.stream.share // self.stream.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        stream = self.stream
        for step in self.steps:
            first = step * stream.global_batch_size
            share = stream.share_of(range(first, first + stream.global_batch_size))
            for start in range(0, len(share), stream.batch_size):
                yield [stream.example(position) for position in share[start : start + stream.batch_size]]


class ValidationSet:
    """
    Examples that are the same in every validation, spread evenly over a dataset.

    Args:
        dataset (`Dataset`): examples by `(epoch, index)`.
        collate (`Callable`): makes a batch of a list of examples.
        num_examples (`int`): how many; all there are, if they are fewer.
        batch_size (`int`): examples of a batch.
        accelerator (`Accelerator`): the processes, which share them.
    """

    def __init__(
        self, dataset: Dataset, collate: Callable, num_examples: int, batch_size: int, accelerator: Accelerator
    ):
        self.dataset = dataset
        self.collate = collate
        self.batch_size = batch_size
        count = min(num_examples, len(dataset))
        self.keys = [(0, index * len(dataset) // count) for index in range(count)]
        self.own_keys = self.keys[accelerator.process_index :: accelerator.num_processes]
        self.most_keys = -(-count // accelerator.num_processes)
        # names and reasons of files that this process couldn't read
        self.skipped: dict[str, str] = {}

    def batches(self) -> Iterator[dict]:
        """This process's share."""
        for start in range(0, len(self.own_keys), self.batch_size):
            yield self.read(self.own_keys[start : start + self.batch_size])

    def spare_batches(self) -> Iterator[dict]:
        """As many batches as another process has more than this one, for a model that all must call equally often."""
        own, most = (-(-count // self.batch_size) for count in (len(self.own_keys), self.most_keys))
        for _ in range(most - own):
            yield self.read(self.keys[:1])

    def read(self, keys: list[tuple[int, int]]) -> dict:
        """These examples as one batch."""
        batch = self.collate([self.dataset[key] for key in keys])
        self.skipped.update(batch["skipped"])
        return batch


def _ignore_signals(_: int) -> None:
    # Ctrl-C reaches every process of a terminal, and the step under way still wants its batch: workers leave stopping
    # to the process that began them
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
