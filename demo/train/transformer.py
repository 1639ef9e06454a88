"""Train the SanaTransformer2DModel by flow matching, on precomputed latents and caption states.

As in Sana's training, ``x_t = (1 - t) x_0 + t noise``, the target is ``noise - x_0``, and ``t`` is logit-normal (Esser
et al. 2024, arXiv 2403.03206). One caption in ten is replaced by the empty one, for classifier-free guidance.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, Gemma2Model, PreTrainedTokenizerBase

from demo.concepts import BACKGROUNDS, WHITE, Pair, caption, load_split, paraphrases
from demo.train import art, autoencoder, text
from demo.train.loop import Job, load_averaged, train
from demo.train.muon import optimizers_for

NAME = "transformer"
_BATCH = 32
_EMPTY_CAPTIONS = 0.1
_PLAIN_SHARES = (0.70, 0.10, 0.06)  # plain, with an article, concept alone; the rest name a background
_GROUND_SHARE = (1 - sum(_PLAIN_SHARES)) / len(BACKGROUNDS)
CAPTION_SHARES = torch.tensor([*_PLAIN_SHARES, *[_GROUND_SHARE] * len(BACKGROUNDS)])  # as in ``captions_of``
_EVALUATED_DRAWS = 4
NOT_HIDDEN = {
    "patch_embed",
    "proj_out",
    "time_embed",
    "caption_proj",
}  # first and last layers, which AdamW trains


def build_model() -> SanaTransformer2DModel:
    """A model of six layers with six 32-wide heads, for 8x8 latents, with SANA-1.5's normalised queries and keys."""
    heads, head_dim = 6, 32
    return SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=6,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim,
        caption_channels=256,
        mlp_ratio=2.5,
        sample_size=8,
        patch_size=1,
        qk_norm="rms_norm_across_heads",
    )


def run(cache: Path, log: Path, steps: int, lr: float = 1.6e-3) -> nn.Module:
    """Train the transformer on the latents of the trained pairs, or resume its training."""
    split = load_split()
    vae = load_averaged(cache, autoencoder.NAME, autoencoder.build_model())
    student = load_averaged(cache, text.NAME, text.Student(text.build_model()))
    encoder = text.trained_encoder(student)
    known = Examples.of(split.trained, vae, encoder, cache)
    unseen = Examples.of(split.held_out, vae, encoder, cache)
    torch.manual_seed(0)
    model = build_model().train()

    def evaluate(averaged: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            losses = {"known_loss": known, "held_out_loss": unseen}
            return {name: _fixed_loss(averaged, examples) for name, examples in losses.items()}

    return train(
        Job(
            name=NAME,
            cache=cache,
            log=log,
            model=model,
            optimizers=optimizers_for(model, lr, 1e-2, plain=NOT_HIDDEN),
            loss=lambda generator: flow_loss(model, known, _BATCH, generator),
            evaluate=evaluate,
            steps=steps,
            decay=0.75,
            average=0.997,
        )
    )


class Examples:
    """The latents of pairs on every background, and the states of all their captions.

    Args:
        latents: (P, 1 + backgrounds, 32, 8, 8), white first.
        states: (P * V + 1, L, 256) caption states: V captions per pair in the order of ``captions_of``, and the empty
            caption last.
        mask: (P * V + 1, L), 1 where there is a token.
    """

    def __init__(self, latents: Tensor, states: Tensor, mask: Tensor) -> None:
        self.latents, self.states, self.mask = latents, states, mask

    @classmethod
    def of(cls, pairs: list[Pair], vae: nn.Module, encoder: Gemma2Model, cache: Path) -> Examples:
        """Encode the pictures and captions of the pairs."""
        captions = [c for p in pairs for c in captions_of(p)] + [""]
        states, mask = encode_captions(captions, AutoTokenizer.from_pretrained(cache / "tokenizer"), encoder)
        return cls(latents_of(pairs, vae, cache), states, mask)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, 32, 8, 8), states (B, L, 256) and mask (B, L) of random pairs and captions."""
        pair = torch.randint(len(self.latents), (size,), generator=generator)
        variant = torch.multinomial(CAPTION_SHARES, size, replacement=True, generator=generator)
        empty = torch.rand(size, generator=generator) < _EMPTY_CAPTIONS
        row = torch.where(empty, len(self.states) - 1, pair * len(CAPTION_SHARES) + variant)
        ground = (variant - len(_PLAIN_SHARES) + 1).clamp(min=0)
        return self.latents[pair, ground], self.states[row], self.mask[row]


def encode_captions(
    captions: list[str], tokenizer: PreTrainedTokenizerBase, encoder: Gemma2Model
) -> tuple[Tensor, Tensor]:
    """Caption states (N, L, 256), and the mask (N, L) that is 1 where there is a token."""
    ids = text.tokenize(tokenizer, captions)
    mask = (ids != 0).long()
    width = int(mask.sum(1).max())  # only padding is cut off, which is masked in any case
    ids, mask = ids[:, :width], mask[:, :width]
    with torch.inference_mode():
        parts = zip(ids.split(256), mask.split(256), strict=True)
        states = torch.cat([encoder(input_ids=i, attention_mask=m).last_hidden_state for i, m in parts])
    return states.clone(), mask


def captions_of(pair: Pair) -> list[str]:
    """The captions of the pair's picture on white, then one caption per coloured background."""
    return [caption(pair), *paraphrases(pair), *(caption(pair, b) for b in BACKGROUNDS)]


def latents_of(pairs: list[Pair], vae: nn.Module, cache: Path) -> Tensor:
    """Latents (P, 1 + backgrounds, 32, 8, 8) of the pairs' pictures, white first. They are kept in the cache."""
    digest = hashlib.sha256(repr(pairs).encode())
    for weight in vae.encoder.state_dict().values():
        digest.update(weight.numpy().tobytes())
    path = cache / f"latents-{digest.hexdigest()[:12]}.npy"
    if not path.is_file():
        art.save_array(path, _encode(pairs, vae, cache).numpy())
    return torch.from_numpy(np.load(path))


def _encode(pairs: list[Pair], vae: nn.Module, cache: Path) -> Tensor:
    rgba, pictures = art.load(cache)
    index = {Pair(p.concept, p.style): i for i, p in enumerate(pictures)}
    rows = rgba[[index[p] for p in pairs]]
    grounds = []
    for colour in tqdm((WHITE, *BACKGROUNDS.values()), desc="encode", unit="background"):
        x = autoencoder.to_tensor(art.on_background(rows, colour))
        with torch.no_grad():
            grounds.append(torch.cat([vae.encode(part).latent for part in x.split(16)]))
    return torch.stack(grounds, 1)


def flow_loss(model: nn.Module, examples: Examples, size: int, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted flow for a random batch at random times."""
    x_0, states, mask = examples.batch(size, generator)
    noise = torch.randn(x_0.shape, generator=generator)
    t = torch.sigmoid(torch.randn(size, generator=generator))
    t_b111 = t.view(-1, 1, 1, 1)
    x_t = (1 - t_b111) * x_0 + t_b111 * noise
    flow = model(x_t, states, t * 1000, encoder_attention_mask=mask).sample
    return (flow - (noise - x_0)).square().mean()


def _fixed_loss(model: nn.Module, examples: Examples) -> float:
    generator = torch.Generator().manual_seed(7)
    losses = [flow_loss(model, examples, 64, generator) for _ in range(_EVALUATED_DRAWS)]
    return float(torch.stack(losses).mean())
