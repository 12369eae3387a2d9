"""SANA, with the multi-step solver that it comes with; it is compared on the Euler scheduler of the same shift."""

from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from cdm_lightning.backbones.sana import SanaBackbone
from tiny_pipelines import parts
from tiny_pipelines.family import TinyFamily

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁")


def byte_tokenizer() -> GemmaTokenizer:
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])


def build():
    tokenizer = byte_tokenizer()
    return parts.seeded(
        SanaPipeline,
        tokenizer=lambda: tokenizer,
        text_encoder=lambda: Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=16,
            )
        ),
        vae=lambda: AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_out_channels=(4, 4, 4),
            decoder_block_out_channels=(4, 4, 4),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.4,
        ),
        transformer=lambda: SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
            timestep_scale=0.5,
        ),
        scheduler=lambda: DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def use_euler(pipeline: SanaPipeline) -> None:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)


FAMILY = TinyFamily(
    name="sana",
    experiment="sana_cdm",
    backbone=SanaBackbone,
    build=build,
    call={"guidance_scale": 1.0, "use_resolution_binning": False},
    guided=lambda scale: {"guidance_scale": scale},
    options={"height": 32, "width": 64, "max_sequence_length": 40},  # multiples of 32: the pipeline insists
    packed=False,
    round_trip=lambda vae, pixels: vae.decode(vae.encode(pixels).latent).sample,
    prepare=use_euler,
)
