"""The benchmark's table, and that what is compared gives the same; how fast it is is no matter for a test."""

import json
import os
import runpy
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import typer
import yaml
from torch.nn.functional import scaled_dot_product_attention
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper
from typer.testing import CliRunner

from transformers_aar.evaluation.benchmark import Call, Comparison, Contender, measure, summarize
from transformers_aar.evaluation.benchmark_rows import ROWS, Setting, make_baseline, make_codecs, prepared, reading
from transformers_aar.evaluation.floors import LSTM_FLOPS, Ceilings, FloorCounter
from transformers_aar.evaluation.plain_loop import draw, likely, plain_generate
from transformers_aar.linear_aar import (
    AarInt8Linear,
    AarLinear,
    AarPackedLinear,
    has_int8_products,
    has_packed_products,
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
CEILINGS = Ceilings({torch.float32: 1e9, torch.bfloat16: 2e9, torch.uint8: 4e9}, bandwidth=1e12)


def write_recipes(folder: Path, codec_config: dict) -> list[Path]:
    """Trainings of such a codec and of a tiny generator."""
    discriminators = {"stft": {"n_ffts": [256, 128], "num_filters": 2}}
    model = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sat = {"codec_config": codec_config | {"num_filters": 4}, "discriminators": discriminators, "max_steps": 4}
    paths = [folder / "sat.yaml", folder / "aar.yaml"]
    for path, recipe in zip(paths, (sat, {"model_config": model, "max_steps": 4}), strict=True):
        path.write_text(yaml.safe_dump(recipe))
    return paths


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, codec_fields) -> list[Path]:
    """With the published scales."""
    return write_recipes(tmp_path_factory.mktemp("recipes"), codec_fields)


@pytest.fixture(scope="module")
def short_recipes(tmp_path_factory, short_codec_fields) -> list[Path]:
    """With windows of 80 ms."""
    return write_recipes(tmp_path_factory.mktemp("short_recipes"), short_codec_fields)


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


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (900, 0.6), (8, 0.9), (1, 0.95), (900, 0.01)])
def test_plain_loop_draws_what_the_library_would(top_k, top_p):
    """Of the same codes, as often as they are likely."""
    logits = 2 * torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TopKLogitsWarper(min(top_k, 16)), TopPLogitsWarper(top_p)])
    expected = warpers(None, logits.flatten(0, 1)).view_as(logits)
    assert torch.equal(likely(logits, top_k, top_p), expected)
    torch.manual_seed(0)
    drawn = torch.nn.functional.one_hot(draw(expected.repeat(4000, 1, 1)), 16).unflatten(0, (4000, 2))
    torch.testing.assert_close(drawn.float().mean(0), expected.softmax(-1), atol=0.03, rtol=0)


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


def test_row_follows_from_the_calls():
    """Medians, and speed per unit beside the first contender's call of the same round."""
    calls = [Call(2.0, 3.5), Call(1.0, 1.5), Call(4.0, 7.5)]
    first_contenders = [Call(12.0, 0.0), Call(6.0, 0.0), Call(8.0, 0.0)]
    contender = Contender("ten windows", lambda: None, amount=10.0)
    row = summarize(
        contender, "seconds", calls, first_contenders, 5.0, Call(9.0, 0.0), floor=0.5, peak_bytes=3_000_000
    )
    assert row == {
        **{"what": "ten windows", "median (s)": 2.0, "fastest (s)": 1.0, "slowest (s)": 4.0},
        **{"processor time (s)": 3.5, "rounds": 3, "unit": "seconds", "units per second": 5.0},
        # twice as much six, six and two times as fast
        **{"speed, first row = 1": 12.0, "floor (s)": 0.5, "times its floor": 4.0},
        **{"first call, with counting (s)": 9.0, "peak memory (MB)": 3.0},
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system tells no peaks")
def test_memory_at_the_peak():
    """Beyond what is held before, whatever was needed earlier."""
    sizes = [2**28, 2**26, 2**10]
    contenders = [Contender(f"{size} bytes", partial(torch.ones, size // 4), has_floor=False) for size in sizes]
    rows = measure(Comparison("blocks", contenders), CEILINGS, rounds=1, max_seconds=60)
    for row, size in zip(rows, sizes, strict=True):
        assert size / 1e6 - 1 < row["peak memory (MB)"] < size / 1e6 + 10


def floor_of(run) -> float:
    with FloorCounter(CEILINGS) as counter:
        run()
    return counter.seconds


@torch.no_grad()
def test_floor_knows_the_kernels_of_cpus():
    """Products, convolutions, attention and LSTMs, at the ceiling of their dtype or at that of the memory."""
    query, lstm = torch.ones(1, 2, 10, 64), torch.nn.LSTM(8, 8)
    operations = {
        lambda: torch.ones(4, 8) @ torch.ones(8, 16): 2 * 4 * 8 * 16 / 1e9,
        lambda: torch.ones(4, 8).bfloat16() @ torch.ones(8, 16).bfloat16(): 2 * 4 * 8 * 16 / 2e9,
        lambda: torch.conv1d(torch.ones(1, 4, 20), torch.ones(8, 4, 3)): 2 * 8 * 4 * 3 * 18 / 1e9,
        lambda: scaled_dot_product_attention(query, query, query): 4 * 2 * 10 * 10 * 64 / 1e9,
        lambda: lstm(torch.ones(5, 1, 8)): 2 * 5 * 2 * 4 * 8 * 8 / 1e9,
        lambda: torch.ones(4, 8) + 1: 0.0,
    }
    for operation, seconds in operations.items():
        assert floor_of(operation) == pytest.approx(seconds)
    if has_packed_products(torch.float32):
        layer = AarPackedLinear(AarLinear(16, 8))
        assert floor_of(lambda: layer(torch.ones(2, 3, 16))) == pytest.approx(2 * 2 * 3 * 16 * 8 / 1e9)
    if has_int8_products():
        layer = AarInt8Linear(AarLinear(16, 8))
        assert floor_of(lambda: layer(torch.ones(2, 3, 16))) == pytest.approx(2 * 2 * 3 * 16 * 8 / 4e9)
    counter = FloorCounter(Ceilings(CEILINGS.flops, bandwidth=1.0))
    with counter:
        torch.ones(4, 8) @ torch.ones(8, 16)
    assert counter.seconds == pytest.approx(4 * (4 * 8 + 8 * 16 + 4 * 16))


def test_floor_knows_backward_passes():
    """Gradients of inputs and weights are a product each for one forwards; attention takes its first one again."""
    query, lstm = torch.ones(1, 2, 10, 64, requires_grad=True), torch.nn.LSTM(8, 16, num_layers=2)
    sound = torch.ones(5, 3, 8, requires_grad=True)
    lstm_flops = 2 * 5 * 3 * 4 * 16 * (8 + 3 * 16)
    assert floor_of(lambda: lstm(sound)[0].sum().backward()) == pytest.approx(3 * lstm_flops / 1e9)
    attention_flops = 4 * 2 * 10 * 10 * 64
    attend = scaled_dot_product_attention(query, query, query).sum
    backward = floor_of(lambda: attend().backward())
    assert backward == pytest.approx(2.5 * attention_flops / 1e9)


def test_floor_knows_the_lstms_of_gpus():
    """The same operations as on a CPU, of arguments as cuDNN's kernel has them."""
    lstm = torch.nn.LSTM(8, 16, num_layers=2)
    arguments = [(5, 3, 8), [tuple(weight.shape) for weight in lstm.parameters()], 4, None, (2, 3, 16), (2, 3, 16)]
    flops = 2 * 5 * 3 * 4 * 16 * (8 + 3 * 16)
    assert LSTM_FLOPS[torch.ops.aten._cudnn_rnn](*arguments, 2, 16, 0, 2, False) == flops
    assert LSTM_FLOPS[torch.ops.aten._cudnn_rnn_backward](*arguments, out_val=None) == 2 * flops


# --- the rows --------------------------------------------------------------------------------------------------------


def make_setting(recipes: list[Path]) -> Setting:
    return Setting(*recipes, torch.device("cpu"), Path("unused"))


def seconds_of(output, sampling_rate: int) -> float:
    """How long the sounds are that a call gives, all together."""
    audio = output[0] if isinstance(output, tuple) else getattr(output, "audio_values", output)
    return audio.numel() / sampling_rate


@torch.no_grad()
@pytest.mark.parametrize("row", ["generate-8", "coarse", "others", "windows", "decode"])
def test_amounts_are_what_is_made(short_recipes, row):
    """But for what convolutions leave at the ends of a clip."""
    with prepared(row, *short_recipes, torch.device("cpu")) as comparison:
        for contender in comparison.contenders:
            rate = 32_000 if contender.name.startswith("MusicGen") else 24_000
            made = seconds_of(contender.run(), rate)
            expected = contender.amount * 0.08 if row == "decode" else contender.amount
            assert made == pytest.approx(expected, rel=0.01), contender.name


def test_the_baseline_is_measured_as_the_generator(short_recipes):
    """In every precision that it is compared in."""
    with prepared("others", *short_recipes, torch.device("cpu")) as comparison:
        names = [contender.name for contender in comparison.contenders]
    kinds = [[name.partition(", ")[2] for name in names if name.startswith(model)] for model in ("generate", "next")]
    assert kinds[1] == [kind for kind in kinds[0] if kind.startswith(("bf16", "int8"))]
    assert ("int8" in kinds[1]) == has_int8_products()
    assert ("bf16, packed" in kinds[1]) == has_packed_products(torch.bfloat16)


@torch.no_grad()
def test_peers_are_of_equal_size(recipes):
    """EnCodec has SAT's blocks, DAC as many weights, and all peers ten codes per frame."""
    codecs = make_codecs(make_setting([Path(__file__).parents[2] / "scripts" / "configs" / "sat_c128.yaml", None]))
    numbers = {
        name: {part: num_weights(getattr(codec, part)) for part in ("encoder", "decoder")}
        for name, codec in codecs.items()
    }
    assert numbers["EncodecModel"] == numbers["SatModel"]
    assert sum(numbers["DacModel"].values()) == pytest.approx(sum(numbers["SatModel"].values()), rel=0.05)
    with prepared("encode", *recipes, torch.device("cpu")) as comparison:
        codes = {contender.name: contender.run().audio_codes.shape for contender in comparison.contenders}
    assert codes["EncodecModel, fp32"][1:] == codes["DacModel, fp32"] == (8, 10, 75)
    assert codes["SatModel, fp32"] == (8, 1, 455)
    baseline = make_baseline(make_setting(recipes))
    assert (baseline.num_levels, baseline.config.num_slots) == (10, 750)


def num_weights(module: torch.nn.Module) -> int:
    """Weight norm apart, which has the same number once more in `original0`."""
    return sum(value.numel() for name, value in module.named_parameters() if not name.endswith("original0"))


def test_crops_are_read_from_every_file(recipes, tmp_path, monkeypatch):
    """As many as the row counts, each at another place."""
    reads = []
    monkeypatch.setattr(
        "transformers_aar.evaluation.benchmark_rows.read_crop", lambda audio, *place: reads.append((audio, *place))
    )
    contenders = reading(Setting(*recipes, torch.device("cpu"), tmp_path), num_files=3).contenders
    contender = next(each for each in contenders if each.name == "read_crop at 24 and 48 kHz")
    contender.run()
    assert len(reads) == contender.amount == len({audio["path"] for audio, *_ in reads})
    assert {(duration_s, rates) for _, duration_s, rates, _ in reads} == {(1.0, (24_000, 48_000))}
    assert len({position for *_, position in reads}) == len(reads)


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
    num_readers = 3 if find_spec("librosa") is None else 4
    assert [line["row"] for line in written["rows"]] == ["read"] * num_readers + ["encode"] * 6
    assert written["settings"]["float32 matrix products (GFLOP/s)"] > 0
    text = (tmp_path / "benchmark.md").read_text()
    assert text in finished.stdout and all(line["what"] in text for line in written["rows"])


def test_unknown_row_is_named(tmp_path):
    app = typer.Typer()
    app.command()(runpy.run_path(str(SCRIPT))["main"])
    result = CliRunner().invoke(app, ["--output-dir", str(tmp_path / "table"), "--rows", "generate"])
    assert result.exit_code == 2 and "'generate' is none of" in result.output
    assert not (tmp_path / "table").exists()
