"""
Checks the paper's claims in miniature: trains codecs and generators of equal budget, scale by scale and token by
token, and prints one table of what they are worth, with a verdict on each claim:

    python scripts/reproduce_claims.py scripts/configs/claims.yaml --output_dir runs/claims

What the output folder holds already is reused, so that the same command goes on after an interruption. It writes
`report.md` and `report.json`. docs/claims.md explains the columns.
"""

from transformers_aar.evaluation.claims import ClaimsArguments, reproduce_claims
from transformers_aar.extras import require_package
from transformers_aar.training.runs import run_script


def main(args: ClaimsArguments) -> None:
    require_package("torchmetrics", "eval")
    reproduce_claims(args)


if __name__ == "__main__":
    run_script(main, ClaimsArguments)
