"""
Turns a dataset of sounds into a token cache, which `train_aar.py` reads instead of the sounds:

    python scripts/tokenize_dataset.py --codec runs/sat/final --data_dir audioset --split balanced_train \\
        --output_dir tokens/balanced_train
    accelerate launch scripts/tokenize_dataset.py --codec … --conditioner laion/larger_clap_general …

Options may also stand in a YAML file, named first. A run that was stopped is finished by the same command.
"""

from dataclasses import dataclass
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from datasets import Dataset
from transformers.utils import logging

from transformers_aar import SatModel
from transformers_aar.configuration_sat import POSITIVE_INTEGER, check_fields, number_between
from transformers_aar.data.token_cache import load_token_cache, read_report
from transformers_aar.data.tokenization import write_token_cache
from transformers_aar.evaluation.codebook_usage import CodebookUsage
from transformers_aar.hub.conversion import load_conditioner
from transformers_aar.hub.loading import load_codec
from transformers_aar.training.arguments import COUNT, TEXT, DatasetArguments, option, optional
from transformers_aar.training.runs import run_script

RULES = {
    **dict.fromkeys(("codec", "output_dir", "split"), TEXT),
    "conditioner": optional(TEXT),
    "batch_size": POSITIVE_INTEGER,
    "num_shards": optional(POSITIVE_INTEGER),
    "max_skipped_share": number_between(0, 1),
    "dataloader_num_workers": COUNT,
}


@dataclass
class TokenizeArguments(DatasetArguments):
    """Which sounds become tokens, by which models, and where."""

    codec: str = option("Folder or repository of a codec, or of a generator that contains one.")
    output_dir: str = option("Folder for the token cache.")
    split: str = option("Split to tokenize.", "unbalanced_train")
    conditioner: str | None = option("Folder or repository of a CLAP model that listens to every window.", None)
    batch_size: int = option("Windows that a process encodes at once.", 32)
    num_shards: int | None = option("Arrow files; by default one per 1000 sounds, at least one per process.", None)
    max_skipped_share: float = option("Largest share of broken sounds that a run puts up with.", 0.01)
    dataloader_num_workers: int = option("Processes that read sounds, per encoding process; 0 reads in this one.", 2)
    use_cpu: bool = option("Computes on the CPU, whatever else there is.", False)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, RULES)


def main(args: TokenizeArguments) -> None:
    logging.set_verbosity_error()
    # a process that is done waits for the others, who may still have hours to go
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=args.use_cpu, kwargs_handlers=[patience])
    codec = load_codec(args.codec).requires_grad_(False)
    codec.windows_per_batch = args.batch_size
    conditioner, processor = (None, None) if args.conditioner is None else load_conditioner(args.conditioner)
    with accelerator.main_process_first():  # the others find it in the cache
        dataset = args.load(args.split)
    write_token_cache(
        dataset,
        args.output_dir,
        codec,
        accelerator,
        conditioner=conditioner,
        conditioner_feature_extractor=processor and processor.feature_extractor,
        num_shards=args.num_shards,
        max_skipped_share=args.max_skipped_share,
        num_workers=args.dataloader_num_workers,
        description=" ".join(filter(None, (args.dataset_name or "AudioSet", args.data_dir, args.split))),
    )
    usage = count_codes(load_token_cache(args.output_dir, codec), codec, accelerator)
    if accelerator.is_main_process:
        print(summary(args.output_dir, codec, usage, accelerator.num_processes))
    accelerator.end_training()


def count_codes(tokens: Dataset, codec: SatModel, accelerator: Accelerator) -> CodebookUsage:
    """Codebook usage over the whole cache; each process reads its share of it."""
    usage = CodebookUsage(codec.config.scales, codec.config.codebook_size, accelerator.device)
    share = tokens.shard(accelerator.num_processes, accelerator.process_index, contiguous=True)
    for batch in share.select_columns("codes").with_format("torch").iter(1000):
        usage.update(batch["codes"].to(accelerator.device))
    usage.counts = accelerator.reduce(usage.counts)
    return usage


def summary(folder: str, codec: SatModel, usage: CodebookUsage, num_processes: int) -> str:
    config, report = codec.config, read_report(folder)
    num_windows = sum(report["num_windows"])
    hours = num_windows * config.window_stride / config.sampling_rate / 3600
    lines = ["scale  tokens  codes in use  perplexity"]
    for scale, (length, used, perplexity) in enumerate(zip(config.scales, usage.used, usage.perplexity)):
        lines.append(f"{scale:5}  {length:6}  {used:12.1%}  {perplexity:10.1f}")
    lines.append(f"entropy of single codes: {usage.entropy_per_token:.3f} nats per token, which a generator must beat")
    lines += [f"skipped {clip['name']}: {clip['reason']}" for clip in report["skipped"]]
    lines.append(
        f"{folder}: {num_windows} windows, {hours:.2f} hours, {num_windows * config.tokens_per_window} tokens from "
        f"{report['num_clips']} sounds ({len(report['skipped'])} skipped), by {num_processes} process(es)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, TokenizeArguments)
