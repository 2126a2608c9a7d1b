"""Training through `torch.compile`, which is Accelerate's: `accelerate launch --dynamo_backend …`."""

import sys

import pytest
import torch
from forking import Forked, read_lines, read_tensors
from torch._dynamo.callback import callback_handler
from transformers import AutoModel

# a compiler that runs what it was given, gradients included
BACKEND = "aot_eager"


def environment_of(by_blocks: bool) -> dict[str, str]:
    return {"ACCELERATE_DYNAMO_BACKEND": BACKEND, "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": str(by_blocks).lower()}


def tell_of_graphs() -> None:
    callback_handler.register_start_callback(lambda _: print("compiling a graph", file=sys.stderr))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, by_blocks, mixed_precision",
    [("aar", True, "no"), ("aar", True, "bf16"), ("aar", False, "no"), ("sat", False, "no")],
)
def test_compiled_training(tmp_path, options, stage, by_blocks, mixed_precision):
    """Losses and weights are those without, checkpoints have the same names, and either goes on from the other's."""
    options = options[stage] | {"max_steps": 3, "validation_steps": 3, "mixed_precision": mixed_precision}
    pieces = options | {"output_dir": tmp_path / "compiled", "resume": "latest"}
    a_step = pieces | {"max_minutes": 1e-6}
    runs = [
        ("plain", options | {"output_dir": tmp_path / "plain"}, {}),
        ("first", a_step, environment_of(by_blocks)),
        ("second", a_step, {}),
        ("third", pieces, environment_of(by_blocks)),
    ]
    for name, given, environment in runs:
        folder = tmp_path / f"output-{name}"
        finished = Forked(f"train_{stage}.py", given, folder, tell_of_graphs, environment).wait()
        assert finished.status == 0, finished.stderr
        assert ("compiling a graph" in finished.stderr) == bool(environment)
    plain, compiled = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("plain", "compiled"))
    tolerance = {"rel": 1e-4} if mixed_precision == "no" else {"rel": 2e-2, "abs": 2e-2}
    for one, other in zip(plain, compiled, strict=True):
        for figure in one.keys() - {"seconds"}:
            assert other[figure] == pytest.approx(one[figure], **tolerance), figure
    plain, compiled = (read_tensors(tmp_path / name / "checkpoint-000003") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    # rounding moves a few vectors to other codes, which shows in what is counted of them
    counted = ("quantizer.codebook", "quantizer.codebook_sum", "quantizer.cluster_size")
    if mixed_precision == "no":
        for name in [name for name in plain if not name.endswith(counted)]:
            torch.testing.assert_close(compiled[name], plain[name], rtol=1e-3, atol=1e-5, msg=name)
    AutoModel.from_pretrained(tmp_path / "compiled" / "final")


def test_a_tokenizer_has_no_blocks(tmp_path, sat_options):
    finished = Forked(
        "train_sat.py", sat_options | {"output_dir": tmp_path / "run"}, tmp_path, environment=environment_of(True)
    ).wait()
    assert finished.status != 0
    assert finished.stderr.splitlines()[-1].startswith("Error: The tokenizer has no blocks to compile")
