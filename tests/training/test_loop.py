"""How a training ends: finished, stopped, refused or failed; and what it leaves for people to look at and load."""

import errno
import json
import os
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from clips import RATE, SOUNDS, write_clips
from datasets import Dataset
from forking import Finished, Forked, rank_environments, read_lines, read_tensors
from recording import leave_out_pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoFeatureExtractor, AutoModel, pipeline

from transformers_aar import AarConfig
from transformers_aar.data.examples import CropExamples
from transformers_aar.training.checkpoints import CheckpointFolder
from transformers_aar.training.loop import (
    Progress,
    StopTraining,
    check_skipped,
    file_names,
    first_difference,
    step_of,
    take_step,
)
from transformers_aar.training.runs import with_labels
from transformers_aar.training.sat_training import SatStage


@pytest.fixture
def train(tmp_path, options):
    """Runs a stage to its end, in the folder `run`; the options given go before those of the tests."""

    def run(stage: str = "sat", prepare=lambda: None, **given) -> Finished:
        def prepare_all() -> None:
            leave_out_pictures()
            prepare()

        chosen = options[stage] | {"output_dir": tmp_path / "run", "max_steps": 3} | given
        return Forked(f"train_{stage}.py", chosen, tmp_path, prepare_all).wait()

    return run


def sentence(finished: Finished) -> str:
    """The one sentence that a run ended with."""
    assert finished.status == 1, finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in finished.stderr
    return line


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- how processes may share it


@pytest.mark.parametrize("name", ["deepspeed", "megatron_lm"])
@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_other_ways_to_share_a_training(tmp_path, options, stage, name):
    chosen = options[stage] | {"output_dir": tmp_path / "run"}
    environment = {f"ACCELERATE_USE_{name.upper()}": "true"}
    finished = Forked(f"train_{stage}.py", chosen, tmp_path, environment=environment).wait()
    assert sentence(finished).endswith(f"or, the generator's, by FSDP: leave out --use_{name}.")


@pytest.mark.parametrize(
    "distributed_type, message",
    [
        ("FSDP", "trained whole on every device: leave out --use_fsdp"),
        ("MULTI_GPU", "at least the 4 processes, got 3"),
    ],
)
def test_what_a_tokenizer_cant_be_shared_by(distributed_type, message):
    accelerator = SimpleNamespace(distributed_type=DistributedType(distributed_type), num_processes=4)
    with pytest.raises(ValueError, match=message):
        SatStage(accelerator, SimpleNamespace(codebook_start_examples=3), *(None,) * 5, max_steps=1)


# --- what can't be trained on


def test_gradients_that_arent_finite_leave_the_weights(tmp_path):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    before = layer.weight.detach().clone()
    (layer(torch.ones(1, 2)).sum() * torch.nan).backward()
    with pytest.raises(FloatingPointError, match="the gradients are not finite"):
        take_step(Accelerator(cpu=True), optimizer, layer.parameters(), 1.0)
    assert torch.equal(layer.weight, before)
    assert not optimizer.state


def test_a_loss_that_isnt_finite(tmp_path, train):
    """From a sound of absurd loudness: its file is named, and what was saved before is sound."""
    write_clips(tmp_path / "sounds", "unbalanced_train", 9)
    write_clips(tmp_path / "sounds", "eval", 2)
    third_batch = np.random.Generator(np.random.PCG64([0, 0])).permutation(9)[4]
    loud = tmp_path / "sounds" / SOUNDS["unbalanced_train"] / f"Yunbalanced_train-{third_batch:02d}.wav"
    soundfile.write(loud, np.full(RATE // 10, 1e30), RATE, "FLOAT")
    finished = train(data_dir=tmp_path / "sounds", per_device_batch_size=2, save_steps=1, max_steps=4)
    message = sentence(finished)
    assert "the gradients are not finite" in message
    assert str(loud) in message
    newest = tmp_path / "run" / "checkpoint-000002"
    assert message.startswith("Error: In step 3 ")
    assert f"The last good checkpoint is {newest}: " in message
    assert all(tensor.isfinite().all() for tensor in read_tensors(newest).values())
    assert not (tmp_path / "run" / "final").exists()


def test_a_loss_that_isnt_finite_in_one_of_two_processes(tmp_path, options):
    """Both end, and the sounds of both are named once."""

    def spoil_second_step() -> None:
        def losses(stage, *args, original=SatStage._losses):
            values = original(stage, *args)
            stage.calls = getattr(stage, "calls", 0) + 1
            if stage.calls == 2 and stage.accelerator.process_index == 1:
                values["wave"] = values["wave"] * torch.nan
            return values

        SatStage._losses = losses

    chosen = options["sat"] | {"output_dir": tmp_path / "run", "max_steps": 3, "per_device_batch_size": 2}
    processes = [
        Forked("train_sat.py", chosen, tmp_path / f"output-{rank}", spoil_second_step, environment)
        for rank, environment in enumerate(rank_environments(2))
    ]
    first, second = (process.wait() for process in processes)
    message = sentence(first)
    assert message.startswith("Error: In step 2 the gradients are not finite. Its batch was ")
    assert message.count(".wav") == 4
    assert "The last good checkpoint is none" in message
    assert (second.status, "Error" in second.stderr) == (1, False)


def break_clips(folder: Path, count: int) -> list[Path]:
    paths = sorted((folder / SOUNDS["unbalanced_train"]).iterdir())[:count]
    for path in paths:
        path.write_bytes(b"no sound")
    return paths


@pytest.fixture
def sounds(tmp_path) -> Path:
    write_clips(tmp_path / "sounds", "unbalanced_train", 12)
    write_clips(tmp_path / "sounds", "eval", 2)
    return tmp_path / "sounds"


def test_some_broken_and_missing_files(tmp_path, train, sounds):
    """They are left out, counted and listed."""
    *broken, gone = break_clips(sounds, 3)
    gone.unlink()
    finished = train(data_dir=sounds, max_skipped_share=0.3)
    assert finished.status == 0, finished.stderr
    report = json.loads((tmp_path / "run" / "skipped_files.json").read_text())
    assert report.keys() == {gone.stem[1:], *map(str, broken)}
    assert all(str(path) in report[str(path)] for path in broken)
    last_lines = finished.stdout.splitlines()[-2:]
    assert last_lines == [
        f"3 sounds were missing or couldn't be read; {tmp_path / 'run' / 'skipped_files.json'} lists them.",
        f"The finished model is in {tmp_path / 'run' / 'final'}.",
    ]


def test_too_many_broken_files(tmp_path, train, sounds):
    broken = break_clips(sounds, 4)
    message = sentence(train(data_dir=sounds, max_skipped_share=0.1))
    assert "of the files that were wanted couldn't be read, and 10.0% may be missing; one of them: " in message
    assert any(str(path) in message for path in broken)
    assert "raise --max_skipped_share" in message


def test_files_that_only_one_of_two_processes_cant_read(tmp_path, options):
    """Its sentence is said, though it isn't the main one."""

    def give_up(*_) -> dict:
        raise ValueError("20 files in a row can't be read.")

    def break_second() -> None:
        if os.environ["RANK"] == "1":
            CropExamples.__getitem__ = give_up

    chosen = options["sat"] | {"output_dir": tmp_path / "run", "max_steps": 1, "per_device_batch_size": 2}
    processes = [
        Forked("train_sat.py", chosen, tmp_path / f"output-{rank}", break_second, environment)
        for rank, environment in enumerate(rank_environments(2))
    ]
    first, second = (process.wait() for process in processes)
    assert sentence(second) == "Error: 20 files in a row can't be read."
    assert first.status != 0


def test_processes_wait_for_each_other(tmp_path, options):
    """Longer than PyTorch lets them by default, while the first one prepares a dataset or writes a checkpoint."""

    def note_timeout(**kwargs) -> None:
        (tmp_path / "hours").write_text(str(kwargs["timeout"].total_seconds() / 3600))
        raise SystemExit(0)

    prepare = partial(setattr, torch.distributed, "init_process_group", note_timeout)
    chosen = options["sat"] | {"output_dir": tmp_path / "run"}
    assert Forked("train_sat.py", chosen, tmp_path, prepare, rank_environments(2)[0]).wait().status == 0
    assert (tmp_path / "hours").read_text() == "6.0"


@pytest.mark.parametrize(
    "num_skipped, num_read, num_files, share",
    [
        (1, 8, 100_000, None),  # the first of many
        (10, 8, 100_000, None),
        (11, 8, 100_000, "1.1%"),
        (21, 2000, 100_000, "1.1%"),  # of 2000
        (20, 2000, 100_000, None),
        (1, 8, 50, "2.0%"),
        (2, 10_000, 100, "2.0%"),  # a hundred times over
        (1, 10_000, 100, None),
    ],
)
def test_share_of_broken_files(num_skipped, num_read, num_files, share):
    skipped = {f"{number}.wav": f"{number}.wav can't be read." for number in range(num_skipped)}
    progress = Progress(skipped=skipped, examples_read=num_read)
    if share is None:
        check_skipped(progress, 0.01, num_files)
    else:
        with pytest.raises(StopTraining, match=f"^{share} of the files .*; one of them: {num_skipped - 1}.wav can't"):
            check_skipped(progress, 0.01, num_files)


def test_examples_of_all_processes_are_counted(tmp_path, train, options):
    """So that the share of broken files is the same when fewer processes go on."""
    chosen = options["sat"] | {"output_dir": tmp_path / "run", "max_steps": 1, "per_device_batch_size": 2}
    processes = [
        Forked("train_sat.py", chosen, tmp_path / f"output-{rank}", environment=environment)
        for rank, environment in enumerate(rank_environments(2))
    ]
    assert [process.wait().status for process in processes] == [0, 0]
    assert train(max_steps=3, per_device_batch_size=4, resume="latest").status == 0
    states = [CheckpointFolder(tmp_path / "run", "sat", 3).load(path).state for path in (tmp_path / "run").glob("c*")]
    counts = {state["progress"]["step"]: state["progress"]["examples_read"] for state in states}
    assert counts == {1: 4, 3: 12}


def test_processes_exchange_only_what_is_new(monkeypatch):
    exchanged = []
    monkeypatch.setattr("transformers_aar.training.loop.gather_object", lambda items: exchanged.append(items) or items)
    progress = Progress()
    for name in ("a.wav", "a.wav", "b.wav"):
        progress.count([{"skipped": [(name, f"{name} can't be read.")]}], num_examples=2)
        progress.share_skipped()
    assert [[name for name, _ in items] for items in exchanged] == [["a.wav"], [], ["b.wav"]]
    assert list(progress.skipped) == ["a.wav", "b.wav"]


def test_nothing_to_validate_on():
    dataset = Dataset.from_dict({"labels": [[], [0, 1]]})
    assert len(with_labels(dataset)) == 1
    with pytest.raises(ValueError, match="None of the 2 sounds of a split has exactly 1 label: name another"):
        with_labels(dataset, exactly=1)


def test_too_many_missing_files(tmp_path, train, sounds):
    for path in break_clips(sounds, 4):
        path.unlink()
    message = sentence(train(data_dir=sounds, max_skipped_share=0.1))
    assert "4 of the 14 clips" in message
    assert not (tmp_path / "run").exists() or names(tmp_path / "run") == []


# --- disks


def test_a_full_disk(tmp_path, train):
    """The limit that the system sets on files stands in for it. Nothing is lost, and the run can go on."""

    def save(folder, step, *args, original=CheckpointFolder.save):
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        return original(folder, step, *args)

    run = tmp_path / "run"
    message = sentence(train(prepare=lambda: setattr(CheckpointFolder, "save", save), save_steps=1))
    assert message.startswith(f"Error: {run / 'checkpoint-000002'} can't be written: ")
    assert message.endswith(f"; the last good checkpoint is {run / 'checkpoint-000001'}.")
    assert names(run) == ["checkpoint-000001", "metrics.jsonl"]
    finished = train(save_steps=1, resume="latest")
    assert finished.status == 0, finished.stderr
    assert finished.stdout.startswith(f"Going on after step 1, from {run / 'checkpoint-000001'}.")
    assert [entry["step"] for entry in read_lines(run / "metrics.jsonl") if "train/wave" in entry] == [1, 2, 3]


def test_a_validation_that_fails(tmp_path, train):
    """Loses no steps: the run goes on with it."""

    def fail(_) -> None:
        raise ValueError("This sound can't be read.")

    chosen = {"save_steps": 2, "validation_steps": 2, "max_steps": 4}
    assert sentence(train(prepare=lambda: setattr(SatStage, "validate", fail), **chosen)).endswith("can't be read.")
    finished = train(resume="latest", **chosen)
    assert finished.stdout.startswith(f"Going on after step 2, from {tmp_path / 'run' / 'checkpoint-000002'}.")
    entries = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "validation/mel" in entry] == [2, 4]


def test_no_room_for_the_log(tmp_path, train):
    def open_nothing(path, mode="r", *args, original=Path.open, **kwargs):
        if mode == "a":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, mode, *args, **kwargs)

    message = sentence(train(prepare=lambda: setattr(Path, "open", open_nothing)))
    assert f"{tmp_path / 'run' / 'metrics.jsonl'} can't be written: No space left on device;" in message


def test_lines_that_a_process_died_over():
    assert step_of('{"step": 3, "train/loss": NaN}') == 3
    assert step_of('{"step": 3, "train/lo') == step_of("") == float("inf")


# --- stopping and going on


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(tmp_path, options, train, number):
    """The step is finished and saved, and the exit status is 0; the next run goes on after it."""
    run = tmp_path / "run"
    chosen = options["sat"] | {"output_dir": run, "max_steps": 200, "dataloader_num_workers": 1}
    process = Forked("train_sat.py", chosen, tmp_path, leave_out_pictures)
    while not (run / "metrics.jsonl").exists() or len(read_lines(run / "metrics.jsonl")) < 2:
        assert process.is_running()
        time.sleep(0.01)
    process.kill(number)
    finished = process.wait()
    assert finished.status == 0, finished.stderr
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name[-6:])
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == step
    assert finished.stdout.splitlines()[-1] == (
        f"Stopped after step {step}; --resume latest goes on from {checkpoint}."
    )
    finished = train(max_steps=step + 1, resume="latest")
    assert finished.status == 0, finished.stderr
    assert finished.stdout.startswith(f"Going on after step {step}, from {checkpoint}.")
    assert (run / "final").is_dir()


def test_a_second_ctrl_c_ends_it_at_once(tmp_path, options):
    started = tmp_path / "started"

    def sleep(*_) -> None:
        started.touch()
        time.sleep(60)

    chosen = options["sat"] | {"output_dir": tmp_path / "run", "max_steps": 3}
    process = Forked("train_sat.py", chosen, tmp_path, lambda: setattr(SatStage, "step", sleep))
    for _ in range(2):
        while not started.exists():
            assert process.is_running()
            time.sleep(0.01)
        process.kill(signal.SIGINT)
        time.sleep(0.2)
    finished = process.wait()
    assert finished.status == 130
    assert "Traceback" not in finished.stderr


def test_out_of_time(tmp_path, train):
    finished = train(max_minutes=1e-6)
    assert finished.status == 0, finished.stderr
    assert finished.stdout.startswith("Stopped after step 1; ")
    assert names(tmp_path / "run") == ["checkpoint-000001", "metrics.jsonl"]


def test_checkpoints_arent_overwritten_by_accident(tmp_path, train):
    assert train(max_steps=1).status == 0
    message = sentence(train(max_steps=2))
    assert "holds checkpoints of a run already, the last one checkpoint-000001: go on with --resume latest" in message


def test_a_finished_model_isnt_overwritten_by_accident(tmp_path, train):
    """Whose checkpoints someone has removed to save space."""
    run = tmp_path / "run"
    assert train(max_steps=1).status == 0
    shutil.rmtree(run / "checkpoint-000001")
    before = (run / "metrics.jsonl").read_text()
    for resume in ({}, {"resume": "latest"}):
        assert f"{run / 'final'} is of no use to this run, which would overwrite it" in sentence(train(**resume))
    assert (run / "metrics.jsonl").read_text() == before
    assert names(run) == ["final", "metrics.jsonl"]


def test_no_memory_for_a_checkpoint(tmp_path, train):
    """Isn't taken for a checkpoint of another model."""

    def fail(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert train(max_steps=1).status == 0
    finished = train(max_steps=2, resume="latest", prepare=lambda: setattr(SatStage, "load_files", fail))
    assert finished.status == 1
    assert "CUDA out of memory." in finished.stderr and "of another model" not in finished.stderr


def test_a_checkpoint_of_elsewhere(tmp_path, train):
    """Begins a run of its own in a new folder, and not in that of another run."""
    checkpoint = tmp_path / "run" / "checkpoint-000001"
    assert train(max_steps=1).status == 0
    other = tmp_path / "other"
    assert train(max_steps=2, output_dir=other, resume=checkpoint).status == 0
    before = (other / "metrics.jsonl").read_text()
    message = sentence(train(max_steps=3, output_dir=other, resume=checkpoint))
    assert f"{other / 'checkpoint-000002'} is of another run than {checkpoint}, and would be overwritten" in message
    assert (other / "metrics.jsonl").read_text() == before
    assert train(max_steps=3, output_dir=other, resume=other / "checkpoint-000002").status == 0


def test_a_folder_that_only_one_of_two_processes_sees(tmp_path, train, options):
    """As on machines that have no disk in common: both end, and nothing begins anew."""
    assert train(max_steps=1).status == 0
    chosen = options["sat"] | {"output_dir": "run", "max_steps": 2, "resume": "latest", "per_device_batch_size": 2}
    (tmp_path / "elsewhere").mkdir()
    processes = [
        Forked("train_sat.py", chosen, tmp_path / f"output-{rank}", partial(os.chdir, folder), environment)
        for rank, (folder, environment) in enumerate(zip((tmp_path, tmp_path / "elsewhere"), rank_environments(2)))
    ]
    first, second = (process.wait() for process in processes)
    assert "run/checkpoint-000001 can't be seen by process 1 of 2: put --output_dir on a disk" in sentence(first)
    assert second.status == 1
    assert names(tmp_path / "run") == ["checkpoint-000001", "final", "metrics.jsonl"]


def test_other_settings_are_named(tmp_path, train):
    assert train(max_steps=1).status == 0
    changed = {"learning_rate": 0.5, "seed": 3, "lr_schedule": "lin0", "max_grad_norm": 2.0}
    changed |= {"discriminator_skip_interval": 4, "logging_steps": 2}
    finished = train(max_steps=2, resume=tmp_path / "run" / "checkpoint-000001", **changed)
    assert finished.status == 0
    (line,) = [line for line in finished.stderr.splitlines() if "goes on with other settings" in line]
    _, _, changes = line.partition("than it began with: ")
    assert set(changes.rstrip(".").split("; ")) == {
        *("learning_rate was 0.001 and is 0.5", "max_steps was 1 and is 2", "seed was 0 and is 3"),
        *("lr_schedule was cosine and is lin0", "max_grad_norm was 1.0 and is 2.0"),
        "discriminator_skip_interval was 3 and is 4",
    }


# with tensors of the same shapes
OTHER_SCALES = {"num_filters": 2, "hidden_size": 8, "codebook_dim": 4, "codebook_size": 16, "num_lstm_layers": 1}
OTHER_SCALES |= {"window_length_s": 0.08, "scales": [1, 3, 4, 6], "phi_kernel_sizes": [3, 3]}


def test_what_a_configuration_may_not_change(tmp_path, build_generator):
    config = build_generator(conditioning="label", labels=["Dog", "Rain"]).config
    config.save_pretrained(tmp_path)

    def difference(codec_fields: dict = {}, **fields) -> str | None:  # noqa: B006
        other = AarConfig.from_pretrained(tmp_path, **fields)
        for name, value in codec_fields.items():
            setattr(other.codec_config, name, value)
        return first_difference(AarConfig.from_pretrained(tmp_path), other)

    changed = {
        "conditioning_dropout": 0.5,
        "drop_path_rate": 0.5,
        "use_cache": False,
        "auto_map": {"AutoConfig": "a.B"},
    }
    assert difference({"codebook_decay": 0.5}, **changed) is None
    assert difference(labels=["Rain", "Dog"]) == "labels was ['Dog', 'Rain'] and is ['Rain', 'Dog']"
    assert difference({"scales": [1, 3, 4, 6]}) == "scales was [1, 2, 4, 6] and is [1, 3, 4, 6]"


@pytest.mark.parametrize(
    "stage, changed",
    [
        ("sat", {"codec_config": '{"num_filters": 2, "hidden_size": 8, "codebook_size": 16}'}),
        ("sat", {"codec_config": json.dumps(OTHER_SCALES)}),
        ("sat", {"discriminators": '{"stft": {"n_ffts": [256]}}'}),
        ("aar", {"model_config": '{"conditioning": "label", "hidden_size": 128, "num_attention_heads": 2}'}),
    ],
)
def test_another_model_cant_go_on(tmp_path, train, stage, changed):
    assert train(stage, max_steps=1).status == 0
    message = sentence(train(stage, max_steps=2, resume="latest", **changed))
    assert f"{tmp_path / 'run' / 'checkpoint-000001'} is of another model than these options make" in message


# --- what it leaves


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_sounds_and_pictures(tmp_path, options, stage):
    """In TensorBoard and as files; checkpoints and the finished model load as any other."""
    run = tmp_path / "run"
    chosen = options[stage] | {"output_dir": run, "max_steps": 2, "validation_steps": 2, "save_steps": 1}
    finished = Forked(f"train_{stage}.py", chosen | {"report_to": "tensorboard"}, tmp_path).wait()
    assert finished.status == 0, finished.stderr

    events = EventAccumulator(str(run / stage), size_guidance={"audio": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"sat": "train/mel", "aar": "train/loss"}[stage] in tags["scalars"]
    assert {"sat": "validation/perplexity/3", "aar": "validation/accuracy/3"}[stage] in tags["scalars"]
    assert tags["images"] == ["sounds"]
    titles = {"sat": {"sound 1, original", "sound 1, reconstruction"}, "aar": {"Speech", "Male speech, man speaking"}}
    assert titles[stage] < set(tags["audio"])

    folder = run / "sounds" / "step-000002"
    files = {path.stem for path in folder.glob("*.wav")}
    assert len(files) == len(tags["audio"])
    assert all(soundfile.info(path).samplerate == RATE for path in folder.glob("*.wav"))
    assert (folder / "spectrograms.png").stat().st_size > 1000
    for saved in (run / "checkpoint-000001", run / "final"):
        model = AutoModel.from_pretrained(saved)
        if stage == "sat":
            extractor = AutoFeatureExtractor.from_pretrained(saved)
            inputs = extractor(np.zeros(3000, dtype=np.float32), sampling_rate=RATE, return_tensors="pt")
            assert model(**inputs).audio_values.shape == (1, 1, 3000)
        else:
            made = pipeline("text-to-audio", model=str(saved))("Siren")
            assert made["sampling_rate"] == RATE
            assert np.isfinite(made["audio"]).all()


def test_sounds_without_a_neighbour(tmp_path, train):
    """Have no neighbour's conditioning, instead of their own."""
    assert train("aar", per_device_batch_size=1, max_steps=1).status == 0
    entry = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert "validation/loss" in entry and "validation/loss_with_neighbours_conditioning" not in entry


def test_the_average_is_what_is_published(tmp_path, train):
    assert train("aar", ema_decay=0.9).status == 0
    run = tmp_path / "run"
    final = read_tensors(run / "final")
    averages = {name: value for name, value in read_tensors(run / "checkpoint-000003").items() if "average" in name}
    assert averages
    for name, value in averages.items():
        assert torch.equal(final[name.replace("average.safetensors", "model.safetensors")], value)


def test_names_of_sound_files():
    """Nothing that a file system doesn't take, nothing too long, and none twice."""
    titles = ["sound 1, original", "rock/pop", "rock pop", "x" * 300]
    assert file_names(titles) == ["sound_1-original", "rock_pop", "rock_pop-3", "x" * 80]
