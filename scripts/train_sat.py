"""Trains SAT: `python scripts/train_sat.py scripts/configs/sat_small.yaml --data_dir DIR --output_dir DIR`. Every
option of the file can be overridden by `--option value`; `--help` lists them. On several GPUs or machines:
`accelerate launch scripts/train_sat.py …`."""

from transformers_aar.training.arguments import DataArguments, LoopArguments, SatArguments
from transformers_aar.training.runs import run_script, train_sat

if __name__ == "__main__":
    run_script(train_sat, DataArguments, LoopArguments, SatArguments)
