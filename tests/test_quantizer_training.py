"""The codebooks in training: k-means start, moving averages, dead codes, and the same on every process."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from transformers_aar import SatConfig, SatModel

TINY = {
    "num_filters": 2,
    "hidden_size": 8,
    "codebook_dim": 4,
    "codebook_size": 16,
    "num_lstm_layers": 1,
    "kmeans_iterations": 10,
}


def tiny_codec(seed: int = 0, **fields) -> SatModel:
    torch.manual_seed(seed)
    return SatModel(SatConfig(**(TINY | fields))).train()


def latents(batch_size: int, seed: int = 1) -> torch.Tensor:
    """Encoder outputs with structure: smooth in time, different from item to item."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch_size, 8, 10, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=75, mode="linear")


def codebook_state(codec: SatModel) -> dict[str, torch.Tensor]:
    names = ("codebook", "codebook_sum", "cluster_size", "initialized", "num_updates")
    return {name: getattr(codec.quantizer, name).clone() for name in names}


def test_evaluation_never_touches_the_codebooks():
    codec = tiny_codec().eval()
    before = codebook_state(codec)
    sounds = torch.randn(2, 1, 24_000)
    codec(sounds)
    codec.encode(sounds)
    for name, tensor in codebook_state(codec).items():
        assert torch.equal(tensor, before[name]), name


def test_vectors_are_sampled_for_dead_codes_only(monkeypatch):
    codec = tiny_codec(dead_code_threshold=0.0)
    codec.quantizer.start_codebooks(latents(32))
    monkeypatch.setattr(codec.quantizer, "_sample_vectors", lambda pooled: pytest.fail("no code is dead"))
    codec.quantizer(latents(4))
    codec.quantizer.dead_code_threshold = 0.9
    with pytest.raises(pytest.fail.Exception, match="no code is dead"):
        codec.quantizer(latents(4))


def test_first_training_batch_starts_the_codebooks():
    """Means of the vectors that choose them; sums fit sizes; scales with few vectors have no unusable codes."""
    codec = tiny_codec()
    hidden = latents(32)
    codec.quantizer.start_codebooks(hidden)
    quantizer = codec.quantizer
    assert bool(quantizer.initialized)
    torch.testing.assert_close(quantizer.codebook_sum, quantizer.codebook * quantizer.cluster_size[..., None])
    assert (quantizer.cluster_size >= 1).all()
    # scale 0 sees 32 vectors for 16 codes, the last 32 · 75
    pooled = quantizer._pool(quantizer._project_in(hidden), 1).flatten(0, 1)
    nearest = quantizer._nearest(pooled[None], 0)[0]
    chosen = torch.bincount(nearest, minlength=16)
    used = (chosen > 0).nonzero().flatten()
    assert len(used) > 8
    # after its iterations k-means has converged on so few vectors: each used code is its vectors' mean
    for code in used:
        torch.testing.assert_close(quantizer.codebook[0, code], pooled[nearest == code].mean(0))
    assert quantizer.codebook.abs().max() < 10 * hidden.abs().max()


def test_fewer_vectors_than_codes():
    """One clip gives scale 0 one vector for 16 codes: the other codes start beside it, not at zero or infinity."""
    codec = tiny_codec()
    codec.quantizer.start_codebooks(latents(1))
    codebook = codec.quantizer.codebook[0]
    assert torch.isfinite(codebook).all()
    assert (codec.quantizer.cluster_size[0] == 1).all()
    assert len(codebook.unique(dim=0)) == 16
    assert (codebook - codebook.mean(0)).abs().max() < 0.2


def test_moving_averages():
    """N ← 0.99·N + 0.01·n, m ← 0.99·m + 0.01·Σu, and e = m / N with Laplace smoothing."""
    codec = tiny_codec(dead_code_threshold=0.0).double()
    quantizer = codec.quantizer
    quantizer.start_codebooks(latents(8).double())
    before = codebook_state(codec)
    hidden = latents(4, seed=2).double()
    codes = quantizer(hidden).audio_codes
    last = codes[:, -75:].flatten()
    counts = torch.bincount(last, minlength=16).double()
    expected = 0.99 * before["cluster_size"][-1] + 0.01 * counts
    torch.testing.assert_close(quantizer.cluster_size[-1], expected)
    total = expected.sum()
    smoothed = (expected + 1e-5) / (total + 16 * 1e-5) * total
    # what smoothing changes is small
    expected = quantizer.codebook_sum[-1] / smoothed[:, None]
    torch.testing.assert_close(quantizer.codebook[-1], expected, rtol=1e-12, atol=0)
    assert int(quantizer.num_updates) == 1
    assert not torch.equal(quantizer.codebook, before["codebook"])


def test_dead_codes_restart_from_the_batch():
    """A code that is hardly used takes a vector of the batch and the mean size, and is found by the next one."""
    codec = tiny_codec()
    quantizer = codec.quantizer
    quantizer.start_codebooks(latents(8))
    quantizer.codebook[-1, 3] = 1e3
    quantizer.codebook_sum[-1, 3] = 1e-6 * 1e3
    quantizer.cluster_size[-1, 3] = 1e-6
    others = quantizer.cluster_size[-1].clone()
    hidden = latents(4, seed=2)
    vectors = {}
    pool = quantizer._pool
    quantizer._pool = lambda tensor, length: vectors.setdefault(length, pool(tensor, length))
    quantizer(hidden)
    del quantizer._pool
    distance = (vectors[75].flatten(0, 1) - quantizer.codebook[-1, 3]).abs().amax(-1).min()
    assert distance == 0
    size = quantizer.cluster_size[-1, 3]
    assert 0.5 * others.mean() < size < 2 * others.mean()
    torch.testing.assert_close(quantizer.codebook_sum[-1, 3], quantizer.codebook[-1, 3] * size)
    # living codes are left alone: they moved by their averages only
    assert (quantizer.cluster_size[-1] > 0.03 * quantizer.cluster_size[-1].mean()).all()


def test_no_two_dead_codes_become_the_same():
    """Although there are fewer vectors than codes: else rounding would decide which of them is the nearest."""
    quantizer = tiny_codec().quantizer
    quantizer.start_codebooks(latents(4))
    quantizer.cluster_size.fill_(1e-9)
    quantizer.cluster_size[:, 0] = 1.0
    quantizer(latents(1))
    for codebook in quantizer.codebook:
        assert len(codebook.unique(dim=0)) == len(codebook)


def test_accumulation_equals_one_batch():
    """Two half batches with one update move the codebooks like the whole batch, restarts of dead codes included."""
    whole, halves = tiny_codec(dead_code_threshold=0.5).double(), tiny_codec(dead_code_threshold=0.5).double()
    hidden = latents(8).double()
    for codec in (whole, halves):
        codec.quantizer.start_codebooks(hidden)
    for step in range(3):
        hidden = latents(8, seed=10 + step).double()
        whole.quantizer(hidden)
        with halves.accumulate_codebook_statistics():
            halves.quantizer(hidden[:4])
        halves.quantizer(hidden[4:])
        for name, tensor in codebook_state(whole).items():
            torch.testing.assert_close(tensor, codebook_state(halves)[name], rtol=0, atol=1e-9)
    assert int(halves.quantizer.num_updates) == 3


def test_loss_is_differentiable_and_trains_every_part():
    codec = tiny_codec()
    sounds = torch.randn(2, 1, 24_000, generator=torch.Generator().manual_seed(0))
    output = codec(sounds)
    output.loss.backward()
    assert output.audio_values.shape == sounds.shape
    assert output.audio_codes.shape == (2, 1, 455)
    torch.testing.assert_close(
        output.loss, (output.audio_values - sounds).abs().mean() + output.commitment_loss, rtol=1e-5, atol=0
    )
    missing = [name for name, parameter in codec.named_parameters() if parameter.grad is None]
    assert not missing


def test_training_under_autocast_keeps_the_quantizer_in_fp32():
    codec = tiny_codec()
    with torch.autocast("cpu", torch.bfloat16):
        output = codec(torch.randn(2, 1, 24_000))
    assert output.commitment_loss.dtype == torch.float32
    assert codec.quantizer.codebook.dtype == torch.float32
    assert torch.isfinite(output.loss)


WORKER = """
import sys, torch, torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers_aar import SatConfig, SatModel

torch.set_num_threads(1)
folder = sys.argv[1]
if "RANK" in __import__("os").environ:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
else:
    rank, world = 0, 1
torch.manual_seed(0)
codec = SatModel(SatConfig(**TINY)).double().train()
batches = load_file(f"{folder}/batches.safetensors")
state = {"world": torch.tensor(world)}
for step in range(len(batches)):
    share = batches[str(step)].chunk(world)[rank]
    output = codec.quantizer(share)
    state[f"loss.{step}"] = output.commitment_losses.detach()
    for name in ("codebook", "codebook_sum", "cluster_size"):
        state[f"{name}.{step}"] = getattr(codec.quantizer, name).clone()
save_file(state, f"{folder}/world{world}_rank{rank}.safetensors")
"""


def test_two_processes_share_their_codebooks(tmp_path):
    """Bit-identical on both after every step, and those of one process with the whole batch, restarts included."""
    fields = TINY | {"dead_code_threshold": 0.5}
    save_file({str(step): latents(8, seed=step).double() for step in range(6)}, tmp_path / "batches.safetensors")
    script = tmp_path / "worker.py"
    script.write_text(f"TINY = {fields!r}\n{WORKER}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command in ([sys.executable, script, tmp_path], [*launch, script, tmp_path]):
        subprocess.run([str(part) for part in command], env=environment, check=True, timeout=300)
    alone, first, second = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("world1_rank0", "world2_rank0", "world2_rank1")
    )
    assert int(first["world"]) == int(second["world"]) == 2
    for name in alone:
        if name.startswith("loss."):
            # both halves have the same number of vectors, so that the mean of their means is the mean
            mean = (first[name] + second[name]) / 2
            torch.testing.assert_close(mean, alone[name], rtol=0, atol=1e-9)
        elif name != "world":
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], alone[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_processes_batch", [1, 3])
def test_plain_residual_codec_trains(num_processes_batch):
    """Ten equal scales without φ are an ordinary residual quantizer."""
    codec = tiny_codec(scales=[75] * 10, phi_kernel_sizes=[])
    output = codec.quantizer(latents(num_processes_batch))
    assert output.audio_codes.shape == (num_processes_batch, 750)
