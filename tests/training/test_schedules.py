"""The schedules against the reference's values, and which parameters decay."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from transformers_aar.training.schedules import (
    LEARNING_RATE_SCHEDULES,
    annealed_weight_decay,
    cosine,
    lin0,
    set_weight_decay,
    weight_decay_groups,
)

FIXTURES = Path(__file__).parent.parent / "fixtures"


def reference(name: str):
    """The schedule's parameters, and the reference's values at twenty iterations."""
    expected = load_file(FIXTURES / name / "expected.safetensors")
    return json.loads((FIXTURES / name / "config.json").read_text())["lr"], expected


@pytest.mark.parametrize("schedule", LEARNING_RATE_SCHEDULES)
@pytest.mark.parametrize("name", ["tiny", "tiny_noproj", "tiny_noaln"])
def test_learning_rates_are_the_references(name, schedule):
    """With and without warm-up; the reference rounds a fractional warm-up to whole iterations."""
    parameters, expected = reference(name)
    rates = [
        parameters["peak_lr"]
        * LEARNING_RATE_SCHEDULES[schedule](
            iteration,
            warmup_iterations=round(parameters["wp_it"]),
            total_iterations=parameters["max_it"],
            start_ratio=parameters["wp0"],
            end_ratio=parameters["wpe"],
        )
        for iteration in expected["lr.iterations"].tolist()
    ]
    assert rates == pytest.approx(expected[f"lr.{schedule}"].tolist(), abs=1e-12, rel=0)


@pytest.mark.parametrize("name", ["tiny", "tiny_noproj", "tiny_noaln"])
def test_weight_decay_is_the_references(name):
    """It falls from the first iteration on, whatever the warm-up."""
    parameters, expected = reference(name)
    decays = [
        annealed_weight_decay(iteration, parameters["max_it"], parameters["wd"], parameters["wd_end"])
        for iteration in expected["lr.iterations"].tolist()
    ]
    assert decays == pytest.approx(expected["lr.weight_decay"].tolist(), abs=1e-12, rel=0)


@pytest.mark.parametrize("schedule", [lin0, cosine])
def test_short_runs_have_a_finite_rate(schedule):
    """One iteration runs at the peak, and so does what follows a warm-up as long as the run."""
    assert schedule(0, warmup_iterations=0, total_iterations=1) == 1
    assert schedule(4, warmup_iterations=4, total_iterations=5) == 1
    assert schedule(4, warmup_iterations=4, total_iterations=4) == 1
    assert annealed_weight_decay(0, total_iterations=1) == 0.05


@pytest.mark.parametrize("schedule", [lin0, cosine])
def test_rate_stays_at_its_end_after_the_run(schedule):
    """A scheduler steps once more after the last iteration."""
    assert schedule(250, warmup_iterations=10, total_iterations=100) == pytest.approx(0.01)


def test_schedule_drives_lambda_lr():
    """The factors are what PyTorch's scheduler multiplies the peak rate with."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=2.0)
    factor = partial(lin0, warmup_iterations=2, total_iterations=40)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rates = []
    for _ in range(40):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([2 * 0.005, 2 * 0.5025, 2.0, 2.0])
    assert rates[-1] == pytest.approx(2 * 0.01)


class Backbone(nn.Module):
    """Parameters under the names they have in the generator."""

    def __init__(self):
        super().__init__()
        self.codec_model = nn.Linear(2, 2).requires_grad_(False)
        self.embeddings = nn.Module()
        self.embeddings.start_position = nn.Parameter(torch.ones(1, 4))
        self.embeddings.positions = nn.Parameter(torch.ones(3, 4))
        self.embeddings.levels = nn.Embedding(2, 4)
        self.embeddings.input_proj = nn.Linear(2, 4)
        self.modulation_offset = nn.Parameter(torch.ones(6, 4))
        self.log_scale = nn.Parameter(torch.ones(2))
        self.modulation = nn.Linear(4, 24)


def test_only_trainable_matrices_decay():
    """Positions, levels and offsets are matrices that don't."""
    model = Backbone()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, undecayed = ({names[id(p)] for p in group["params"]} for group in weight_decay_groups(model))
    assert decayed == {"embeddings.input_proj.weight", "modulation.weight"}
    assert undecayed == {
        "embeddings.start_position",
        "embeddings.positions",
        "embeddings.levels.weight",
        "embeddings.input_proj.bias",
        "modulation_offset",
        "log_scale",
        "modulation.bias",
    }


def test_set_weight_decay_reaches_the_decaying_group_only():
    """Without gradients' help, a step shrinks matrices and leaves everything else as it was."""
    model = Backbone()
    optimizer = torch.optim.AdamW(weight_decay_groups(model), lr=0.1, weight_decay=0.0)
    set_weight_decay(optimizer, 0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["modulation.weight"].detach(), before["modulation.weight"] * 0.95)
    assert torch.equal(after["embeddings.positions"], before["embeddings.positions"])
    assert torch.equal(after["modulation.bias"], before["modulation.bias"])
