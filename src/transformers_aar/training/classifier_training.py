"""Trains the classifier of single events that judges what codecs and generators make."""

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.utils import logging

from ..configuration_sat import POSITIVE_INTEGER, POSITIVE_NUMBER, check_fields
from ..data.audioset import label_names, load_audio_dataset
from ..data.events import single_events
from ..data.examples import CropExamples
from ..evaluation.sound_classifier import SAMPLING_RATE, SoundClassifier
from .arguments import COUNT, TEXT, option

RULES = {
    **dict.fromkeys(("data_dir", "output_dir", "train_split", "validation_split"), TEXT),
    **dict.fromkeys(("max_steps", "batch_size", "num_validation_examples"), POSITIVE_INTEGER),
    **dict.fromkeys(("learning_rate", "duration_s"), POSITIVE_NUMBER),
    **dict.fromkeys(("seed", "dataloader_num_workers"), COUNT),
}


@dataclass
class ClassifierArguments:
    """What the classifier learns from, and for how long."""

    data_dir: str = option("Folder in AudioSet's layout with strong labels.")
    output_dir: str = option("Folder for the classifier.")
    train_split: str = option("Split to train on.", "unbalanced_train")
    validation_split: str = option("Split to validate on.", "eval")
    num_validation_examples: int = option("Held-out crops that the accuracy is measured on.", 2000)
    duration_s: float = option("Length of a crop in seconds.", 1.0)
    max_steps: int = option("Optimizer steps.", 1000)
    batch_size: int = option("Crops per step and process.", 64)
    learning_rate: float = option("Peak learning rate.", 2e-3)
    dataloader_num_workers: int = option("Processes that read sounds; 0 reads in this one.", 1)
    seed: int = option("Another seed: other initial weights, order of sounds and crops.", 0)
    use_cpu: bool = option("Trains on the CPU, whatever else there is.", False)

    def __post_init__(self):
        check_fields(self, RULES)


class EventCrops(Dataset):
    """So many crops of events, new ones whenever all events have had their turn."""

    def __init__(self, crops: CropExamples, count: int):
        self.crops = crops
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        example = self.crops[divmod(index, len(self.crops))]
        return {"waveforms": example["waveforms"][0][0], "labels": torch.tensor(example["labels"][0])}


def train_classifier(args: ClassifierArguments) -> None:
    """
    Trains a [`SoundClassifier`] on crops in which one event is heard alone, and saves it.

    Raises:
        ValueError: for a dataset that can't be loaded or doesn't tell when its events happen.
    """
    logging.set_verbosity_error()
    datasets = [load_audio_dataset(split, args.data_dir) for split in (args.train_split, args.validation_split)]
    classifier = SoundClassifier.new(label_names(datasets[0]) or [])
    events = (single_events(dataset, args.duration_s).shuffle(args.seed) for dataset in datasets)
    train_crops, held_out = (CropExamples(each, args.duration_s, [SAMPLING_RATE], args.seed) for each in events)
    trainer = Trainer(
        classifier,
        TrainingArguments(
            args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.max_steps // 20,
            weight_decay=0.01,
            dataloader_num_workers=args.dataloader_num_workers,
            seed=args.seed,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            use_cpu=args.use_cpu,
            remove_unused_columns=False,
            label_names=["labels"],
        ),
        train_dataset=EventCrops(train_crops, args.max_steps * args.batch_size),
        eval_dataset=EventCrops(held_out, args.num_validation_examples),
        compute_metrics=share_right,
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        classifier.save(args.output_dir)
        print(f"{args.output_dir}: names {accuracy:.1%} of {args.num_validation_examples} held-out crops rightly")


def share_right(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
