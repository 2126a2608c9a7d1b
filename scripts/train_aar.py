"""Trains AAR on a codec: `python scripts/train_aar.py scripts/configs/aar_small.yaml --codec DIR --data_dir DIR
--output_dir DIR`. Every option of the file can be overridden by `--option value`; `--help` lists them. On several GPUs
or machines: `accelerate launch scripts/train_aar.py …`."""

from transformers_aar.training.arguments import AarArguments, DataArguments, LoopArguments
from transformers_aar.training.runs import run_script, train_aar

if __name__ == "__main__":
    run_script(train_aar, DataArguments, LoopArguments, AarArguments)
