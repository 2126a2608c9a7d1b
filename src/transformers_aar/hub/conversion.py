"""Conversion of the reference's checkpoints into this package's models. Sizes and variants are read off the tensors,
every tensor is used or named in an error, and what the reference derives from its configuration is checked before it
is dropped."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import ClapModel, ClapProcessor

from ..configuration_aar import AarConfig
from ..configuration_sat import SatConfig
from ..feature_extraction_sat import SatFeatureExtractor
from ..modeling_aar import AarForConditionalGeneration
from ..modeling_sat import SatModel
from ..processing_aar import AarProcessor
from ..training.discriminators import AudioDiscriminator
from .label_tokenizer import label_tokenizer
from .model_cards import write_model_card

PUBLISHED_SCALES = (1, 2, 4, 6, 9, 12, 16, 20, 25, 31, 37, 43, 50, 58, 66, 75)
PUBLISHED_HEAD_SIZE = 64

CONVERTED_TRAINING_DATA = (
    "The weights were converted from a checkpoint of the reference implementation, whose published models were "
    "trained on AudioSet. No licence is stated for them: ask their authors before you redistribute this folder."
)

# What a checkpoint holds besides weights: the state of its training run.
TRAINING_STATE = re.compile(r"epoch|step|optimizer_\w*state_dict")
CHECKPOINT_KEYS = {"SAT": "generator_state_dict", "AAR": "model_state_dict"}

SAT_NAMES = (
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.conv\.conv\.|\.convtr\.convtr\.", ".conv."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
    (r"^quantizer\.vq\.quant_resi\.qresi_ls\.", "quantizer.phi."),
    (r"^quantizer\.vq\.project_", "quantizer.project_"),
)
CODEBOOK_NAMES = {
    "embed": "codebook",
    "embed_avg": "codebook_sum",
    "cluster_size": "cluster_size",
    "inited": "initialized",
}
DISCRIMINATOR_NAMES = (
    (r"\.(convs\.\d+|conv_post)\.conv\.", r".\1."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)
AAR_NAMES = (
    (r"^pos_start$", "model.embeddings.start_position"),
    (r"^pos_1LC$", "model.embeddings.positions"),
    (r"^lvl_embed\.", "model.embeddings.levels."),
    (r"^word_embed\.", "model.embeddings.input_proj."),
    (r"^uncond_embedding$", "model.uncond_embedding"),
    (r"^class_emb\.", "model.conditioning_mlp."),
    (r"^shared_ada_lin\.1\.", "model.shared_modulation."),
    (r"^blocks\.(\d+)\.", r"model.layers.\1."),
    (r"\.ada_lin\.1\.", ".modulation."),
    (r"\.ada_gss$", ".modulation_offset"),
    (r"\.attn\.mat_qkv\.", ".attn.qkv_proj."),
    (r"\.attn\.proj\.", ".attn.o_proj."),
    (r"\.attn\.scale_mul_1H11$", ".attn.log_scale"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"^head_nm\.", "model.norm."),
    (r"^head\.0\.", "model.norm."),
    (r"^head\.(1\.)?", "lm_head."),
)
# The reference keeps broadcast dimensions in these, (1, n_0, W), (1, L, W), (1, 1, 6, W) and (1, num_heads, 1, 1):
# how many dimensions there are, and what takes ours out.
BROADCAST_DIMENSIONS = {
    "start_position": (3, 0),
    "positions": (3, 0),
    "modulation_offset": (4, (0, 0)),
    "log_scale": (4, (0, slice(None), 0, 0)),
}


def convert_checkpoint(
    sat_path: str | Path,
    output_dir: str | Path,
    aar_path: str | Path | None = None,
    scales: Sequence[int] | None = None,
    upsampling_ratios: Sequence[int] | None = None,
    conditioner: str | None = None,
) -> SatModel | AarForConditionalGeneration:
    """Converts the reference's checkpoints into a folder that `from_pretrained` loads.

    The folder holds the codec, or with `aar_path` the complete generator with the codec inside; its processor,
    a model card, and the weights of the codec's discriminator as `discriminator.safetensors`.

    Args:
        sat_path (`str` or `Path`): the codec's checkpoint.
        output_dir (`str` or `Path`): a folder that doesn't exist yet or is empty; it appears once it is complete.
        aar_path (`str` or `Path`, *optional*): the checkpoint of a generator trained on this codec.
        scales (`Sequence[int]`, *optional*): tokens per scale. Needed only without `aar_path`, which tells them, and
            when they are not the 16 published ones.
        upsampling_ratios (`Sequence[int]`, *optional*): strides of the decoder, first to last; read off the kernels,
            so giving them only checks them.
        conditioner (`str`, *optional*): name or folder of the CLAP model to put inside the generator. Without it the
            generator takes `conditioning_embeds` until `attach_conditioner`.

    Returns:
        [`SatModel`] or [`AarForConditionalGeneration`]: the model that was saved.

    Raises:
        ValueError: where a file is not the checkpoint it should be, tensors are missing, left over or contradict each
            other, or the folder can't be written.
    """
    if conditioner is not None and aar_path is None:
        raise ValueError("A conditioner belongs to a generator: give the AAR checkpoint as well (--aar).")
    refuse_used_folder(Path(output_dir))
    sat_checkpoint = read_checkpoint(sat_path, "SAT")
    aar_tensors = None
    if aar_path is not None:
        aar_tensors = read_checkpoint(aar_path, "AAR")["model_state_dict"]
        scales = agreed_scales(scales, aar_tensors)

    codec = convert_sat(sat_checkpoint["generator_state_dict"], scales, upsampling_ratios)
    discriminator = convert_discriminator(sat_checkpoint.get("disc_state_dict", {}))
    model = codec if aar_tensors is None else convert_aar(aar_tensors, codec)
    clap_processor = None
    if conditioner is not None:
        clap, clap_processor = load_conditioner(conditioner)
        model.attach_conditioner(clap)
    with staged_folder(Path(output_dir)) as folder:
        write_model_card(model, folder, license="unknown", training_data=CONVERTED_TRAINING_DATA)
        model.save_pretrained(folder)
        save_processor(model, folder, clap_processor)
        if discriminator is not None:
            discriminator.save(folder / "discriminator.safetensors")
    return model


# --- Reading ---


def read_checkpoint(path: str | Path, kind: str) -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts of a checkpoint of the reference, `kind` "SAT" or "AAR", without DDP's prefix to their names."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path} doesn't exist: give the {kind}'s .pth file.") from error
    except Exception as error:  # bytes that are no pickle at all make the unpickler fail in any way
        raise ValueError(
            f"{path} can't be read as a PyTorch checkpoint that holds only tensors: give the {kind}'s .pth file, "
            "complete and as it was published."
        ) from error
    found = [name for name, key in CHECKPOINT_KEYS.items() if isinstance(checkpoint, dict) and key in checkpoint]
    if found != [kind]:
        what = f"the {found[0]}'s checkpoint" if found else "no checkpoint of the reference"
        raise ValueError(f"{path} is {what}; the {kind}'s is wanted here, which has a {CHECKPOINT_KEYS[kind]}.")
    known = {CHECKPOINT_KEYS[kind], "disc_state_dict"} if kind == "SAT" else {CHECKPOINT_KEYS[kind]}
    left_over = [key for key in checkpoint if key not in known and not TRAINING_STATE.fullmatch(str(key))]
    if left_over:
        raise ValueError(f"{path} has entries that no model takes: {enumerate_names(left_over)}.")
    return {key: without_ddp_prefix(checkpoint[key], path) for key in known if key in checkpoint}


def without_ddp_prefix(state_dict: dict[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} doesn't hold a dictionary of tensors where the reference puts its weights.")
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


# --- Names and loading ---


class RenamedTensors(dict[str, torch.Tensor]):
    """The tensors of a checkpoint under our names, which remembers the reference's names for its messages.

    Args:
        state_dict (`dict[str, torch.Tensor]`): tensors under the reference's names.
        names (`Sequence[tuple[str, str]]`): patterns and replacements, applied to each name one after the other.
        kind (`str`): "SAT", "AAR" or "discriminator", for messages.
    """

    def __init__(self, state_dict: dict[str, torch.Tensor], names: Sequence[tuple[str, str]], kind: str):
        super().__init__()
        self.kind = kind
        self.origins = {}
        for origin, tensor in state_dict.items():
            name = origin
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            # Two names that become one would lose a tensor: the second keeps its own and is left over.
            name = origin if name in self else name
            self[name], self.origins[name] = tensor, origin

    def __missing__(self, name: str):
        raise ValueError(f"The {self.kind} checkpoint is incomplete: nothing in it makes {name}.")

    def take(self, name: str) -> torch.Tensor:
        """Removes the tensor of that name and returns it."""
        tensor = self[name]
        del self[name]
        return tensor

    def shape(self, name: str, num_dimensions: int) -> torch.Size:
        """The sizes of a tensor, which must have so many dimensions, none of them empty."""
        shape = self[name].shape
        if len(shape) != num_dimensions or 0 in shape:
            raise ValueError(
                f"The {self.kind} checkpoint's {self.origins.get(name, name)} has the shape {tuple(shape)}, "
                f"where {num_dimensions} filled dimensions are wanted: give a checkpoint of the reference."
            )
        return shape

    def count(self, pattern: str) -> int:
        """How many different numbers the one group of `pattern` finds at the start of the names."""
        return len({match[1] for name in self if (match := re.match(pattern, name))})

    def load_into(self, module: nn.Module) -> None:
        """Loads every tensor into `module`, which must have the same names and shapes."""
        expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
        self._refuse([name for name in self if name not in expected], "has tensors that no part of the model takes")
        self._refuse([name for name in expected if name not in self], "is incomplete, nothing in it makes")
        unequal = [name for name in self if self[name].shape != expected[name]]
        self._refuse(unequal, "contradicts itself (or the options given) in the sizes of")
        module.load_state_dict(self)

    def _refuse(self, names: list[str], fault: str) -> None:
        if names:
            shown = enumerate_names([self.origins.get(name, name) for name in names])
            raise ValueError(f"The {self.kind} checkpoint {fault}: {shown}.")


def enumerate_names(names: Sequence[str], at_most: int = 8) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


# --- SAT ---


def convert_sat(
    state_dict: dict[str, torch.Tensor],
    scales: Sequence[int] | None = None,
    upsampling_ratios: Sequence[int] | None = None,
) -> SatModel:
    """The codec of a `generator_state_dict`, with its codebooks' statistics."""
    tensors = RenamedTensors(state_dict, SAT_NAMES, "SAT")
    stack_codebooks(tensors)
    model = SatModel(SatConfig(**sat_config_fields(tensors, scales, upsampling_ratios)))
    tensors.load_into(model)
    return model.eval()


def stack_codebooks(tensors: RenamedTensors) -> None:
    """Replaces the tensors of each scale's codebook, (V, C) or (V,), by those of all scales, (S, V, C) or (S, V)."""
    num_scales = tensors.count(r"quantizer\.vq\.layers\.(\d+)\._codebook\.")
    for theirs, ours in CODEBOOK_NAMES.items():
        names = [f"quantizer.vq.layers.{scale}._codebook.{theirs}" for scale in range(num_scales)]
        per_scale = [tensors.take(name) for name in names]
        if len({tensor.shape for tensor in per_scale}) > 1:
            raise ValueError(
                f"The SAT checkpoint's codebooks have different sizes ({theirs}): one size per model is supported."
            )
        if per_scale:
            tensors[f"quantizer.{ours}"] = torch.stack(per_scale)
    # The reference notes for each scale whether its codebook has been started; ours start together.
    tensors["quantizer.initialized"] = tensors["quantizer.initialized"].bool().all()
    tensors["quantizer.num_updates"] = torch.tensor(0)


def sat_config_fields(
    tensors: RenamedTensors, scales: Sequence[int] | None, upsampling_ratios: Sequence[int] | None
) -> dict:
    """The fields of `SatConfig` that the tensors' shapes tell, with what they can't tell from the arguments."""
    encoder, decoder = direct_convolutions(tensors, "encoder"), direct_convolutions(tensors, "decoder")
    num_filters, audio_channels, kernel_size = encoder[0]
    hidden_size, _, last_kernel_size = encoder[-1]
    residual_channels, channels, residual_kernel_size = tensors.shape(weight_name("encoder.layers.1.block.1"), 3)
    num_scales, codebook_size, codebook_dim = tensors.shape("quantizer.codebook", 3)
    ratios = [kernel // 2 for _, _, kernel in decoder[1:-1]]
    if upsampling_ratios is not None and list(upsampling_ratios) != ratios:
        raise ValueError(
            f"The SAT checkpoint's kernels are made for the upsampling ratios {ratios}, not {list(upsampling_ratios)}."
        )
    scales = scales or published_scales(num_scales)
    if len(scales) != num_scales:
        raise ValueError(
            f"The SAT checkpoint has {num_scales} scales, but {len(scales)} are given or told by the AAR checkpoint: "
            "they don't belong together."
        )
    num_phi = tensors.count(r"quantizer\.phi\.(\d+)\.")
    return {
        "audio_channels": audio_channels,
        "upsampling_ratios": ratios,
        "num_filters": num_filters,
        "num_residual_layers": tensors.count(r"encoder\.layers\.(\d+)\.block\.1\.") // len(ratios),
        "kernel_size": kernel_size,
        "last_kernel_size": last_kernel_size,
        "residual_kernel_size": residual_kernel_size,
        "compress": channels // residual_channels,
        "use_conv_shortcut": weight_name("encoder.layers.1.shortcut") in tensors,
        "num_lstm_layers": tensors.count(r"encoder\.layers\.\d+\.lstm\.weight_ih_l(\d+)"),
        "hidden_size": hidden_size,
        "codebook_dim": codebook_dim,
        "codebook_size": codebook_size,
        "scales": list(scales),
        "phi_kernel_sizes": [tensors.shape(f"quantizer.phi.{index}.weight", 3)[-1] for index in range(num_phi)],
    }


def weight_name(layer: str) -> str:
    return f"{layer}.conv.parametrizations.weight.original1"


def direct_convolutions(tensors: RenamedTensors, side: str) -> list[torch.Size]:
    """Shapes of the convolutions that are layers themselves: the first, those that change the rate, the last."""
    pattern = re.escape(weight_name(f"{side}.layers.NUMBER")).replace("NUMBER", r"(\d+)")
    found = {int(match[1]): tensors.shape(name, 3) for name in tensors if (match := re.fullmatch(pattern, name))}
    if len(found) < 3:
        raise ValueError(
            f"The SAT checkpoint is incomplete: its {side} has {len(found)} of the at least 3 convolutions."
        )
    return [found[index] for index in sorted(found)]


def published_scales(num_scales: int) -> Sequence[int]:
    if num_scales != len(PUBLISHED_SCALES):
        raise ValueError(
            f"The SAT checkpoint has {num_scales} scales, and its tensors don't tell how many tokens each has: "
            "give the numbers (--scales 1,2,4,…) or the AAR checkpoint that was trained on it (--aar)."
        )
    return PUBLISHED_SCALES


# --- Discriminator ---


def convert_discriminator(state_dict: dict[str, torch.Tensor]) -> AudioDiscriminator | None:
    """The discriminator of a `disc_state_dict`; None where there is none."""
    if not state_dict:
        return None
    tensors = RenamedTensors(state_dict, DISCRIMINATOR_NAMES, "discriminator")
    num_resolutions = tensors.count(r"discriminators\.(\d+)\.")
    n_ffts = [take_dft_kernels(tensors, f"discriminators.{index}.spec_transform") for index in range(num_resolutions)]
    num_filters = tensors.shape("discriminators.0.convs.0.weight", 4)[0]
    discriminator = AudioDiscriminator({"stft": {"n_ffts": n_ffts, "num_filters": num_filters}})
    tensors.load_into(discriminator.discriminators["stft"])
    return discriminator


def take_dft_kernels(tensors: RenamedTensors, prefix: str) -> int:
    """Removes the fixed Fourier kernels of one resolution, which a true STFT replaces; returns their length."""
    n_fft = tensors.shape(f"{prefix}.conv_real.weight", 3)[-1]
    real, imaginary = (tensors.take(f"{prefix}.conv_{part}.weight") for part in ("real", "imag"))
    kernels = torch.fft.rfft(torch.diag(torch.hann_window(n_fft, dtype=torch.float64))).mT[:, None]
    for kernel, expected in ((real, kernels.real), (imaginary, kernels.imag)):
        if kernel.shape != expected.shape or not torch.allclose(kernel.double(), expected, atol=1e-4):
            raise ValueError(
                f"The discriminator's {prefix} is not a Fourier transform with a Hann window of {n_fft} samples."
            )
    return n_fft


# --- AAR ---


def convert_aar(state_dict: dict[str, torch.Tensor], codec: SatModel) -> AarForConditionalGeneration:
    """The generator of a `model_state_dict`, with `codec` inside and no conditioner yet."""
    tensors = RenamedTensors(state_dict, AAR_NAMES, "AAR")
    take_derived_buffers(tensors, codec.config.scales)
    for name in tensors:
        if (kept := BROADCAST_DIMENSIONS.get(name.rpartition(".")[2])) is not None:
            num_dimensions, index = kept
            tensors.shape(name, num_dimensions)
            tensors[name] = tensors[name][index]
    refuse_other_codec(tensors, codec.config)
    model = AarForConditionalGeneration(AarConfig(codec_config=codec.config, **aar_config_fields(tensors)))
    tensors.update({f"codec_model.{name}": tensor for name, tensor in codec.state_dict().items()})
    tensors.load_into(model)
    return model.eval()


def load_conditioner(name: str) -> tuple[ClapModel, ClapProcessor]:
    try:
        return ClapModel.from_pretrained(name), ClapProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} can't be loaded as a CLAP model with its processor: {reason}") from error


def agreed_scales(scales: Sequence[int] | None, aar_tensors: dict[str, torch.Tensor]) -> list[int] | None:
    """Tokens per scale as the caller and the generator's table of levels tell them; None where neither does."""
    if "lvl_1L" not in aar_tensors:
        return scales
    levels, counts = aar_tensors["lvl_1L"].flatten().unique_consecutive(return_counts=True)
    told = counts.tolist()
    if levels.tolist() != list(range(len(told))):
        raise ValueError("The AAR checkpoint's lvl_1L is not a table of levels: it must count up from 0.")
    if scales is not None and list(scales) != told:
        raise ValueError(f"The AAR checkpoint was trained with the scales {told}, not {list(scales)}.")
    return told


def take_derived_buffers(tensors: RenamedTensors, scales: Sequence[int]) -> None:
    """Removes what the reference computes from its configuration, once it is sure that it says what ours says."""
    levels = torch.repeat_interleave(torch.tensor(scales))
    visible = levels[:, None] >= levels
    derived = {"lvl_1L": levels, "attn_bias_for_masking": torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)}
    derived |= {name: torch.zeros(tensors.shape(name, 1)) for name in tensors if name.endswith(".zero_k_bias")}
    for name in derived.keys() & tensors.keys():
        if not torch.equal(tensors.take(name).squeeze().to(derived[name].dtype), derived[name]):
            raise ValueError(
                f"The AAR checkpoint's {tensors.origins[name]} is not what the scales {list(scales)} make it: "
                "it belongs to another variant of the model."
            )


def aar_config_fields(tensors: RenamedTensors) -> dict:
    """The fields of `AarConfig` that the tensors' shapes tell."""
    hidden_size, conditioning_dim = tensors.shape("model.conditioning_mlp.fc1.weight", 2)
    use_qk_norm = "model.layers.0.self_attn.log_scale" in tensors
    if "model.shared_modulation.weight" in tensors:
        adaln = "shared"
    else:
        adaln = "per_block" if "model.layers.0.modulation.weight" in tensors else "none"
    return {
        "conditioning": "clap",
        "conditioning_dim": conditioning_dim,
        "hidden_size": hidden_size,
        "num_hidden_layers": tensors.count(r"model\.layers\.(\d+)\."),
        # Only the scales of q/k normalisation show the number of heads; published ones have 64 dimensions.
        "num_attention_heads": (
            len(tensors["model.layers.0.self_attn.log_scale"]) if use_qk_norm else hidden_size // PUBLISHED_HEAD_SIZE
        ),
        "mlp_ratio": tensors.shape("model.layers.0.mlp.fc1.weight", 2)[0] / hidden_size,
        "adaln": adaln,
        "use_qk_norm": use_qk_norm,
    }


def refuse_other_codec(tensors: RenamedTensors, codec_config: SatConfig) -> None:
    """An error where the generator was trained on a codec of other sizes."""
    sizes = {
        "codebook_dim": (tensors.shape("model.embeddings.input_proj.weight", 2)[1], codec_config.codebook_dim),
        "codebook_size": (tensors.shape("lm_head.weight", 2)[0], codec_config.codebook_size),
        "number of scales": (tensors.shape("model.embeddings.levels.weight", 2)[0], codec_config.num_scales),
        "tokens_per_window": (len(tensors["model.embeddings.positions"]), codec_config.tokens_per_window),
    }
    for name, (wanted, given) in sizes.items():
        if wanted != given:
            raise ValueError(
                f"The AAR checkpoint belongs to a SAT with {name} {wanted}, and this one has {given}: "
                "give the SAT that it was trained on."
            )


# --- Writing ---


def save_processor(
    model: SatModel | AarForConditionalGeneration, folder: Path, clap_processor: ClapProcessor | None
) -> None:
    """Saves what turns sounds into the codec's inputs, and for a generator prompts into its conditioning."""
    codec_config = model.config if isinstance(model, SatModel) else model.config.codec_config
    processor = SatFeatureExtractor(codec_config.audio_channels, codec_config.sampling_rate)
    if clap_processor is not None:
        processor = AarProcessor(processor, clap_processor.tokenizer, clap_processor.feature_extractor)
    elif not isinstance(model, SatModel):
        processor = AarProcessor(processor, label_tokenizer())
    processor.save_pretrained(folder)


def refuse_used_folder(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: name a new one.")


@contextmanager
def staged_folder(output_dir: Path) -> Iterator[Path]:
    """A folder beside `output_dir` that takes its place when the block ends without an error, and vanishes if not."""
    staged = output_dir.absolute().with_name(f".{output_dir.absolute().name}.{os.getpid()}")
    try:
        staged.mkdir(parents=True)
        yield staged
        staged.replace(output_dir)
    except OSError as error:
        raise ValueError(f"{output_dir} can't be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
