"""
Trains the small checkpoint that the package carries, on synthesised sounds, on a CPU.

    python scripts/train_bundled_checkpoint.py codec --output_dir runs/codec
    python scripts/train_bundled_checkpoint.py generator --codec runs/codec --output_dir runs/generator
    python scripts/train_bundled_checkpoint.py pack --generator runs/generator --output_dir runs/packed

The first two take about half an hour each, on one core and on two; their last state is in their output folders at
every interval. The third measures the result and writes the folder that the package carries.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.utils import parametrize
from transformers import GenerationConfig

from transformers_aar import (
    AarConfig,
    AarForConditionalGeneration,
    AarProcessor,
    SatConfig,
    SatFeatureExtractor,
    SatModel,
)
from transformers_aar.data.synthesis import SOUND_KINDS, synthesize
from transformers_aar.evaluation.nearest_centroid import NearestCentroid
from transformers_aar.hub.label_tokenizer import label_tokenizer
from transformers_aar.hub.model_cards import write_model_card
from transformers_aar.hub.packing import slim_down
from transformers_aar.training.losses import MelLoss, relative_error, weighted_sum
from transformers_aar.training.schedules import (
    annealed_weight_decay,
    cosine,
    lin0,
    set_weight_decay,
    weight_decay_groups,
)

# the kinds that there were when the checkpoint was made; newer ones follow them
KINDS = SOUND_KINDS[:12]
# held-out sounds have seeds from here on; training stays below
FIRST_HELD_OUT_SEED = 1_000_000

CODEC_CONFIG = {
    "num_filters": 16,
    "hidden_size": 64,
    "codebook_dim": 32,
    "codebook_size": 256,
    "num_lstm_layers": 1,
}
TRAINING_DATA = f"""
Sounds that the package synthesises itself (`transformers_aar.data.synthesis`), one second each, of {len(KINDS)}
kinds with AudioSet names, 250 of each kind. No recording was used. The
commands are in `scripts/train_bundled_checkpoint.py`.
""".strip()
LIMITS = (
    "This is a first small checkpoint, trained for less than an hour on two CPU cores. It shows that everything "
    "works; it is no useful sound library. It knows synthetic sounds only: recordings come out of its codec dull and "
    "rough."
)
GENERATOR_CONFIG = {
    "conditioning": "label",
    "labels": list(KINDS),
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "adaln": "shared",
    "drop_path_rate": 0.0,
}
# a small model is unsure of its finest scales, and sounds clearer when it is kept to what it thinks likely
GENERATION_DEFAULTS = {"do_sample": True, "temperature": 0.5, "top_k": 900, "top_p": 0.9, "guidance_scale": 1.5}
CODEC_LOSS_WEIGHTS = {"wave": 10.0, "mel": 0.2, "commitment": 1.0}


def sound_pool(seeds: range) -> tuple[torch.Tensor, torch.Tensor]:
    """One-second sounds `(num_kinds · num_seeds, 1, 24000)` and their label ids, kinds alternating."""
    pairs = [(kind, seed) for seed in seeds for kind in range(len(KINDS))]
    sounds = torch.stack([torch.from_numpy(synthesize(KINDS[kind], seed)) for kind, seed in pairs])
    return sounds[:, None], torch.tensor([kind for kind, _ in pairs])


def random_batches(num_items: int, batch_size: int, num_batches: int, seed: int):
    """Index batches that go through a new permutation of all items in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(num_batches):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(num_items, generator=generator)])
        yield order[:batch_size]
        order = order[batch_size:]


def random_crop(sounds: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    start = int(torch.randint(sounds.shape[-1] - length + 1, (1,), generator=generator))
    return sounds[..., start : start + length]


def autoencode(codec, sounds: torch.Tensor) -> torch.Tensor:
    """Encoder and decoder with nothing but the projections in between."""
    latents = codec.quantizer.project_in(codec.encoder(sounds).transpose(1, 2))
    return codec.decoder(codec.quantizer.project_out(latents).transpose(1, 2))


@torch.no_grad()
def normalize_outputs(codec: SatModel, sounds: torch.Tensor) -> None:
    """
    Data-dependent initialisation of weight-normed layers (Salimans & Kingma 2016, section 3): every convolution starts
    with outputs of mean 0 and variance 1. The checkpoint in the package started so; `initialize_from_data` came later.
    """

    def normalize(conv, _, output):
        mean = output.mean((0, 2))
        std = (output - mean[:, None]).std()
        conv.parametrizations.weight.original0.div_(std)
        conv.bias.sub_(mean).div_(std)
        return (output - mean[:, None]) / std

    convs = [module for module in codec.modules() if parametrize.is_parametrized(module, "weight")]
    hooks = [conv.register_forward_hook(normalize) for conv in convs]
    autoencode(codec, sounds)
    for hook in hooks:
        hook.remove()
    last = codec.decoder.layers[-1].conv
    for part in (last.parametrizations.weight.original0, last.bias):
        part.mul_(sounds.std())


def codec_losses(codec, mel_loss, sounds: torch.Tensor, quantized: bool) -> dict[str, torch.Tensor]:
    """The objective's terms. Before the quantizer joins, encoder and decoder only learn to pass the wave through."""
    if not quantized:
        return {"wave": relative_error(autoencode(codec, sounds), sounds)}
    output = codec(sounds)
    return {
        "wave": relative_error(output.audio_values, sounds),
        "mel": mel_loss(output.audio_values, sounds),
        "commitment": output.commitment_loss,
    }


def start_codebooks(codec, sounds: torch.Tensor, batch_size: int) -> None:
    """
    k-means on an encoder that already encodes: on a fresh one, whose output's scale still changes by the step, the
    vectors run away from the codebooks, a single code is left in use, and decoder and encoder learn to ignore it.
    """
    codec.start_codebooks(sounds)
    # as if one training batch had been counted, so that the moving averages forget the start at their normal pace
    for statistic in (codec.quantizer.cluster_size, codec.quantizer.codebook_sum):
        statistic.mul_(batch_size / len(sounds))


@torch.no_grad()
def validate_codec(codec, mel_loss, sounds: torch.Tensor) -> dict:
    """Mel distance and codebook use on held-out sounds."""
    codec.eval()
    audio_codes = codec.encode(sounds).audio_codes
    reconstructed = codec.decode(audio_codes).audio_values
    used = [len(scale.unique()) for scale in codec.split_scales(audio_codes)]
    codec.train()
    return {
        "validation_mel": mel_loss(reconstructed, sounds).item(),
        "validation_wave": relative_error(reconstructed, sounds).item(),
        "codes_used": used,
    }


def train_codec(args: argparse.Namespace) -> None:
    """Reconstruction, mel and commitment losses; adversarial training would double the time of a step."""
    set_seed(args.seed)
    accelerator = Accelerator(cpu=True)
    sounds, _ = sound_pool(range(args.sounds_per_kind))
    held_out, _ = sound_pool(range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 5))
    codec = SatModel(SatConfig(**CODEC_CONFIG)).train()
    mel_loss = MelLoss(codec.config.sampling_rate)
    normalize_outputs(codec, sounds[: 3 * len(KINDS)])
    optimizer = torch.optim.Adam(codec.parameters(), lr=args.learning_rate, betas=(0.9, 0.99))
    codec, optimizer = accelerator.prepare(codec, optimizer)

    # the end of the schedule, where the rate is next to nothing, is left out
    schedule_steps = round(args.max_steps * 22 / 19)
    start, crops = time.time(), torch.Generator().manual_seed(args.seed)
    for step, index in enumerate(random_batches(len(sounds), args.batch_size, args.max_steps, args.seed)):
        quantized = step >= args.quantizer_start
        if step == args.quantizer_start:
            start_codebooks(codec, sounds[: args.codebook_sounds], args.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * cosine(step, args.warmup_steps, schedule_steps)
        # without the quantizer there are no windows, and shorter crops make more steps of the same time
        batch = sounds[index] if quantized else random_crop(sounds[index], args.crop_length, crops)
        losses = codec_losses(codec, mel_loss, batch, quantized)
        accelerator.backward(weighted_sum(losses, {name: CODEC_LOSS_WEIGHTS[name] for name in losses}))
        accelerator.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        entry = {"step": step + 1, "seconds": time.time() - start, **{k: v.item() for k, v in losses.items()}}
        if (step + 1) % args.save_steps == 0 or step + 1 == args.max_steps:
            if quantized:
                entry |= validate_codec(codec, mel_loss, held_out)
            save(codec, SatFeatureExtractor(), args.output_dir)
        record(entry, "wave", args.output_dir)


@torch.no_grad()
def tokenize(codec, sounds: torch.Tensor) -> torch.LongTensor:
    """Codes `(num_sounds, tokens_per_window)` of one-second sounds."""
    return torch.cat([codec.encode(batch).audio_codes[:, 0] for batch in sounds.split(64)])


@torch.no_grad()
def validate_generator(model, codes: torch.LongTensor, labels: torch.LongTensor) -> dict:
    """Cross-entropy of held-out sounds, with their own labels and with the next kind's."""
    model.eval()
    losses = [model(input_ids=ids[:, None], audio_codes=codes).loss.item() for ids in (labels, labels.roll(1))]
    model.train()
    return {"validation_loss": losses[0], "validation_loss_wrong_labels": losses[1]}


def train_generator(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    codec = SatModel.from_pretrained(args.codec)
    sounds, labels = sound_pool(range(args.sounds_per_kind))
    held_out, held_out_labels = sound_pool(range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 5))
    codes, held_out_codes = tokenize(codec, sounds), tokenize(codec, held_out)
    model = AarForConditionalGeneration(AarConfig(codec_config=codec.config.to_dict(), **GENERATOR_CONFIG))
    model.codec_model.load_state_dict(codec.state_dict())
    feature_extractor = SatFeatureExtractor()
    processor = AarProcessor(feature_extractor, label_tokenizer(list(KINDS)), labels=list(KINDS))
    optimizer = torch.optim.AdamW(weight_decay_groups(model), lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    model, optimizer = accelerator.prepare(model.train(), optimizer)

    start = time.time()
    for step, index in enumerate(random_batches(len(codes), args.batch_size, args.max_steps, args.seed)):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * lin0(step, args.warmup_steps, args.max_steps)
        set_weight_decay(optimizer, annealed_weight_decay(step, args.max_steps))
        loss = model(input_ids=labels[index, None], audio_codes=codes[index]).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()
        entry = {"step": step + 1, "seconds": time.time() - start, "loss": loss.item()}
        if (step + 1) % args.save_steps == 0 or step + 1 == args.max_steps:
            entry |= validate_generator(model, held_out_codes, held_out_labels)
            save(accelerator.unwrap_model(model, keep_fp32_wrapper=False), processor, args.output_dir)
        record(entry, "loss", args.output_dir)


def record(entry: dict, loss_name: str, output_dir: Path) -> None:
    """Appends a step to the log, shows it when it was validated, and stops a run that has gone wrong."""
    with (output_dir / "log.jsonl").open("a") as log:
        log.write(json.dumps(entry) + "\n")
    if any(name.startswith("validation") for name in entry):
        print(json.dumps(entry), flush=True)
    if not math.isfinite(entry[loss_name]):
        raise SystemExit(f"The loss isn't finite at step {entry['step']}; the last good state is in {output_dir}.")


def save(model, processor, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def evaluate(model, processor) -> dict[str, str]:
    """Held-out sounds through the codec, and five generated sounds of each kind, named by the first classifier."""
    rate = model.config.sampling_rate
    classifier = NearestCentroid(*flat_pool(range(100)), rate)
    held_out, kinds = flat_pool(range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 5))
    codec = model.codec_model
    reconstructed = codec.decode(codec.encode(held_out[:, None]).audio_codes).audio_values[:, 0]
    prompts = [KINDS[kind] for kind in kinds]
    generators = [torch.Generator().manual_seed(FIRST_HELD_OUT_SEED + index) for index in range(len(prompts))]
    generated = model.generate(**processor(prompts), generator=generators)[:, 0]
    mel_distance = MelLoss(rate)(reconstructed[:, None], held_out[:, None]).item()
    measures = {f"mel distance of {len(kinds)} held-out sounds' reconstructions": f"{mel_distance:.3f}"}
    for name, sounds in (("held-out", held_out), ("reconstructed", reconstructed), ("generated", generated)):
        right = int((classifier(sounds) == kinds).sum())
        measures[f"{name} sounds that a nearest-centroid classifier names rightly"] = f"{right} of {len(kinds)}"
    return measures


def flat_pool(seeds: range) -> tuple[torch.Tensor, torch.Tensor]:
    sounds, kinds = sound_pool(seeds)
    return sounds[:, 0], kinds


def pack(args: argparse.Namespace) -> None:
    """
    Writes the folder that the package carries: weights in fp16 where it doesn't hurt, without the statistics that only
    training needs, and without a copy of the code, which the package has.
    """
    model = AarForConditionalGeneration.from_pretrained(args.generator, dtype=torch.float16).float()
    model.generation_config = GenerationConfig(**GENERATION_DEFAULTS, num_windows=1)
    processor = AarProcessor.from_pretrained(args.generator)
    measures = evaluate(model, processor)
    print(json.dumps(measures, indent=1))
    write_model_card(model, args.output_dir, training_data=TRAINING_DATA, evaluation=measures, limits=LIMITS)
    save(model.half(), processor, args.output_dir)

    slim_down(args.output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    codec = stages.add_parser("codec")
    codec.set_defaults(run=train_codec, max_steps=1900, batch_size=8, learning_rate=1e-3, warmup_steps=50)
    codec.set_defaults(sounds_per_kind=250, save_steps=100)
    codec.set_defaults(quantizer_start=700, codebook_sounds=240, crop_length=4800)
    generator = stages.add_parser("generator")
    generator.set_defaults(run=train_generator, max_steps=1900, batch_size=8, learning_rate=1.5e-3, warmup_steps=60)
    generator.set_defaults(sounds_per_kind=250, save_steps=200)
    generator.add_argument("--codec", required=True, help="output folder of the codec's training")
    packing = stages.add_parser("pack")
    packing.set_defaults(run=pack)
    packing.add_argument("--generator", required=True, help="output folder of the generator's training")
    for stage in (codec, generator, packing):
        stage.add_argument("--output_dir", type=Path, required=True)
    for stage in (codec, generator):
        stage.add_argument("--seed", type=int, default=0)
        stage.add_argument("--max_steps", type=int)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.run(args)


if __name__ == "__main__":
    main()
