"""scripts/train_sat.py and scripts/train_aar.py as people start them: recipes, processes, kinds of data, mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recording
import soundfile
from clips import RATE, write_clips
from forking import SCRIPTS, Finished, Forked, as_words, read_lines
from transformers import AutoModel, ClapModel, pipeline

NUM_STEPS = 3
SMALL = {
    **{"max_steps": NUM_STEPS, "per_device_batch_size": 4, "num_validation_examples": 3, "logging_steps": 1},
    **{"validation_steps": 3, "save_steps": 2, "dataloader_num_workers": 1, "use_cpu": True},
}
SMALL_SAT = SMALL | {"codebook_start_examples": 8}
MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_AAR = SMALL | {"model_config": json.dumps({"conditioning": "label", "drop_path_rate": 0.2, **MODEL})}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audioset")
    write_clips(folder, "unbalanced_train", 9, strong=True)
    write_clips(folder, "eval", 4, strong=True)
    return folder


@pytest.fixture(scope="module")
def codec_dir(tmp_path_factory, build_codec) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    build_codec().save_pretrained(folder)
    return folder


@pytest.fixture
def small_sat(short_codec_fields, data_dir) -> dict:
    return SMALL_SAT | {"codec_config": json.dumps(short_codec_fields), "data_dir": data_dir}


@pytest.fixture
def small_aar(codec_dir, data_dir) -> dict:
    return SMALL_AAR | {"codec": codec_dir, "data_dir": data_dir}


def launch(script: str, options: dict, folder: Path, recipe: str | None = None, num_processes: int = 1) -> Finished:
    """Starts a script anew, and writes down what its processes do."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command = [sys.executable, *(launcher if num_processes > 1 else []), recording.__file__, folder, SCRIPTS / script]
    command += [] if recipe is None else [SCRIPTS / "configs" / recipe]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        list(map(str, [*command, *as_words(options)])), capture_output=True, text=True, env=environment, timeout=300
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def assert_trained(finished: Finished, run: Path) -> list[dict]:
    """The lines of `metrics.jsonl`."""
    assert finished.status == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == f"The finished model is in {run / 'final'}."
    folders = sorted(path.name for path in run.iterdir() if path.is_dir())
    assert {"checkpoint-000002", "checkpoint-000003", "final", "sounds"} <= set(folders)
    entries = read_lines(run / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "train/grad_norm" in entry] == [1, 2, 3]
    assert [entry["step"] for entry in entries if "train/grad_norm" not in entry] == [3]
    return entries


def test_both_stages(tmp_path, small_sat, small_aar):
    """By the small recipes, with TensorBoard's files beside; the second stage is given what the first one made."""
    sat_run, aar_run = tmp_path / "sat", tmp_path / "aar"
    finished = launch("train_sat.py", small_sat | {"output_dir": sat_run}, tmp_path, "sat_small.yaml")
    entries = assert_trained(finished, sat_run)
    assert "train/mel" in entries[-2] and "validation/perplexity/3" in entries[-1]
    assert list((sat_run / "sat").rglob("events.out.tfevents.*"))
    codec = AutoModel.from_pretrained(sat_run / "final")

    chosen = small_aar | {"codec": sat_run / "final", "output_dir": aar_run}
    finished = launch("train_aar.py", chosen, tmp_path, "aar_small.yaml")
    entries = assert_trained(finished, aar_run)
    assert "validation/accuracy/3" in entries[-1]
    generator = AutoModel.from_pretrained(aar_run / "final")
    assert generator.codec_model.fingerprint() == codec.fingerprint()
    assert np.isfinite(pipeline("text-to-audio", model=str(aar_run / "final"))("Dog")["audio"]).all()
    assert {entry["num_processes"] for entry in read_lines(tmp_path / "process-0.jsonl")} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_two_processes(tmp_path, small_sat, small_aar, stage):
    """They follow one that takes the whole batch, in the two steps before rounding may choose other codes."""
    chosen = {"sat": small_sat, "aar": small_aar}[stage] | {"mixed_precision": "no"}
    logs = {}
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        folder.mkdir()
        options = chosen | {"output_dir": folder / "run", "per_device_batch_size": 4 // num_processes}
        finished = launch(f"train_{stage}.py", options, folder, f"{stage}_small.yaml", num_processes)
        logs[num_processes] = assert_trained(finished, folder / "run")
        records = [read_lines(path) for path in sorted(folder.glob("process-*.jsonl"))]
        assert len(records) == num_processes
        assert {entry["num_processes"] for own in records for entry in own} == {num_processes}
        assert len({json.dumps([entry["codebooks"] for entry in own]) for own in records}) == 1
    for one, two in zip(logs[1][:2], logs[2][:2]):
        assert one.keys() == two.keys()
        for name in one.keys() - {"seconds"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.slow
def test_from_a_token_cache(tmp_path, small_aar, codec_dir, data_dir):
    """Which is also refused beside another codec."""
    caches = {}
    for split in ("unbalanced_train", "eval"):
        caches[split] = tmp_path / split
        options = {"codec": codec_dir, "data_dir": data_dir, "split": split, "output_dir": caches[split]}
        finished = Forked("tokenize_dataset.py", options | {"dataloader_num_workers": 0}, tmp_path).wait()
        assert finished.status == 0, finished.stderr
    cached = {"token_cache": caches["unbalanced_train"], "validation_token_cache": caches["eval"]}
    without_sounds = {name: value for name, value in small_aar.items() if name != "data_dir"}
    options = without_sounds | cached | {"output_dir": tmp_path / "run"}
    finished = launch("train_aar.py", options, tmp_path, "aar_small.yaml")
    assert_trained(finished, tmp_path / "run")
    (names,) = read_lines(tmp_path / "process-0.jsonl")[0]["names"]
    assert all(name.startswith("unbalanced_train-") and ", window " in name for name in names)

    other = AutoModel.from_pretrained(codec_dir)
    other.quantizer.codebook.add_(1)
    other.save_pretrained(tmp_path / "other")
    options |= {"codec": tmp_path / "other", "output_dir": tmp_path / "refused"}
    message = mistake(Forked("train_aar.py", options, tmp_path).wait())
    assert f"{caches['unbalanced_train']} was made by another codec" in message


@pytest.mark.slow
def test_from_a_folder_of_any_sounds(tmp_path, small_sat, small_aar):
    """`datasets` makes labels of its sub-folders."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for number in range(count):
            folder = tmp_path / "sounds" / split / ("hiss" if number % 2 else "rumble")
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / f"{number}.flac", 0.2 * rng.standard_normal(RATE // 5), RATE)
    source = {"dataset_name": "audiofolder", "data_dir": tmp_path / "sounds", "train_split": "train"}
    source |= {"validation_split": "test", "report_to": "none"}
    for stage, chosen in (("sat", small_sat | {"discriminators": "{}"}), ("aar", small_aar)):
        run = tmp_path / stage
        assert_trained(Forked(f"train_{stage}.py", chosen | source | {"output_dir": run}, tmp_path).wait(), run)
    assert AutoModel.from_pretrained(tmp_path / "aar" / "final").config.labels == ["hiss", "rumble"]


@pytest.mark.slow
def test_without_conditioning(tmp_path, small_aar):
    """Sounds without labels: validation makes some all the same, of nothing but random numbers."""
    options = small_aar | {"model_config": json.dumps(MODEL | {"conditioning": "none"}), "report_to": "none"}
    finished = Forked("train_aar.py", options | {"output_dir": tmp_path / "run"}, tmp_path).wait()
    assert_trained(finished, tmp_path / "run")
    sounds = sorted(path.name for path in (tmp_path / "run" / "sounds" / "step-000003").glob("*.wav"))
    assert sounds[:2] == ["sound_1.wav", "sound_2.wav"] and len(sounds) > 2


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_conditioned_by_clap(tmp_path, small_aar, clap_config, build_clap_processor, cached):
    """Which hears each crop at its own rate, or has heard it when the tokens were made."""
    ClapModel(clap_config).save_pretrained(tmp_path / "clap")
    build_clap_processor().save_pretrained(tmp_path / "clap")
    model_config = MODEL | {"conditioning": "clap", "conditioning_dim": 32}
    options = small_aar | {"model_config": json.dumps(model_config), "conditioner": tmp_path / "clap"}
    options |= {"output_dir": tmp_path / "run", "report_to": "none", "prompts": "barking"}
    for split, name in (("unbalanced_train", "token_cache"), ("eval", "validation_token_cache")) if cached else ():
        options[name] = tmp_path / split
        source = {"codec": options["codec"], "data_dir": options["data_dir"], "split": split}
        source |= {"conditioner": tmp_path / "clap", "output_dir": tmp_path / split, "dataloader_num_workers": 0}
        finished = Forked("tokenize_dataset.py", source, tmp_path).wait()
        assert finished.status == 0, finished.stderr
    finished = Forked("train_aar.py", options, tmp_path).wait()
    entries = assert_trained(finished, tmp_path / "run")
    assert entries[-1]["validation/loss"] != entries[-1]["validation/loss_with_neighbours_conditioning"]
    assert (tmp_path / "run" / "sounds" / "step-000003" / "barking.wav").is_file()
    made = pipeline("text-to-audio", model=str(tmp_path / "run" / "final"))("barking")
    assert np.isfinite(made["audio"]).all()


def test_files_that_cannot_be_read(tmp_path, small_sat):
    """One after the other: the run ends in a sentence, and so do the processes that read for it."""
    write_clips(tmp_path, "unbalanced_train", 9)
    write_clips(tmp_path, "eval", 4)
    for path in (tmp_path / "audioset_unbalanced_train_mp3").iterdir():
        path.write_bytes(b"no sound")
    options = small_sat | {"data_dir": tmp_path, "output_dir": tmp_path / "run", "codebook_start_examples": 2}
    finished = launch("train_sat.py", options | {"discriminators": "{}"}, tmp_path)
    assert "20 files in a row can't be read; the last one: " in mistake(finished)


def test_runs_are_not_mixed_up(tmp_path, small_sat, small_aar, codec_dir):
    """Neither is anything of another run overwritten, nor does a run go on with another codec."""
    sat_run, aar_run = tmp_path / "sat", tmp_path / "aar"
    options = small_sat | {"discriminators": "{}", "output_dir": sat_run}
    assert Forked("train_sat.py", options, tmp_path).wait().status == 0
    before = (sat_run / "checkpoint-000002" / "model.safetensors").read_bytes()
    for resume in ({}, {"resume": "latest"}):
        finished = Forked("train_aar.py", small_aar | {"output_dir": sat_run} | resume, tmp_path).wait()
        assert f"{sat_run / 'checkpoint-000002'} is of no use to this run, which would overwrite" in mistake(finished)
    assert (sat_run / "checkpoint-000002" / "model.safetensors").read_bytes() == before
    assert AutoModel.from_pretrained(sat_run / "final").config.model_type == "sat"

    assert Forked("train_aar.py", small_aar | {"output_dir": aar_run}, tmp_path).wait().status == 0
    other = AutoModel.from_pretrained(codec_dir)
    other.quantizer.codebook.add_(1)
    other.save_pretrained(tmp_path / "other")
    changed = {"codec": tmp_path / "other", "output_dir": aar_run, "max_steps": 4, "resume": "latest"}
    assert "was made with another codec" in mistake(Forked("train_aar.py", small_aar | changed, tmp_path).wait())


def mistake(finished: Finished) -> str:
    """The one sentence that a run was refused with."""
    assert finished.status in (1, 2), finished.stderr
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("Error: ")]
    return line


@pytest.mark.parametrize(
    "stage, changed, message",
    [
        ("sat", {"data_dir": None}, "Name a folder in AudioSet's layout (data_dir), or a dataset (dataset_name)."),
        ("sat", {"data_dir": "nowhere"}, "nowhere isn't a folder in AudioSet's layout"),
        ("sat", {"data_dir": SCRIPTS}, "isn't a folder in AudioSet's layout"),
        ("sat", {"train_split": "balanced_train"}, "balanced_train"),
        ("sat", {"validation_split": "evaluation"}, "evaluation"),
        ("sat", {"dataset_name": "audiofolder", "data_dir": "nowhere"}, "nowhere"),
        ("sat", {"audio_column": "sound"}, "The dataset has no column 'sound': it has "),
        ("sat", {"single_events": True, "codec_config": "{}"}, "No event of the dataset is heard alone for 1.0 s"),
        ("sat", {"model_name_or_path": "nowhere"}, "nowhere"),
        ("sat", {"resume": "nowhere"}, "nowhere can't be used: it has no checkpoint.json"),
        ("sat", {"output_dir": Path(__file__)}, f"The folder {__file__} can't be made: "),
        ("sat", {"learning_rat": 1.0}, "`learning_rat` is no option: the nearest is `learning_rate`"),
        ("aar", {"codec": SCRIPTS}, str(SCRIPTS)),
        ("aar", {"prompts": "Dgo"}, "Dgo"),
        ("aar", {"codec": "nowhere"}, "nowhere"),
        ("aar", {"token_cache": SCRIPTS, "validation_token_cache": SCRIPTS}, f"{SCRIPTS} is no token cache"),
        ("aar", {"model_config": json.dumps({"conditioning": "clap"}), "conditioner": SCRIPTS}, str(SCRIPTS)),
    ],
)
def test_mistakes(tmp_path, small_sat, small_aar, monkeypatch, stage, changed, message):
    monkeypatch.chdir(tmp_path)
    chosen = {"sat": small_sat, "aar": small_aar}[stage] | {"output_dir": tmp_path / "run"} | changed
    chosen = {name: value for name, value in chosen.items() if value is not None}
    assert message in mistake(Forked(f"train_{stage}.py", chosen, tmp_path).wait())
    assert not (tmp_path / "run" / "final").exists()
