"""Trains a small style LoRA for the bundled pipeline, so that docs/recipes.md has one to distil: "everything in the dark".

`python docs/examples/style_lora.py outputs/dark` writes outputs/dark/lora/pytorch_lora_weights.safetensors, and
outputs/dark/pipeline, a pipeline folder with the LoRA fused into it, which stands for a fine-tune of one's own. It takes about
a minute on a CPU. Nothing here is special to this project: it is flow matching on images and captions with peft and diffusers.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from cdm_lightning.config import asset_path
from cdm_lightning.metrics.references import render_prompts

STEPS, BATCH, TOKENS, DARKNESS = 300, 16, 16, 0.6


def main(folder: Path, steps: int = STEPS) -> None:
    """Train the LoRA and write both folders."""
    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline.from_pretrained(asset_path("tiny_sd3"))
    captions = Path(asset_path("prompts/shapes_train.txt")).read_text(encoding="utf-8").splitlines()
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    pipe.transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=layers))
    trained = [weight for weight in pipe.transformer.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)
    for step in range(steps):
        texts = [captions[(step * BATCH + i) % len(captions)] for i in range(BATCH)]
        with torch.no_grad():
            images = DARKNESS * render_prompts(texts, range(step * BATCH, (step + 1) * BATCH), seed=0)
            vae = pipe.vae.config
            x0 = (pipe.vae.encode(2 * images - 1).latent_dist.mode() - vae.shift_factor) * vae.scaling_factor
            encode = {"do_classifier_free_guidance": False, "max_sequence_length": TOKENS}
            embeddings, _, pooled, _ = pipe.encode_prompt(texts, texts, texts, **encode)
        noise, sigma = torch.randn_like(x0), torch.rand(BATCH)
        s = sigma[:, None, None, None]
        velocity = pipe.transformer((1 - s) * x0 + s * noise, embeddings, pooled, 1000 * sigma, return_dict=False)[0]
        loss = F.mse_loss(velocity, noise - x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    pipe.save_lora_weights(folder / "lora", transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    pipe.save_pretrained(folder / "pipeline")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
