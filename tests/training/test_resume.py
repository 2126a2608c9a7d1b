"""A training that was killed and goes on ends, bit for bit, as one that wasn't."""

import itertools
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from forking import Forked, dies, read_lines, read_tensors
from recording import leave_out_pictures, record_steps, share_lstm_storage

from transformers_aar.training import sat_training
from transformers_aar.training.aar_training import AarStage
from transformers_aar.training.checkpoints import CheckpointFolder
from transformers_aar.training.sat_training import SatStage

VARIANTS = {
    "sat": {"max_steps": 12, "save_steps": 3, "validation_steps": 5, "per_device_batch_size": 4},
    "aar": {"max_steps": 12, "save_steps": 3, "validation_steps": 5, "per_device_batch_size": 4},
}
VARIANTS["sat"] |= {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}


def share_storage_when_prepared() -> None:
    """From now on LSTMs look as after a forward on a GPU, in every stage that begins."""

    def shared(original):
        def begin(stage, *args, **kwargs):
            original(stage, *args, **kwargs)
            share_lstm_storage(stage.model)

        return begin

    for stage in (SatStage, AarStage):
        stage.__init__ = shared(stage.__init__)


class Training:
    """A training in a folder, begun and gone on with as often as one likes."""

    def __init__(self, stage: str, options: dict, folder: Path):
        self.stage, self.folder = stage, folder
        self.options = options | {"output_dir": folder / "run", "resume": "latest"}

    def start(self, prepare=lambda: None) -> Forked:
        def prepare_all() -> None:
            leave_out_pictures()
            record_steps(self.folder)
            share_storage_when_prepared()
            prepare()

        return Forked(f"train_{self.stage}.py", self.options, self.folder, prepare_all)

    def records(self) -> list[dict]:
        path = self.folder / "process-0.jsonl"
        return read_lines(path) if path.exists() else []

    def finish(self) -> None:
        finished = self.start().wait()
        assert finished.status == 0, finished.stderr

    def assert_same(self, other: "Training") -> None:
        """The last checkpoint and the model, the figures and what each step was made of."""
        last = f"checkpoint-{self.options['max_steps']:06d}"
        for name in (last, "final"):
            left, right = (read_tensors(training.folder / "run" / name) for training in (self, other))
            assert left.keys() == right.keys()
            assert all(torch.equal(tensor, right[key]) for key, tensor in left.items())
        left, right = (read_lines(training.folder / "run" / "metrics.jsonl") for training in (self, other))
        assert [entry | {"seconds": 0} for entry in left] == [entry | {"seconds": 0} for entry in right]
        taken, expected = ({entry["step"]: entry for entry in training.records()} for training in (self, other))
        assert taken == {step: expected[step] for step in taken}


@pytest.fixture(scope="module", params=VARIANTS)
def straight(request, options, tmp_path_factory) -> Training:
    """One that nothing happens to."""
    stage = request.param
    training = Training(stage, options[stage] | VARIANTS[stage], tmp_path_factory.mktemp(stage))
    training.finish()
    assert [entry["step"] for entry in training.records()] == list(range(12))
    if stage == "sat":
        assert sum(entry["revived"] for entry in training.records()) > 5
    return training


@pytest.mark.slow
def test_killed_at_random_moments(straight, tmp_path):
    """Three times, within or between steps, in a validation or a checkpoint."""
    training = Training(straight.stage, straight.options, tmp_path)
    moments = random.Random(0)
    for earliest in (1, 4, 8):
        begun, wanted = len(training.records()), earliest + moments.randrange(3)
        process = training.start()
        while not any(entry["step"] >= wanted for entry in training.records()[begun:]):
            assert process.is_running()
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        assert process.wait().status == -signal.SIGKILL
    training.finish()
    assert len(training.records()) > 12  # some steps were taken again
    training.assert_same(straight)


@pytest.mark.slow
def test_the_start_is_computed_once(options, tmp_path):
    """A run that goes on has the weights that were computed from sounds in its checkpoint."""
    computed = options["sat"] | {"data_dependent_init": True, "max_steps": 2, "save_steps": 1}
    straight, training = (Training("sat", computed, tmp_path / name) for name in ("straight", "training"))
    straight.finish()
    process = Forked("train_sat.py", training.options | {"max_minutes": 1e-6}, training.folder, leave_out_pictures)
    assert process.wait().stdout.startswith("Stopped after step 1; ")

    def refuse_to_start() -> None:
        sat_training.initialize_from_data = None

    assert training.start(refuse_to_start).wait().status == 0
    training.assert_same(straight)


def kill_copies_at_every_event_of_step(step: int) -> None:
    """
    From now on, when the checkpoint of this step is due, copies of the process each write it to a copy of the output
    folder, and are killed one event later than the one before.
    """

    def save(folder: CheckpointFolder, now: int, *args, original=CheckpointFolder.save) -> Path:
        for deadline in itertools.count(1) if now == step else ():
            copy = folder.output_dir.with_name(f"killed-{deadline:02d}")
            shutil.copytree(folder.output_dir, copy / "run")
            other = CheckpointFolder(copy / "run", folder.stage, folder.keep)
            if not dies(lambda other=other: original(other, now, *args), copy, deadline):
                break
        path = original(folder, now, *args)
        shutil.copytree(path, folder.output_dir.parent / "expected" / str(now))
        return path

    CheckpointFolder.save = save


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_killed_at_every_moment_of_a_checkpoint(options, tmp_path, stage):
    """While the second of three checkpoints is written and the first one makes way."""
    chosen = options[stage] | {"max_steps": 3, "save_steps": 1, "validation_steps": 1, "save_total_limit": 1}
    straight = Training(stage, chosen, tmp_path)
    assert straight.start(lambda: kill_copies_at_every_event_of_step(2)).wait().status == 0
    copies = sorted(tmp_path.glob("killed-*"))
    assert len(copies) > 20
    steps = [step_of_latest(copy, stage) for copy in copies]
    first_with_new = steps.index(2)
    assert steps == [1] * first_with_new + [2] * (len(copies) - first_with_new)
    # what they go on from is the same for all before that, and for all after: some of them do
    for copy in sorted({*copies[::6], *copies[first_with_new - 1 : first_with_new + 1], copies[-1]}):
        training = Training(stage, chosen, copy)
        training.finish()
        taken = [entry["step"] for entry in training.records()]
        assert taken == list(range(steps[copies.index(copy)], 3))
        training.assert_same(straight)
        names = sorted(path.name for path in (copy / "run").iterdir())
        assert names == ["checkpoint-000003", "final", "metrics.jsonl"]


def step_of_latest(copy: Path, stage: str) -> int:
    """The step of the newest checkpoint, which is what the others of that step are, to the bit."""
    latest = CheckpointFolder(copy / "run", stage, keep=1).latest()
    step = latest.state["progress"]["step"]
    tensors = read_tensors(latest.path)
    expected = read_tensors(copy.parent / "expected" / str(step))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    return step
