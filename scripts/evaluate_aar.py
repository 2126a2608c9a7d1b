"""
Evaluates a generator on held-out sounds and writes a report, `report.md` and `report.json`, with pictures and sounds:

    python scripts/evaluate_aar.py --model runs/aar/final --data_dir audioset --split eval --output_dir reports/aar
    accelerate launch scripts/evaluate_aar.py --model … --num_per_label 20 --embeddings log_mel ast=FOLDER …

A sound is generated for the conditioning of each held-out sound (its labels, or what CLAP hears in it), or with
`--num_per_label` and `--prompts` for labels and texts. Options may also stand in a YAML file, named first.
"""

from pathlib import Path

from accelerate import Accelerator
from transformers.utils import logging

from transformers_aar import AarForConditionalGeneration, AarProcessor
from transformers_aar.evaluation.generator_evaluation import (
    GeneratorEvaluation,
    SamplingArguments,
    generator_report,
    illustrate_generator,
)
from transformers_aar.evaluation.held_out import EvaluationArguments, HeldOutCrops, describe_evaluation
from transformers_aar.evaluation.listeners import Listeners
from transformers_aar.evaluation.reports import write_report
from transformers_aar.hub.loading import explained, load_model
from transformers_aar.training.runs import run_script


def main(args: EvaluationArguments, sampling: SamplingArguments) -> None:
    logging.set_verbosity_error()
    accelerator = Accelerator(cpu=args.use_cpu)
    model, processor = load_generator(args.model)
    model.to(accelerator.device)
    crops = load_crops(args, accelerator, model, processor)
    rate = model.config.sampling_rate
    listeners = Listeners(args.embeddings, args.classifier, crops.label_names, rate, accelerator.device)
    evaluation = GeneratorEvaluation(model, processor, crops, listeners, sampling, args, accelerator)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    held_out = evaluation.measure_held_out()
    orders = evaluation.orders(held_out)
    generated = evaluation.measure_generated(orders)
    if accelerator.is_main_process:
        report = generator_report(evaluation, held_out, orders, generated, f"The generator of {args.model}")
        describe_evaluation(report, args, model.codec_model, crops, listeners)
        report.settings |= describe_sampling(evaluation)
        illustrate_generator(report, evaluation, held_out, orders, args.num_samples, folder)
        write_report(report, folder)
        print(f"{folder / 'report.md'}: {len(orders)} generated sounds, {len(held_out['index'])} held-out ones")
    accelerator.end_training()


def load_generator(source: str) -> tuple[AarForConditionalGeneration, AarProcessor]:
    model = load_model(source)
    if model.config.model_type != "aar":
        raise ValueError(f"{source} is a codec, which generates nothing by itself: evaluate it with evaluate_sat.py.")
    with explained(f"{source} can't be loaded as a processor"):
        processor = AarProcessor.from_pretrained(source)
    has_ears = model.conditioner is not None and processor.conditioner_feature_extractor is not None
    if model.config.conditioning == "clap" and not has_ears:
        raise ValueError(f"{source} has no CLAP model inside: convert it again with --conditioner.")
    return model, processor


def load_crops(
    args: EvaluationArguments, accelerator: Accelerator, model: AarForConditionalGeneration, processor: AarProcessor
) -> HeldOutCrops:
    """Held-out sounds at the codec's rate, and at the conditioner's where there is one."""
    config, extractor = model.config, processor.conditioner_feature_extractor
    rates = [config.sampling_rate, *([] if extractor is None else [extractor.sampling_rate])]
    is_labelled = config.conditioning == "label"
    labels = config.labels if is_labelled else None
    return HeldOutCrops(args, accelerator, config.codec_config.window_length_s, rates, labels, is_labelled)


def describe_sampling(evaluation: GeneratorEvaluation) -> dict[str, str | float | None]:
    """What applied when the sounds were drawn."""
    names = ("guidance_scale", "temperature", "top_k", "top_p", "unguided_scales", "max_scales")
    options = {name: getattr(evaluation.generation_config, name) for name in names}
    sampling = evaluation.sampling
    conditioned_by = "prompts" if sampling.prompts or sampling.num_per_label else "held-out sounds"
    return {"conditioned by": conditioned_by} | options | {"int8": sampling.int8}


if __name__ == "__main__":
    run_script(main, EvaluationArguments, SamplingArguments)
