"""What scripts say where a package of an extra is missing."""

import json
import sys

import pytest
from forking import SCRIPTS, Forked

from transformers_aar.training.arguments import read_recipe


def hide_torchmetrics():
    sys.modules["torchmetrics"] = None


@pytest.mark.parametrize("script", ["evaluate_sat.py", "reproduce_claims.py"])
def test_scripts_that_measure_need_torchmetrics(script, tmp_path):
    """They say so before anything else: the model and the sounds aren't even looked for."""
    if script == "evaluate_sat.py":
        options = {"model": "nowhere", "data_dir": "nowhere"}
    else:
        recipe = read_recipe(SCRIPTS / "configs" / "claims_short.yaml")
        options = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in recipe.items()}
    options |= {"output_dir": tmp_path / "out"}
    finished = Forked(script, options, tmp_path / "logs", prepare=hide_torchmetrics).wait()
    assert finished.status == 1
    assert finished.stderr.startswith("Error: torchmetrics is missing: ") and "'.[eval]'" in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
