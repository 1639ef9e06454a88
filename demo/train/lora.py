"""Train a small style LoRA on the demo transformer (Hu et al. 2021, arXiv 2106.09685): every picture in sepia.

The pictures to learn from are the demo model's own, decoded, redrawn by an algorithm and encoded again, so no art is
needed. The file has the names of diffusers' and PEFT's LoRA files. It states no alpha, which means that alpha is equal
to the rank: the product of the two matrices is added as it is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma2Model

from demo.concepts import CHECKPOINT_DIR, LORA_FILE, load_split
from demo.errors import DemoError, explained
from demo.train.guided import guided_pictures
from demo.train.loop import Job, load_averaged, train
from demo.train.transformer import encode_captions
from ditc.runtime.atomic import atomic_path

NAME = "lora"
RANK = 4
MAX_BYTES = 300_000
_PARTS = 10
_BATCH = 16
_EVALUATED = 64
_EMPTY_CAPTIONS = 0.1  # the style must not depend on the caption, so that guidance does not change it
_ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "proj_out")
_BROWN = (64, 32, 12)
_CREAM = (250, 230, 194)


def run(cache: Path, log: Path, steps: int, lr: float = 3e-3, checkpoint: Path = CHECKPOINT_DIR) -> nn.Module:
    """Redraw pictures of the checkpoint and train the LoRA on them, or resume its training."""
    drawn = guided_pictures(load_split().trained, _PARTS, checkpoint, cache)
    vae = AutoencoderDC.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
    latents = redrawn(drawn.latents, vae)
    encoder = Gemma2Model.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32).eval()
    empty, empty_mask = encode_captions(
        [""] * 2, AutoTokenizer.from_pretrained(checkpoint / "tokenizer"), encoder
    )
    torch.manual_seed(0)
    model = adapted(checkpoint).train()

    def flow_loss(network: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        x_0, states, mask = latents[rows], drawn.states[rows].clone(), drawn.mask[rows].clone()
        without = torch.rand(len(rows), generator=generator) < _EMPTY_CAPTIONS
        width = empty.shape[1]
        states[without, :width] = empty[0]
        mask[without] = 0
        mask[without, :width] = empty_mask[0]
        noise = torch.randn(x_0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(len(rows), generator=generator))
        t_b111 = t.view(-1, 1, 1, 1)
        x_t = (1 - t_b111) * x_0 + t_b111 * noise
        flow = network(x_t, states, t * 1000, encoder_attention_mask=mask, return_dict=False)[0]
        return (flow - (noise - x_0)).square().mean()

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(_EVALUATED, len(latents), (_BATCH,), generator=generator)
        return flow_loss(model, rows, generator)

    def evaluate(averaged: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            value = flow_loss(averaged, torch.arange(_EVALUATED), torch.Generator().manual_seed(7))
        return {"unseen_loss": float(value)}

    weights = [p for p in model.parameters() if p.requires_grad]
    return train(
        Job(
            name=NAME,
            cache=cache,
            log=log,
            model=model,
            optimizers=[torch.optim.AdamW(weights, lr, weight_decay=0.0)],
            loss=loss,
            evaluate=evaluate,
            steps=steps,
            warmup=20,
            decay=0.75,
            average=0.98,
            evaluate_every=100,
        )
    )


def write(cache: Path, destination: Path = LORA_FILE, checkpoint: Path = CHECKPOINT_DIR) -> None:
    """Write the trained LoRA of the cache as one safetensors file.

    Raises:
        DemoError: the LoRA is not trained yet, the disk is full, or the file is over the size limit.
    """
    weights = peft_weights(load_averaged(cache, NAME, adapted(checkpoint)))
    with explained(), atomic_path(destination) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
        if (size := partial.stat().st_size) > MAX_BYTES:
            raise DemoError(
                f"{destination} would have {size} bytes, more than {MAX_BYTES}.", "lower the rank."
            )


class LowRank(nn.Module):
    """A linear layer with weights that are not trained, plus ``up(down(x))``, whose weights are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The output (..., out_features) for x (..., in_features)."""
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def adapted(checkpoint: Path) -> SanaTransformer2DModel:
    """The checkpoint's transformer with untrained low-rank layers; all other weights are fixed."""
    model = SanaTransformer2DModel.from_pretrained(checkpoint / "transformer", torch_dtype=torch.float32)
    model.requires_grad_(False)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in linear:
        if name.endswith(_ADAPTED):
            model.set_submodule(name, LowRank(model.get_submodule(name)))
    return model


def peft_weights(model: nn.Module) -> dict[str, Tensor]:
    """The low-rank weights in fp16, under the names that diffusers saves them with."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            weights[f"transformer.{name}.lora_A.weight"] = module.down.weight
            weights[f"transformer.{name}.lora_B.weight"] = module.up.weight
    return {name: weight.detach().to(torch.float16) for name, weight in weights.items()}


def redrawn(latents: Tensor, vae: nn.Module) -> Tensor:
    """Latents (N, 32, 8, 8) of the pictures that the given latents stand for, in sepia."""
    with torch.inference_mode():
        parts = [vae.encode(sepia(vae.decode(part).sample)).latent for part in latents.split(16)]
    return torch.cat(parts).clone()


def sepia(rgb: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as old photographs: their luma (BT.601), from dark brown to cream."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    luma = ((rgb.clamp(-1, 1) + 1) / 2 * weights).sum(1, keepdim=True)
    dark, light = (torch.tensor(c).view(1, 3, 1, 1) / 127.5 - 1 for c in (_BROWN, _CREAM))
    return dark + (light - dark) * luma
