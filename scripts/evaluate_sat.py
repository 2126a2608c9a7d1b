"""
Evaluates a codec on held-out sounds and writes a report, `report.md` and `report.json`, with pictures and sounds:

    python scripts/evaluate_sat.py --model runs/sat/final --data_dir audioset --split eval --output_dir reports/sat
    accelerate launch scripts/evaluate_sat.py --model … --embeddings log_mel clap ast=FOLDER --num_examples 4000 …

Options may also stand in a YAML file, named first.
"""

from pathlib import Path

from accelerate import Accelerator
from transformers.utils import logging

from transformers_aar.evaluation.codec_evaluation import codec_report, illustrate_codec, measure_codec
from transformers_aar.evaluation.held_out import EvaluationArguments, HeldOutCrops, describe_evaluation
from transformers_aar.evaluation.listeners import Listeners
from transformers_aar.evaluation.reports import write_report
from transformers_aar.extras import require_package
from transformers_aar.hub.loading import load_codec
from transformers_aar.training.runs import run_script


def main(args: EvaluationArguments) -> None:
    require_package("torchmetrics", "eval")
    logging.set_verbosity_error()
    accelerator = Accelerator(cpu=args.use_cpu)
    codec = load_codec(args.model).to(accelerator.device).requires_grad_(False)
    rate = codec.config.sampling_rate
    crops = HeldOutCrops(args, accelerator, codec.config.window_length_s, [rate])
    listeners = Listeners(args.embeddings, args.classifier, crops.label_names, rate, accelerator.device)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    measured = measure_codec(codec, crops, listeners, accelerator)
    if accelerator.is_main_process:
        report = codec_report(codec, measured, listeners, f"The codec of {args.model}")
        describe_evaluation(report, args, codec, crops, listeners)
        illustrate_codec(report, codec, measured, crops, args.num_samples, folder)
        write_report(report, folder)
        print(f"{folder / 'report.md'}: {len(measured.rows['index'])} sounds")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, EvaluationArguments)
