"""scripts/train_classifier.py as a user runs it: on a synthesised AudioSet."""

from pathlib import Path

import pytest
import torch
from clips import write_clips
from datasets import Dataset
from forking import Finished, Forked

from transformers_aar.data.synthesis import SOUND_KINDS
from transformers_aar.data.synthetic_audioset import write_audioset
from transformers_aar.evaluation.sound_classifier import SoundClassifier
from transformers_aar.training.classifier_training import ClassifierArguments, train_classifier

SMALL = {
    **{"max_steps": 2, "batch_size": 4, "num_validation_examples": 4, "dataloader_num_workers": 0},
    **{"use_cpu": True},
}


@pytest.fixture(scope="module")
def sounds_dir(tmp_path_factory) -> Path:
    """Three clips to train on and two to validate on."""
    folder = tmp_path_factory.mktemp("sounds")
    write_audioset(folder, hours=0.008, eval_hours=0.005)
    return folder


def run(folder: Path, **options) -> Finished:
    return Forked("train_classifier.py", SMALL | {"output_dir": folder / "classifier"} | options, folder).wait()


def test_training(sounds_dir, tmp_path):
    finished = run(tmp_path, data_dir=sounds_dir)
    assert finished.status == 0, finished.stderr
    assert f"{tmp_path / 'classifier'}: names " in finished.stdout and "of 4 held-out crops" in finished.stdout
    assert SoundClassifier.load(tmp_path / "classifier").labels == list(SOUND_KINDS)


def test_another_seed_draws_other_crops(sounds_dir, tmp_path, monkeypatch):
    datasets = []

    class NoTrainer:
        def __init__(self, *_, train_dataset, eval_dataset, **__):
            datasets.append((train_dataset, eval_dataset))
            raise StopIteration

    monkeypatch.setattr("transformers_aar.training.classifier_training.Trainer", NoTrainer)
    monkeypatch.setattr(Dataset, "shuffle", lambda dataset, _: dataset)
    for seed in (0, 1):
        with pytest.raises(StopIteration):
            train_classifier(ClassifierArguments(str(sounds_dir), str(tmp_path), seed=seed))
    for one, other in zip(*datasets):
        assert not torch.equal(one[0]["waveforms"], other[0]["waveforms"])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"data_dir": "nowhere"}, "nowhere isn't a folder in AudioSet's layout"),
        ({"max_steps": 0}, "`max_steps` must be a positive whole number"),
        ({"duration_s": 60.0}, "No event of the dataset is heard alone for 60.0 s"),
        ({"datadir": "x"}, "`datadir` is no option: the nearest is `data_dir`"),
    ],
)
def test_mistakes_end_in_one_sentence(sounds_dir, tmp_path, changed, message):
    finished = run(tmp_path, **{"data_dir": sounds_dir} | changed)
    assert finished.status in (1, 2) and "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("Error: ")]
    assert message in line
    assert not (tmp_path / "classifier" / "model.safetensors").exists()


def test_sounds_without_times_are_refused(tmp_path):
    """AudioSet's weak labels don't tell when an event is heard."""
    for split in ("unbalanced_train", "eval"):
        write_clips(tmp_path / "weak", split, 3)
    finished = run(tmp_path, data_dir=tmp_path / "weak")
    assert finished.status == 1
    assert "Error: No event of the dataset is heard alone" in finished.stderr
