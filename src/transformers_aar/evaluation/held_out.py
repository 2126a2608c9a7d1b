"""Held-out sounds to evaluate on, in batches that are the same however many processes share them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from ..configuration_sat import POSITIVE_INTEGER, check_fields, is_list, number_between
from ..data.audioset import label_names
from ..data.events import single_events
from ..data.examples import CropExamples
from ..modeling_sat import SatModel
from ..training.arguments import COUNT, TEXT, DatasetArguments, option, optional
from .listeners import Listeners, Rows
from .reports import Report

# -80 dB: below it is only the noise of 16-bit files
SILENCE_PEAK = 1e-4
AT_LEAST_TWO = (lambda value: isinstance(value, int) and value >= 2, "a whole number of at least 2")
TEXTS = (lambda values: is_list(values, TEXT[0]), "a list of texts")
RULES = {
    **dict.fromkeys(("model", "output_dir", "split"), TEXT),
    "classifier": optional(TEXT),
    **dict.fromkeys(("num_examples", "batch_size"), AT_LEAST_TWO),
    "embeddings": TEXTS,
    "max_skipped_share": number_between(0, 1),
    "num_samples": POSITIVE_INTEGER,
    "seed": COUNT,
}


@dataclass
class EvaluationArguments(DatasetArguments):
    """What is evaluated, on which sounds, and by whose ears."""

    model: str = option("Folder or repository of the model.")
    output_dir: str = option("Folder for the report, its pictures and its sounds.")
    split: str = option("Held-out split.", "eval")
    single_events: bool = option("Only crops in which one event is heard alone; takes strong labels.", False)
    num_examples: int = option("Crops of held-out sounds; several of each sound, where there are fewer sounds.", 256)
    max_skipped_share: float = option("Largest share of broken and silent crops that are left out.", 0.0)
    batch_size: int = option("Sounds that a process works on at once.", 16)
    embeddings: list[str] = option(
        "Of Fréchet distances: log_mel, clap and ast, the last two also as NAME=CHECKPOINT, and classifier=FOLDER.",
        ["log_mel"],
    )
    classifier: str | None = option(
        "Folder of a classifier that names the sounds, or `bundled` for the package's.", None
    )
    num_samples: int = option("Sounds that the report shows.", 8)
    seed: int = option("Another seed: other crops, and other draws of the generator.", 0)
    use_cpu: bool = option("Computes on the CPU, whatever else there is.", False)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, RULES)


class HeldOutCrops:
    """
    Crops of held-out sounds: the same ones for every model with the same window, and those that training validates
    on where there are as many. With more crops than sounds each sound has several.

    Args:
        args ([`EvaluationArguments`]): which dataset, how many crops, the seed.
        accelerator (`Accelerator`): the processes.
        duration_s (`float`): length of a crop in seconds.
        sampling_rates (`Sequence[int]`): rates in Hz, one waveform each.
        known_labels (`list[str]`, *optional*): labels that count; by default all of the dataset.
        needs_labels (`bool`, defaults to `False`): leaves out crops without any of them.

    Attributes:
        label_names (`list[str]`): what the examples' `labels` count from 0.
        left_out (`list[tuple[str, str]]`): names of the broken and silent crops that `measure` met, with the reasons.

    Raises:
        ValueError: for a dataset that can't be loaded, and one without labels where they are needed.
    """

    def __init__(
        self,
        args: EvaluationArguments,
        accelerator: Accelerator,
        duration_s: float,
        sampling_rates: Sequence[int],
        known_labels: list[str] | None = None,
        needs_labels: bool = False,
    ):
        with accelerator.main_process_first():  # the others find it in the cache
            dataset = args.load(args.split)
        if args.single_events:
            dataset = single_events(dataset, duration_s)
        self._names = label_names(dataset) or []
        self.label_names = self._names if known_labels is None else list(known_labels)
        if needs_labels and not set(self._names) & set(self.label_names):
            raise ValueError("The dataset has none of the model's labels: evaluate it on sounds that have them.")
        self._crops = CropExamples(dataset, duration_s, sampling_rates, args.seed)
        self._needs_labels = needs_labels
        self._max_left_out = args.max_skipped_share * args.num_examples
        self._batch_size = args.batch_size
        self._accelerator = accelerator
        self._keys = _spread(args.num_examples, len(dataset))
        self._clips = list(dataset["clip"]) if args.single_events else range(len(dataset))
        self.left_out: list[tuple[str, str]] = []

    def measure(self, function: Callable[[list[dict]], Rows], description: str) -> Rows:
        """
        Applies a function to all crops, in batches that the processes share.

        Args:
            function (`Callable`): takes examples of [`CropExamples`] with their `index` in the whole set, and returns
                what was measured, tensors with one row per example.
            description (`str`): for the progress bar.

        Returns:
            The rows of all processes in the order of the crops, with `index`; `label`: of a crop with just one the
            label, else −1; and `clip`, the same number for all crops of a sound.

        Raises:
            ValueError: as soon as more crops are broken or silent than may be, with the name of the last; and when
                those that are left are of fewer than two sounds.
        """
        self.left_out = []
        batches = []
        own = own_batches(range(len(self._keys)), self._batch_size, self._accelerator)
        for indices in tqdm(own, description, disable=None if self._accelerator.is_main_process else True):
            examples = [example for example in map(self.read, indices) if self._is_usable(example)]
            if examples:
                labels = [example["labels"] for example in examples]
                index = {
                    "index": torch.tensor([example["index"] for example in examples]),
                    "label": torch.tensor([each[0] if len(each) == 1 else -1 for each in labels]),
                    "clip": torch.tensor([self._clips[self._keys[example["index"]][1]] for example in examples]),
                }
                batches.append(index | function(examples))
        self.left_out = gather_object(self.left_out)
        return gather_rows(batches)

    def read(self, index: int) -> dict:
        """One example, by its place in the set."""
        example = self._crops[self._keys[index]]
        names = [self._names[label] for label in example["labels"]]
        labels = [self.label_names.index(name) for name in names if name in self.label_names]
        return example | {"index": index, "labels": labels}

    def title(self, example: dict) -> str:
        """Its labels, or its number where there are none."""
        return ", ".join(self.label_names[label] for label in example["labels"]) or f"Sound {example['index'] + 1}"

    def _is_usable(self, example: dict) -> bool:
        reasons = list(example["skipped"])
        if not reasons and example["waveforms"][0].abs().max() < SILENCE_PEAK:
            reasons.append((example["name"], f"{example['name']} is silent where it was cut."))
        if reasons:
            self.left_out.append(reasons[0])
            if len(self.left_out) > self._max_left_out:
                raise ValueError(f"{reasons[0][1]} Leave it out of the dataset, or raise --max_skipped_share.")
            return False
        return bool(example["labels"]) or not self._needs_labels


def own_batches(items: Sequence, batch_size: int, accelerator: Accelerator) -> list[Sequence]:
    """
    This process's share of a sequence's batches. What is in a batch doesn't depend on the number of processes, and
    sizes differ by one at most.
    """
    count = math.ceil(len(items) / batch_size)
    batches = [items[len(items) * k // count : len(items) * (k + 1) // count] for k in range(count)]
    return batches[accelerator.process_index :: accelerator.num_processes]


def gather_rows(batches: list[Rows]) -> Rows:
    """
    All processes' measurements, in the order of the sounds.

    Args:
        batches (`list[dict[str, torch.Tensor]]`): of each of this process's batches what was measured, one row per
            sound in every tensor; `"index"` orders them, and `"clip"` tells what they are of.

    Raises:
        ValueError: when they are of fewer than two clips in all, which have no confidence interval.
    """
    batches = gather_object([{name: rows.cpu() for name, rows in batch.items()} for batch in batches])
    if len({clip for batch in batches for clip in batch["clip"].tolist()}) < 2:
        raise ValueError("An evaluation takes at least 2 usable sounds: name more, or another split.")
    merged = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    order = merged["index"].argsort()
    return {name: rows[order] for name, rows in merged.items()}


def describe_evaluation(
    report: Report, args: EvaluationArguments, codec: SatModel, crops: HeldOutCrops, listeners: Listeners
) -> None:
    """Adds whatever another evaluation must share for its figures to compare, and names the crops left out."""
    report.settings |= {
        "model": args.model,
        "codec": codec.fingerprint()[:12],
        "dataset": " ".join(filter(None, (args.dataset_name or "AudioSet", args.dataset_config_name, args.data_dir))),
        "split": args.split,
        "crops": f"{args.num_examples}{' of single events' if args.single_events else ''}",
        "crops left out": len(crops.left_out),
        "seconds per crop": codec.config.window_length_s,
        "seed": args.seed,
        "embeddings": ", ".join(str(embedding.info) for embedding in listeners.embeddings.values()),
        "classifier": args.classifier or "none",
        "batch size": args.batch_size,
        "processes": PartialState().num_processes,
    }
    report.notes += [f"Left out: {name} ({reason})" for name, reason in crops.left_out]


def _spread(count: int, num_sounds: int) -> list[tuple[int, int]]:
    """`(epoch, index)` of as many crops, spread evenly over the sounds."""
    if count <= num_sounds:
        return [(0, index * num_sounds // count) for index in range(count)]
    return [divmod(index, num_sounds) for index in range(count)]
