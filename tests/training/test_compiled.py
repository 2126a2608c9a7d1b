"""Training through `torch.compile`, which is Accelerate's: `accelerate launch --dynamo_backend …`."""

import pytest
import torch
from forking import Forked, read_lines, read_tensors
from transformers import AutoModel

# a compiler that runs what it was given, gradients included
BACKEND = "aot_eager"


@pytest.mark.slow
@pytest.mark.parametrize("by_blocks", ["true", "false"])
def test_compiled_training(tmp_path, aar_options, by_blocks):
    """Losses and weights are those without, checkpoints have the same names, and either goes on from the other's."""
    compiled = {"ACCELERATE_DYNAMO_BACKEND": BACKEND, "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": by_blocks}
    options = aar_options | {"max_steps": 3, "validation_steps": 3, "mixed_precision": "no"}
    pieces = options | {"output_dir": tmp_path / "compiled", "resume": "latest"}
    a_step = pieces | {"max_minutes": 1e-6}
    runs = [
        ("plain", options | {"output_dir": tmp_path / "plain"}, {}),
        ("first", a_step, compiled),
        ("second", a_step, {}),
        ("third", pieces, compiled),
    ]
    for name, given, environment in runs:
        finished = Forked("train_aar.py", given, tmp_path / f"output-{name}", environment=environment).wait()
        assert finished.status == 0, finished.stderr
        assert "torch.compile" not in finished.stderr
    plain, compiled = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("plain", "compiled"))
    for one, other in zip(plain, compiled, strict=True):
        for figure in one.keys() - {"seconds"}:
            assert other[figure] == pytest.approx(one[figure], rel=1e-4), figure
    plain, compiled = (read_tensors(tmp_path / name / "checkpoint-000003") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    AutoModel.from_pretrained(tmp_path / "compiled" / "final")
