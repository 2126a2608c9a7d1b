"""scripts/measure_costs.py: its arithmetic, and all of it on tiny recipes, as a user runs it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from transformers_aar import AarConfig, AarForConditionalGeneration, SatConfig, SatModel
from transformers_aar.training.arguments import LoopArguments
from transformers_aar.training.discriminators import AudioDiscriminator

SCRIPT = Path(__file__).parents[1] / "scripts" / "measure_costs.py"
DISCRIMINATORS = {"stft": {"n_ffts": [256, 128], "num_filters": 2}}
WIDTH, DEPTH = 128, 2
LOOP = {"max_steps": 10, "per_device_batch_size": 3, "gradient_accumulation_steps": 2}


def run(*words) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, SCRIPT, *words]
    return subprocess.run(map(str, command), env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def tables(tmp_path_factory, short_codec_fields) -> dict[str, dict]:
    """What the script writes as JSON, and as `text` what it prints."""
    folder = tmp_path_factory.mktemp("costs")
    model = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "adaln": "shared"}
    recipes = {
        "sat": {"codec_config": short_codec_fields, "discriminators": DISCRIMINATORS},
        "aar": {"model_config": model, "conditioner": "a/clap", "mixed_precision": "bf16"},
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe | LOOP))
    words = [folder / "sat.yaml", folder / "aar.yaml", "--json-file", folder / "costs.json", "--repeats", 1]
    finished = run(*words)
    assert finished.returncode == 0, finished.stderr
    return json.loads((folder / "costs.json").read_text()) | {"text": finished.stdout}


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.mark.parametrize("name, precision, flops_per_second", [("sat", "no", 49.5e12), ("aar", "bf16", 395.6e12)])
def test_costs_follow_from_the_operations(script, name, precision, flops_per_second):
    loop = LoopArguments(output_dir="unused", mixed_precision=precision, **LOOP)
    costs = script.costs(name, loop, flops=6e9)
    assert costs["recipe: sounds per step"] == 48 and costs["recipe: steps"] == 10
    assert costs["following: sounds per second and GPU"] == pytest.approx(flops_per_second / 6e9)
    hours = 480 * 6e9 / flops_per_second / 3600
    assert costs["following: GPU hours"] == pytest.approx(hours)
    assert costs["following: dollars"] == pytest.approx(2.5 * hours)


def test_weights_of_a_stage(script):
    """Of 12 that are trained there are gradients and Adam's two moments, of all 15 a copy in each checkpoint."""
    model = torch.nn.Linear(3, 4)
    model.requires_grad_(False).weight.requires_grad_(True)
    frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    stage = SimpleNamespace(
        **{"name": "aar", "model": torch.nn.ParameterList([model.weight, frozen])},
        optimizer=torch.optim.Adam([model.weight]),
    )
    figures = script.count_weights(stage)
    assert figures["counted: parameters that are trained (M)"] == pytest.approx(12e-6)
    assert figures["counted: weights, gradients and Adam's moments on a GPU (MB)"] == pytest.approx(16 * 12e-6)
    assert figures["counted: a checkpoint (MB)"] == pytest.approx((4 * 15 + 8 * 12) / 1e6)


def test_kept_memory_is_what_is_kept_at_a_time(script):
    """Of a layer its input, of a tanh its output, though two things need it; until the backward pass."""
    layer = torch.nn.Linear(8, 16, bias=False)
    held = []

    def step(batches: list[torch.Tensor], number: int) -> None:
        for batch in batches:
            output = layer(batch).tanh()
            held.append((output * output).sum())
            if number == 0:
                held.pop().backward()

    stage = SimpleNamespace(model=layer, step=step)
    batches = [torch.ones(4, 8), torch.ones(4, 8)]
    one = 4 * (4 * 8 + 4 * 16)
    assert script.count_kept_bytes(stage, batches[:1], 0) == script.count_kept_bytes(stage, batches, 0) == one
    assert script.count_kept_bytes(stage, batches, 1) == 2 * one


def num_trained(*modules: torch.nn.Module) -> int:
    return sum(part.numel() for module in modules for part in module.parameters() if part.requires_grad)


@pytest.mark.slow
def test_table_has_all_figures(tables):
    """One column per recipe and one row per figure of the JSON."""
    lines = tables["text"].splitlines()
    assert "| | sat | aar |" in lines
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and line.count("|") == 4]
    assert names[1:] == list(tables["sat"]) == list(tables["aar"])


@pytest.mark.slow
def test_weights_are_counted(tables, short_codec_fields):
    """Everything that is trained, with the discriminator and without the frozen codec; and what checkpoints add."""
    config = SatConfig(**short_codec_fields)
    expected = num_trained(SatModel(config), AudioDiscriminator(DISCRIMINATORS))
    sat, aar = tables["sat"], tables["aar"]
    assert sat["counted: parameters that are trained (M)"] == pytest.approx(expected / 1e6)
    model = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "adaln": "shared"}
    expected = num_trained(AarForConditionalGeneration(AarConfig(**model)))
    assert aar["counted: parameters that are trained (M)"] == pytest.approx(expected / 1e6)
    entries = config.num_scales * config.codebook_size
    assert sat["counted: codebook statistics that they sum, at most (MB)"] == pytest.approx(
        4 * entries * (1 + 2 * config.codebook_dim) / 1e6
    )
    assert aar["counted: codebook statistics that they sum, at most (MB)"] == 0


@pytest.mark.slow
def test_flops_are_those_of_the_formula(tables):
    """A transformer's training takes six operations per weight and token, and twelve per pair of tokens and width."""
    config = AarConfig(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2)
    tokens, dim = config.num_slots, config.codec_config.codebook_dim
    per_token = DEPTH * 12 * WIDTH**2 + WIDTH * (config.codec_config.codebook_size + dim)
    expected = 6 * tokens * per_token + 12 * DEPTH * tokens**2 * WIDTH
    counted = 1e9 * tables["aar"]["counted: GFLOP per sound"]
    # and what is small: conditioning, and the frozen quantizer's convolutions
    assert expected < counted < 1.5 * expected


@pytest.mark.slow
def test_totals_follow_from_steps(tables):
    for figures in (tables["sat"], tables["aar"]):
        num_sounds = 10 * 3 * 2 * 8
        assert figures["recipe: sounds per step"] * figures["recipe: steps"] == num_sounds
        flops = figures["counted: GFLOP per sound"]
        assert figures["recipe: EFLOP, 10^18"] == pytest.approx(num_sounds * flops / 1e9)
        speed = 2 * flops / figures["measured here: CPU seconds per step"]
        assert figures["measured here: GFLOP per CPU second"] == pytest.approx(speed)


@pytest.mark.slow
def test_unknown_option_is_named(tmp_path):
    """A mistake in a recipe ends in one sentence, and ends at all, although another process finds it."""
    (tmp_path / "recipe.yaml").write_text("codec_confg: {}\n")
    finished = run(tmp_path / "recipe.yaml")
    assert finished.returncode == 2
    assert finished.stderr.count("Error: ") == 1 and "codec_confg" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_missing_recipe_is_refused_before_any_is_measured(tmp_path):
    (tmp_path / "sat.yaml").write_text("max_steps: 10\n")
    finished = run(tmp_path / "sat.yaml", tmp_path / "nowhere.yaml")
    assert finished.returncode == 2
    assert "does not exist" in finished.stderr and "Traceback" not in finished.stderr
