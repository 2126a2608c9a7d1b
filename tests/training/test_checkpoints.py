"""Checkpoints: complete or passed over, whatever happens to disk and process; optimizers that come back exactly."""

import errno
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from forking import dies
from recording import share_lstm_storage
from torch import nn

from transformers_aar import SatModel
from transformers_aar.training.checkpoints import (
    MANIFEST,
    CheckpointFolder,
    load_optimizer_state,
    model_state,
    optimizer_state,
)


def writer(value: int, size: int = 1000):
    """Writes what a training writes: tensors, a configuration, and a folder inside the folder."""

    def write_files(folder: Path) -> None:
        safetensors.torch.save_file({"weight": torch.full((size,), value)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"value": value}))
        (folder / "samples").mkdir()
        (folder / "samples" / "prompt.txt").write_text(f"sound of step {value}")

    return write_files


def save(folder: CheckpointFolder, step: int, value: int | None = None) -> Path:
    value = step if value is None else value
    return folder.save(step, {"step": step, "value": value}, writer(value))


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


def assert_intact(checkpoint) -> None:
    """Files and state are those of one and the same save."""
    value = checkpoint.state["value"]
    tensors = safetensors.torch.load_file(checkpoint.path / "model.safetensors")
    assert torch.equal(tensors["weight"], torch.full((1000,), value))
    assert json.loads((checkpoint.path / "config.json").read_text()) == {"value": value}
    assert (checkpoint.path / "samples" / "prompt.txt").read_text() == f"sound of step {value}"


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "run", "sat", keep=2)


def test_nothing_yet(folder):
    assert folder.latest() is None


def test_what_was_saved_comes_back(folder):
    state = {"step": 10, "loss": 0.1 + 0.2, "names": ["ä", "b"], "none": None, "nested": {"3": [1.5]}}
    path = folder.save(10, state, writer(10))
    assert path == folder.output_dir / "checkpoint-000010"
    checkpoint = folder.latest()
    assert checkpoint.path == path
    assert checkpoint.state == state
    assert folder.load(str(path)) == checkpoint
    assert names(folder.output_dir) == ["checkpoint-000010"]


def test_rotation_keeps_the_newest(folder):
    for step in (10, 20, 30):
        save(folder, step)
    assert names(folder.output_dir) == ["checkpoint-000020", "checkpoint-000030"]
    assert folder.latest().state["step"] == 30


def test_newest_is_the_last_written(folder):
    """Someone goes on from an earlier checkpoint: what is written then isn't rotated away for its lower step."""
    for step in (1_000_000, 2_000_000, 10):
        save(folder, step)
    assert folder.latest().state["step"] == 10
    assert names(folder.output_dir) == ["checkpoint-000010", "checkpoint-2000000"]


def test_none_must_be_kept_is_refused(tmp_path):
    with pytest.raises(ValueError, match="At least one checkpoint must be kept, got 0"):
        CheckpointFolder(tmp_path, "sat", keep=0)


def test_a_step_is_replaced(folder):
    save(folder, 10, value=1)
    save(folder, 10, value=2)
    assert folder.latest().state["value"] == 2
    assert_intact(folder.latest())
    assert names(folder.output_dir) == ["checkpoint-000010"]


def test_finish(folder):
    save(folder, 10)
    for value in (1, 2):
        final = folder.finish(writer(value))
        assert final == folder.output_dir / "final"
        assert json.loads((final / "config.json").read_text()) == {"value": value}
    assert names(folder.output_dir) == ["checkpoint-000010", "final"]


FILES = ["model.safetensors", "config.json", "samples/prompt.txt", MANIFEST]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "changed", "grown"])
def test_damaged_checkpoints_are_named_and_passed_over(folder, caplog, name, damage):
    save(folder, 10)
    newest = save(folder, 20)
    path = newest / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "changed":
        path.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    else:
        path.write_bytes(content + b"\n}")
    latest = folder.latest()
    assert latest.state["step"] == 10
    assert_intact(latest)
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(newest) in message
    assert name in message
    assert "\n" not in message
    assert ("bytes instead of" in message) == (damage in ("truncated", "empty", "grown") and name != MANIFEST)
    with pytest.raises(ValueError, match=f"checkpoint-000020 can't be used: .*{Path(name).name}"):
        folder.load(newest)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "42", '{"manifest": 1}', "\x00\xff", '"checkpoint"'])
def test_garbage_for_a_manifest(folder, text):
    path = save(folder, 10)
    (path / MANIFEST).write_text(text, encoding="latin-1")
    assert folder.latest() is None
    with pytest.raises(ValueError, match=f"its {MANIFEST} is damaged"):
        folder.load(path)


def test_a_manifest_edited_by_hand_is_refused(folder):
    path = save(folder, 10)
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"step": 10', '"step": 11'))
    with pytest.raises(ValueError, match="is damaged"):
        folder.load(path)


def test_another_format(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("transformers_aar.training.checkpoints.MANIFEST_FORMAT", 3)
        path = save(folder, 10)
    assert folder.latest() is None
    with pytest.raises(ValueError, match="it has format 3, and this version reads 2"):
        folder.load(path)


def test_the_other_stage(folder, caplog):
    """Two stages in one folder by mistake: neither takes, replaces or removes the other's."""
    other = CheckpointFolder(folder.output_dir, "aar", keep=1)
    foreign = save(other, 5)
    for step in (10, 20, 30):
        save(folder, step)
    assert folder.latest().state["step"] == 30
    assert other.latest().state["step"] == 5
    assert f"{foreign} is passed over: it belongs to stage 'aar', not 'sat'." in caplog.messages
    with pytest.raises(ValueError, match="belongs to stage 'aar', not 'sat'; name another checkpoint"):
        folder.load(foreign)


def test_no_checkpoint_at_all(folder, tmp_path):
    for path in (tmp_path, tmp_path / "absent", Path(__file__)):
        with pytest.raises(ValueError, match=f"has no {MANIFEST}"):
            folder.load(path)


def test_left_overs_of_a_killed_process_go(folder):
    """And nothing else does: people keep files of their own beside checkpoints."""
    save(folder, 10)
    for name in (".checkpoint-000010.partial", ".checkpoint-000020.partial", ".final.partial"):
        (folder.output_dir / name / "samples").mkdir(parents=True)
        (folder.output_dir / name / "model.safetensors").write_bytes(b"half")
    (folder.output_dir / ".notes.partial").write_text("mine")
    (folder.output_dir / "samples").mkdir()
    assert folder.latest().state["step"] == 10
    save(folder, 20)
    assert names(folder.output_dir) == [".notes.partial", "checkpoint-000010", "checkpoint-000020", "samples"]


def test_a_full_disk(folder):
    save(folder, 10)

    def write_files(partial: Path) -> None:
        writer(20)(partial)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = (
        f"{folder.output_dir / 'checkpoint-000020'} can't be written: No space left on device; the last good "
        f"checkpoint is {folder.output_dir / 'checkpoint-000010'}."
    )
    with pytest.raises(OSError) as caught:
        folder.save(20, {"step": 20, "value": 20}, write_files)
    assert str(caught.value) == expected
    with pytest.raises(OSError, match=r"final can't be written: No space left"):
        folder.finish(write_files)
    assert names(folder.output_dir) == ["checkpoint-000010"]
    # the same step again, with the old one in place
    with pytest.raises(OSError, match="the last good checkpoint is .*checkpoint-000010"):
        folder.save(10, {"step": 10, "value": 11}, write_files)
    assert folder.latest().state["value"] == 10
    assert_intact(folder.latest())
    save(folder, 20)
    assert folder.latest().state["step"] == 20


def test_no_room_for_the_tensors(folder):
    """safetensors has an exception of its own for it, here from a limit that the system sets on files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"can't be written: .*File too large.*; there is no checkpoint yet\."):
            folder.save(10, {}, writer(10, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(folder.output_dir) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_other_errors_pass_through_and_leave_nothing(folder, error):
    def write_files(partial: Path) -> None:
        (partial / "model.safetensors").write_bytes(b"half")
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        folder.save(10, {}, write_files)
    assert names(folder.output_dir) == []


def test_an_output_folder_that_cant_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"can't be written: Not a directory .*file/run\); there is no checkpoint yet"):
        CheckpointFolder(tmp_path / "file" / "run", "sat", keep=1).save(1, {}, writer(1))


# --- killed at every moment


ACTIONS = {
    "new": lambda folder: save(folder, 30),
    "replaced": lambda folder: save(folder, 20, value=21),
    "finished": lambda folder: folder.finish(writer(30)),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_killed_at_every_moment_of_a_save(tmp_path, action):
    """After each, a complete checkpoint is the latest, the old or the new one, and the next save clears up."""
    start = tmp_path / "start"
    first = CheckpointFolder(start, "sat", keep=1)
    save(first, 10)
    save(first, 20)
    first.finish(writer(20))
    (start / ".checkpoint-000005.partial").mkdir()
    (start / ".checkpoint-000005.partial" / "model.safetensors").write_bytes(b"half")

    seen = set()
    for deadline in itertools.count(1):
        root = tmp_path / f"run{deadline}"
        shutil.copytree(start, root)
        folder = CheckpointFolder(root, "sat", keep=1)
        died = dies(lambda folder=folder: ACTIONS[action](folder), root, deadline)
        latest = folder.latest()
        assert_intact(latest)
        seen.add(latest.state["value"])

        save(folder, 40)
        assert folder.latest().state["value"] == 40
        assert names(root) == ["checkpoint-000040", "final"]
        final = json.loads((root / "final" / "config.json").read_text())["value"]
        assert final in ((20, 30) if action == "finished" else (20,))
        shutil.rmtree(root)
        if not died:
            break
    assert deadline > 12
    assert seen == {"new": {20, 30}, "replaced": {20, 21}, "finished": {20}}[action]


# --- tensors


def build_optimizer(model: nn.Module, kind: str, learning_rate: float = 1e-3) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.5, 0.9))
    groups = [
        {"params": matrices, "weight_decay": 0.1, "decays": True},
        {"params": vectors, "weight_decay": 0.0, "decays": False},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=kind == "fused")


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["adam", "adamw", "fused"])
def test_a_resumed_codec_trains_on_bit_for_bit(tmp_path, build_codec, kind, dtype):
    """Weight norm, LSTM weights in shared storage, codebooks that move, a frozen weight, settings from the recipe."""

    def prepare(model: SatModel, learning_rate: float):
        model = model.to(dtype).train()
        model.encoder.layers[0].conv.bias.requires_grad_(False)
        share_lstm_storage(model)
        return model, build_optimizer(model, kind, learning_rate)

    def train(model, optimizer, steps) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(2, 1, 1920, generator=generator).to(dtype)).loss.backward()
            optimizer.step()

    model, optimizer = prepare(build_codec(), 1e-3)
    train(model, optimizer, range(3))

    def write_files(path: Path) -> None:
        model.save_pretrained(path, state_dict=model_state(model))
        safetensors.torch.save_file(optimizer_state(model, optimizer), path / "optimizer.safetensors")

    path = CheckpointFolder(tmp_path, "sat", keep=1).save(3, {}, write_files)
    resumed, resumed_optimizer = prepare(SatModel.from_pretrained(path, dtype=dtype), 2e-3)
    assert_same(model.state_dict(), resumed.state_dict())
    state = safetensors.torch.load_file(path / "optimizer.safetensors")
    load_optimizer_state(resumed, resumed_optimizer, state)
    assert_same(model.state_dict(), resumed.state_dict())
    assert {group["lr"] for group in resumed_optimizer.param_groups} == {2e-3}
    assert [group.get("decays") for group in resumed_optimizer.param_groups] == [
        group.get("decays") for group in optimizer.param_groups
    ]
    for group in resumed_optimizer.param_groups:
        group["lr"] = 1e-3

    for trained in ((model, optimizer), (resumed, resumed_optimizer)):
        train(*trained, range(3, 6))
    assert_same(model.state_dict(), resumed.state_dict())
    assert_same(optimizer_state(model, optimizer), optimizer_state(resumed, resumed_optimizer))
    assert not any(name.startswith("encoder.layers.0.conv.bias") for name in state)


def test_states_have_storage_of_their_own():
    model = nn.LSTM(3, 4)
    share_lstm_storage(model)
    optimizer = build_optimizer(model, "adamw")
    model(torch.randn(5, 2, 3))[0].sum().backward()
    optimizer.step()
    for state in (model_state(model), optimizer_state(model, optimizer)):
        assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    before = model_state(model)["weight_hh_l0"]
    with torch.no_grad():
        model.weight_hh_l0.add_(1)
    assert not torch.equal(before, model.weight_hh_l0)


def two_layers(used: int) -> tuple[nn.ModuleList, torch.optim.Optimizer]:
    """Two layers and their optimizer, after two steps in which only the first `used` had gradients."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]).to(torch.bfloat16)
    optimizer = build_optimizer(model, "adamw")
    for _ in range(2 if used else 0):
        for layer in model[:used]:
            layer(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("used", [0, 1])
def test_parameters_without_state_stay_without(used, begun):
    """A discriminator that hasn't begun, a layer without gradients: neither saving nor loading may count as a step."""
    model, optimizer = two_layers(used)
    state = optimizer_state(model, optimizer)
    assert {name.partition(".")[0] for name in state} == {str(layer) for layer in range(used)}
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in state.items() if not name.endswith("step"))
    fresh, fresh_optimizer = two_layers(0)
    for layer in fresh:
        layer(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()  # a gradient left over
    if begun:
        fresh_optimizer.step()
    load_optimizer_state(fresh, fresh_optimizer, state)
    assert_same(state, optimizer_state(fresh, fresh_optimizer))
    for parameter, loaded in zip(model.parameters(), fresh.parameters(), strict=True):
        assert (parameter in optimizer.state) == (loaded in fresh_optimizer.state)


def test_a_state_of_another_recipe_is_refused():
    model, optimizer = two_layers(2)
    state = optimizer_state(model, optimizer)
    smaller = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"The optimizer has no 1\.bias, whose state was saved"):
        load_optimizer_state(smaller, build_optimizer(smaller, "adamw"), state)


WORKER = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers_aar.training.checkpoints import CheckpointFolder, load_model_state
from transformers_aar.training.checkpoints import load_optimizer_state, model_state, optimizer_state

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
mesh = init_device_mesh("cpu", (accelerator.num_processes,))


def build(kind, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    if kind == "fsdp":
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == decays], "decays": decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return accelerator.prepare(model, optimizer) if kind == "ddp" else (model, optimizer)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(2 * step + accelerator.process_index)
        accelerator.backward(model(torch.randn(4, 5, generator=generator)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()


def save(folder, step, model, optimizer):
    tensors, moments = model_state(model), optimizer_state(model, optimizer)

    def write_files(path):
        save_file(tensors, path / "model.safetensors")
        save_file(moments, path / "optimizer.safetensors")

    if accelerator.is_main_process:
        state = {"processes": dist.get_world_size(), "model": type(model).__name__}
        folder.save(step, state, write_files)
    accelerator.wait_for_everyone()


for kind in ("ddp", "fsdp"):
    folder = CheckpointFolder(Path(sys.argv[1]) / kind, "aar", keep=3)
    model, optimizer = build(kind, 0)
    train(model, optimizer, range(3))
    save(folder, 3, model, optimizer)
    checkpoint = folder.latest()
    resumed, resumed_optimizer = build(kind, 1)
    load_model_state(resumed, load_file(checkpoint.path / "model.safetensors"))
    load_optimizer_state(resumed, resumed_optimizer, load_file(checkpoint.path / "optimizer.safetensors"))
    accelerator.wait_for_everyone()
    train(model, optimizer, range(3, 6))
    save(folder, 6, model, optimizer)
    train(resumed, resumed_optimizer, range(3, 6))
    save(folder, 7, resumed, resumed_optimizer)
accelerator.end_training()
"""


def test_two_processes_resume_bit_for_bit(tmp_path):
    """Saved by the main process, loaded by both: replicated by DDP, and sharded by FSDP."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, str(script), str(tmp_path)], env=environment, check=True, timeout=300)
    for kind, wrapper in (("ddp", "DistributedDataParallel"), ("fsdp", "FSDPSequential")):
        folder = CheckpointFolder(tmp_path / kind, "aar", keep=3)
        straight, resumed = (folder.load(folder.output_dir / f"checkpoint-{step:06d}") for step in (6, 7))
        assert straight.state == {"processes": 2, "model": wrapper}
        for name in ("model.safetensors", "optimizer.safetensors"):
            left, right = (safetensors.torch.load_file(checkpoint.path / name) for checkpoint in (straight, resumed))
            assert_same(left, right)
        parameters = {f"{layer}.{part}" for layer in range(3) for part in ("weight", "bias")}
        assert {name.rpartition(".")[0] for name in left} == parameters
