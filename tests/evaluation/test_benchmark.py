"""The benchmark's table, and that what is compared gives the same; how fast it is is no matter for a test."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from transformers_aar.evaluation.benchmark import Comparison, Contender, measure
from transformers_aar.evaluation.benchmark_rows import ROWS, prepared
from transformers_aar.evaluation.floors import Ceilings, FloorCounter
from transformers_aar.evaluation.plain_loop import plain_generate
from transformers_aar.linear_aar import AarInt8Linear, AarLinear, has_int8_products

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
CEILINGS = Ceilings({torch.float32: 1e9, torch.bfloat16: 2e9, torch.uint8: 4e9}, bandwidth=1e12)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, codec_fields) -> list[Path]:
    """Trainings of a tiny codec and of a tiny generator."""
    folder = tmp_path_factory.mktemp("recipes")
    discriminators = {"stft": {"n_ffts": [256, 128], "num_filters": 2}}
    model = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sat = {"codec_config": codec_fields | {"num_filters": 4}, "discriminators": discriminators, "max_steps": 4}
    paths = [folder / "sat.yaml", folder / "aar.yaml"]
    for path, recipe in zip(paths, (sat, {"model_config": model, "max_steps": 4}), strict=True):
        path.write_text(yaml.safe_dump(recipe))
    return paths


@pytest.mark.parametrize("guidance_scale", [0.0, 4.0])
def test_plain_loop_generates_the_same(build_generator, guidance_scale):
    """Greedy tokens in fp32, and the sound they decode to."""
    model = build_generator().requires_grad_(False)
    embeds = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    arguments = {"guidance_scale": guidance_scale, "do_sample": False}
    audio, codes = plain_generate(model, embeds, **arguments)
    output = model.generate(conditioning_embeds=embeds, return_dict_in_generate=True, **arguments)
    assert torch.equal(output.audio_codes[:, 0], codes)
    torch.testing.assert_close(output.audio, audio, atol=1e-5, rtol=1e-4)


def test_contenders_take_turns():
    """One row each, in the order of the contenders, per unit and relative to the first."""
    called = []
    contenders = [
        Contender("products", lambda: called.append("a") or torch.ones(64, 64) @ torch.ones(64, 64)),
        Contender("nothing", lambda: called.append("b"), amount=2.0, has_floor=False),
    ]
    rows = measure(Comparison("things", contenders), CEILINGS, rounds=3, max_seconds=60)
    num_calls = 4 if rows[0]["peak memory (MB)"] is None else 5  # a first one, and one for the memory
    assert "".join(called) == num_calls * "ab"
    assert [row["what"] for row in rows] == ["products", "nothing"]
    assert rows[0]["speed, first row = 1"] == 1.0
    assert rows[1]["units per second"] == pytest.approx(2 / rows[1]["median (s)"])
    assert rows[0]["floor (s)"] == pytest.approx(2 * 64**3 / 1e9) and rows[1]["floor (s)"] is None
    assert all(row["fastest (s)"] <= row["median (s)"] <= row["slowest (s)"] for row in rows)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system tells no peaks")
def test_memory_at_the_peak():
    """Beyond what is held before, whatever was needed earlier."""
    sizes = [2**28, 2**26, 2**10]
    contenders = [Contender(f"{size} bytes", partial(torch.ones, size // 4), has_floor=False) for size in sizes]
    rows = measure(Comparison("blocks", contenders), CEILINGS, rounds=1, max_seconds=60)
    for row, size in zip(rows, sizes, strict=True):
        assert size / 1e6 - 1 < row["peak memory (MB)"] < size / 1e6 + 10


@torch.no_grad()
def test_floor_knows_the_kernels_of_cpus():
    """Products, convolutions, attention and LSTMs, at the ceiling of their dtype or at that of the memory."""
    query, lstm = torch.ones(1, 2, 10, 64), torch.nn.LSTM(8, 8)
    operations = {
        lambda: torch.ones(4, 8) @ torch.ones(8, 16): 2 * 4 * 8 * 16 / 1e9,
        lambda: torch.ones(4, 8).bfloat16() @ torch.ones(8, 16).bfloat16(): 2 * 4 * 8 * 16 / 2e9,
        lambda: torch.conv1d(torch.ones(1, 4, 20), torch.ones(8, 4, 3)): 2 * 8 * 4 * 3 * 18 / 1e9,
        lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query): 4 * 2 * 10 * 10 * 64 / 1e9,
        lambda: lstm(torch.ones(5, 1, 8)): 2 * 5 * 2 * 4 * 8 * 8 / 1e9,
        lambda: torch.ones(4, 8) + 1: 0.0,
    }
    for operation, seconds in operations.items():
        counter = FloorCounter(CEILINGS)
        with counter:
            operation()
        assert counter.seconds == pytest.approx(seconds)
    if has_int8_products():
        layer, counter = AarInt8Linear(AarLinear(16, 8)), FloorCounter(CEILINGS)
        with counter:
            layer(torch.ones(2, 3, 16))
        assert counter.seconds == pytest.approx(2 * 2 * 3 * 16 * 8 / 4e9)
    counter = FloorCounter(Ceilings(CEILINGS.flops, bandwidth=1.0))
    with counter:
        torch.ones(4, 8) @ torch.ones(8, 16)
    assert counter.seconds == pytest.approx(4 * (4 * 8 + 8 * 16 + 4 * 16))


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(ROWS))
def test_rows(row, recipes):
    """Everything that is measured runs, and all that multiplies matrices has a floor, unless it is compiled."""
    with prepared(row, *recipes, torch.device("cpu")) as comparison:
        lines = measure(comparison, CEILINGS, rounds=1, max_seconds=60)
    for line in lines:
        has_floor = row not in ("read", "import", "load") and not line["what"].startswith("compiled")
        assert ((line["floor (s)"] or 0) > 0) == has_floor
    assert len({line["what"] for line in lines}) == len(lines)


@pytest.mark.slow
def test_script_writes_one_table(tmp_path, recipes):
    """As Markdown and as JSON, with the machine and its ceilings."""
    words = ["--sat-recipe", recipes[0], "--aar-recipe", recipes[1], "--rows", "read", "--rows", "encode"]
    command = [sys.executable, SCRIPT, "--output-dir", tmp_path, "--rounds", 1, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(map(str, command), env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert [line["row"] for line in written["rows"]] == ["read"] * 3 + ["encode"] * 6
    assert written["settings"]["float32 matrix products (GFLOP/s)"] > 0
    text = (tmp_path / "benchmark.md").read_text()
    assert text in finished.stdout and all(line["what"] in text for line in written["rows"])


def test_unknown_row_is_named(tmp_path):
    command = [sys.executable, SCRIPT, "--output-dir", tmp_path, "--rows", "generate"]
    finished = subprocess.run(map(str, command), capture_output=True, text=True, timeout=300)
    assert finished.returncode == 2 and "'generate' is none of" in finished.stderr
