"""Are prompts read rightly? Both sides share the checkpoint's tokenizer files, so these checks do not trust them.

A tokenizer without a vocabulary gives every prompt the same tokens. Both sides then draw the same picture, and all
other checks pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ditc.export.checkpoint.tokenizer import load_tokenizer
from ditc.export.checkpoint.tokenizer_fit import PROBES, unused_rows
from ditc.parity.context import Context
from ditc.parity.results import Result, judged
from ditc.parity.vocabulary_files import disagreements
from ditc.runtime.session import to_numpy
from ditc.runtime.spec import Precision
from ditc.runtime.text import TextSpec
from ditc.runtime.text_encoder import TextEncoder
from ditc.runtime.tolerances import Level, Metric, limit

STAGE = "tokenizer"
# The names that the checkpoints of CLIP, Gemma and T5 give the embedding of tokens.
EMBEDDINGS = ("token_embedding.weight", "embed_tokens.weight", "shared.weight")
CAUSE = "the tokenizer has no vocabulary, or belongs to another text encoder"


def check(context: Context) -> Iterator[Result]:
    """Check every tokenizer: against transformers, by itself, against the embedding and against its own files."""
    reference = context.reference.pipeline.conditioning.encoders
    for encoder, theirs in zip(context.candidate.pipeline.conditioning.encoders, reference, strict=True):
        # Ids without a row in the embedding are a finding here, not the end of the run.
        ours = replace(encoder, spec=replace(encoder.spec, vocab_size=None))
        yield _check_ids(context, ours, theirs.spec)
        yield _check_different(ours)
        yield _check_vocabulary(context, ours)
        yield from _check_files(context, ours, theirs.spec)


def check_states(context: Context) -> Iterator[Result]:
    """Check that the candidate's text encoders give two different texts different states, in every output."""
    for encoder in context.candidate.pipeline.conditioning.encoders:
        states = []
        for text in PROBES[:2]:
            batch = encoder.tokenizer.encode([text], encoder.spec)
            feeds = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            outputs = encoder.session.run({t.name: feeds[t.name] for t in encoder.session.spec.inputs})
            states.append({name: to_numpy(tensor) for name, tensor in outputs.items()})
        equal = [name for name, tensor in states[0].items() if np.array_equal(tensor, states[1][name])]
        problem = f"{', '.join(equal)} are the same for {PROBES[0]!r} and {PROBES[1]!r}" if equal else ""
        yield _judged(
            f"{encoder.spec.stage}: different texts, different states",
            len(equal),
            "each other",
            problem,
            level=Level.STAGE,
        )


def _check_ids(context: Context, ours: TextEncoder, spec: TextSpec) -> Result:
    """Compare ids and masks of every prompt and of the empty negative prompt with transformers' own.

    Args:
        spec: the reference's.
    """
    tokenizer = load_tokenizer(context.reference.checkpoint, _component(spec))
    prompts = dict.fromkeys([(case.prompt, False) for case in context.settings.cases] + [("", True)])
    wrong = []
    for text, negative in prompts:
        got = ours.tokenizer.encode([text], ours.spec, negative=negative)
        prepared = text.lower() if spec.lower else text
        wanted = tokenizer(
            (spec.negative_prefix if negative else spec.prefix)
            + (prepared.strip() if spec.strip else prepared),
            padding="max_length",
            padding_side=spec.padding_side.value,
            max_length=spec.negative_max_length if negative else spec.max_length,
            truncation=True,
        )
        same = got.input_ids[0].tolist() == wanted.input_ids
        same = same and got.attention_mask[0].tolist() == wanted.attention_mask
        if not same or ours.spec.select != spec.select:
            wrong.append(text)
    problem = f"the token ids differ for {wrong[0]!r:.60}" if wrong else ""
    against = f"transformers {type(tokenizer).__name__}"
    return _judged(f"{spec.stage}: {len(prompts)} texts", len(wrong), against, problem)


def _check_different(ours: TextEncoder) -> Result:
    ids = {text: tuple(ours.tokenizer.encode([text], ours.spec).input_ids[0].tolist()) for text in PROBES}
    alike = [text for i, text in enumerate(PROBES) if ids[text] in [ids[other] for other in PROBES[:i]]]
    problem = f"{alike[0]!r} has the same tokens as another text: {_short(ids[alike[0]])}" if alike else ""
    return _judged(f"{ours.spec.stage}: different texts, different tokens", len(alike), "each other", problem)


def _check_vocabulary(context: Context, ours: TextEncoder) -> Result:
    """Check that every token has a row in the encoder's embedding, and that no more rows are unused than padding."""
    component = context.reference.checkpoint.component(ours.spec.stage)
    name = next(name for name in component.tensors if name.endswith(EMBEDDINGS))
    rows = component.tensors.shape(name)[0]
    ids = ours.tokenizer.vocabulary.values()
    outside = sum(token >= rows for token in ids)
    lacking = max(0, rows - unused_rows(rows) - len(ids))
    problem = (
        f"the vocabulary has {len(ids)} tokens up to {max(ids, default=-1)}, the embedding has {rows} rows"
    )
    return _judged(
        f"{ours.spec.stage}: {len(ids)} tokens for {rows} rows",
        outside + lacking,
        name,
        problem if outside or lacking else "",
    )


def _check_files(context: Context, ours: TextEncoder, spec: TextSpec) -> Iterator[Result]:
    """Compare with the other vocabulary files in the folder, which transformers does not read beside tokenizer.json."""
    directory = context.reference.checkpoint.tokenizers[_component(spec)]
    for file, wrong in disagreements(directory, ours.tokenizer.vocabulary):
        problem = f"{wrong[0]} differs, and {len(wrong) - 1} more" if wrong else ""
        yield _judged(f"{spec.stage}: vocabulary", len(wrong), file, problem)


def _judged(what: str, count: int, against: str, problem: str, *, level: Level = Level.GRAPH) -> Result:
    return judged(
        level,
        STAGE,
        what,
        Metric.COUNT,
        float(count),
        limit(Level.GRAPH, Metric.COUNT, Precision.FP32),
        against=against,
        detail=problem,
        causes=(CAUSE,) if problem else (),
    )


def _component(spec: TextSpec) -> str:
    """The tokenizer's component, which is also the name of its folder."""
    return Path(spec.tokenizer).parent.name


def _short(ids: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, ids[:6]))}, ..."
