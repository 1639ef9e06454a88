"""Texts to the rows that condition the denoiser: tokenize, encode, merge. Each text is encoded once, then cached."""

# R rows (one per text here), S text tokens, D channels

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ditc.runtime.cache import RowCache
from ditc.runtime.errors import NumericsError, UsageError
from ditc.runtime.padding import Padding, lengthened, text_length
from ditc.runtime.request import Request
from ditc.runtime.session import Array, Session, numpy_dtype, to_numpy
from ditc.runtime.spec import CONDITIONER, CONTROL_CONDITIONER, StageSpec, TensorSpec, spec_named
from ditc.runtime.step_contract import TEXT_LENGTH
from ditc.runtime.text import TokenBatch, without_padding
from ditc.runtime.text_encoder import TextEncoder, encoders_for

TEXT_EMBEDS = "text_embeds"
TEXT_MASK = "text_mask"
POOLED = "pooled_projections"
# The conditioner's tensor for each argument of a request.
ARGUMENTS = {
    "prompt_embeds": TEXT_EMBEDS,
    "prompt_attention_mask": TEXT_MASK,
    "pooled_prompt_embeds": POOLED,
}


class Conditioning:
    """Rows of conditioning for texts, or for embeddings that the caller has computed.

    Texts are encoded one at a time, so that a row does not depend on the other texts of its batch and a cached row is
    the same as a new one. The key of a cached row is made of the artifacts and the token ids.

    Args:
        key: identifies the artifacts that compute the rows.
        control_conditioner: computes what a ControlNet needs of the text, from the conditioner's inputs; None if there
            is no ControlNet, or if it takes the conditioner's outputs.
        skips_padding: whether padding is left out where it has no effect. Rows then differ in length, which costs time
            on devices that capture graphs or compile for sizes.
    """

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        conditioner: Session,
        *,
        key: str,
        cache: RowCache | None = None,
        control_conditioner: Session | None = None,
        skips_padding: bool = False,
    ) -> None:
        self.encoders = tuple(encoders)
        self.conditioner = conditioner
        self.control_conditioner = control_conditioner
        self.cache = cache if cache is not None else RowCache()
        self._key = key
        self._skips_padding = skips_padding

    def with_sessions(self, sessions: Mapping[str, Session]) -> Conditioning:
        """A copy with other sessions, by stage. The cache is shared only if no session that computes rows changes."""
        if sessions.keys().isdisjoint(self.stages):
            return self
        return Conditioning(
            [replace(e, session=sessions.get(e.spec.stage, e.session)) for e in self.encoders],
            sessions.get(CONDITIONER, self.conditioner),
            key=self._key,
            cache=RowCache(self.cache.max_bytes),
            control_conditioner=sessions.get(CONTROL_CONDITIONER, self.control_conditioner),
            skips_padding=self._skips_padding,
        )

    @property
    def padding(self) -> dict[str, Padding]:
        """How rows of different lengths are filled up, by the name of their tensors; {} where they must not be."""
        sessions = filter(None, (self.conditioner, self.control_conditioner))
        outputs = tuple(tensor for session in sessions for tensor in session.spec.outputs)
        return {
            name: Padding(spec_named(outputs, name).shape.index(TEXT_LENGTH), value)
            for encoder in self.encoders
            for name, value in encoder.spec.padding or ()
        }

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that compute the rows."""
        control = (CONTROL_CONDITIONER,) if self.control_conditioner is not None else ()
        return (CONDITIONER, *control, *(encoder.spec.stage for encoder in self.encoders))

    def with_weights(self, sessions: Mapping[str, Session], key: str) -> Conditioning:
        """A copy whose sessions have other weights. It shares the cache, in which its rows have another key.

        Args:
            key: identifies what was done to the weights of the artifacts; "" for nothing.
        """
        return Conditioning(
            [replace(e, session=sessions.get(e.spec.stage, e.session)) for e in self.encoders],
            sessions.get(CONDITIONER, self.conditioner),
            key=f"{self._key};{key}" if key else self._key,
            cache=self.cache,
            control_conditioner=sessions.get(CONTROL_CONDITIONER, self.control_conditioner),
            skips_padding=self._skips_padding,
        )

    def rows(self, request: Request, *, negative: bool) -> list[Mapping[str, Array] | NumericsError]:
        """One row per prompt, from its texts or from its embeddings, or the error if an encoder returned NaN or Inf.

        Raises:
            UsageError: the embeddings do not fit this bundle.
        """
        given = request.embeds(negative=negative)
        if not given:
            encoders = encoders_for(request, self.encoders, self.conditioner.spec)
            texts = request.texts(len(encoders), negative=negative)
            return [
                _row_or_error(partial(self._of_texts, encoders, each, negative=negative)) for each in texts
            ]
        return [
            _row_or_error(partial(self.of_embeds, {name: array[index] for name, array in given.items()}))
            for index in range(request.num_prompts)
        ]

    def check_texts(self, request: Request, *, negative: bool) -> None:
        """Tokenize all texts, so that one that cannot be encoded is found before the first picture is drawn.

        Args:
            negative: whether negative texts are used.

        Raises:
            UsageError: a text is not valid Unicode, or has a token that its text encoder does not know.
        """
        encoders = encoders_for(request, self.encoders, self.conditioner.spec)
        for sign in (False, True) if negative else (False,):
            if request.embeds(negative=sign):
                continue
            for texts in dict.fromkeys(request.texts(len(encoders), negative=sign)):
                for text, encoder in zip(texts, encoders, strict=True):
                    encoder.tokenizer.encode([text], encoder.spec, negative=sign)

    def check_request(self, request: Request) -> None:
        """Refuse texts for encoders that the bundle does not have, lengths of texts that it does not take, and an
        incomplete set of embeddings.

        Raises:
            UsageError: the message names the arguments.
        """
        for negative in (False, True):
            further = request.further_texts(negative=negative)
            for name in list(further)[len(self.encoders) - 1 :]:
                if further[name]:
                    raise UsageError(
                        f"{name} is given, but this bundle has only {len(self.encoders)} text encoder(s)",
                        hint=f"leave {name} out",
                    )
            if given := request.embeds(negative=negative):
                self._entry({ARGUMENTS[name] for name in given}, "negative_" if negative else "")
        encoders_for(request, self.encoders, self.conditioner.spec)

    def _of_texts(
        self, encoders: Sequence[TextEncoder], texts: Sequence[str], *, negative: bool
    ) -> Mapping[str, Array]:
        tokens = [
            encoder.tokenizer.encode([text], encoder.spec, negative=negative)
            for text, encoder in zip(texts, encoders, strict=True)
        ]
        if self._skips_padding:
            needed = [
                without_padding(encoder.spec, batch, negative=negative)
                for encoder, batch in zip(encoders, tokens, strict=True)
            ]
            tokens = [batch for _, batch in needed]
            encoders = [
                replace(encoder, spec=spec) for encoder, (spec, _) in zip(encoders, needed, strict=True)
            ]
        key = tuple(
            (encoder.spec, batch.input_ids.tobytes()) for encoder, batch in zip(encoders, tokens, strict=True)
        )
        return self.cache.get((self._key, negative, key), lambda: self._encode(encoders, tokens, negative))

    def of_embeds(self, given: Mapping[str, Array]) -> Mapping[str, Array]:
        """The row for one text that the caller has encoded.

        Args:
            given: embeddings by name of the request's argument. They are inputs of the conditioner. If it takes
                other inputs (the states of several encoders), they are its outputs, which make the finished row.

        Raises:
            UsageError: this bundle does not take embeddings of this size.
        """
        named = {ARGUMENTS[name]: array for name, array in given.items()}
        tensors = self._entry(named.keys())
        feeds = {tensor.name: self._fitted(tensor, named[tensor.name]) for tensor in tensors}
        return feeds if tensors is self.conditioner.spec.outputs else self._merge(feeds)

    def _entry(self, names: Collection[str], sign: str = "") -> tuple[TensorSpec, ...]:
        """The conditioner's inputs, or its outputs, whichever have exactly these names."""
        spec = self.conditioner.spec
        for tensors in (spec.inputs, spec.outputs):
            if {tensor.name for tensor in tensors} == set(names):
                return tensors
        wanted = {t.name for t in spec.inputs}
        if not wanted <= set(ARGUMENTS.values()):
            wanted = {t.name for t in spec.outputs}
        arguments = " and ".join(f"{sign}{name}" for name, tensor in ARGUMENTS.items() if tensor in wanted)
        raise UsageError(f"{arguments} go together", hint="pass all of them and no others, or none of them")

    def _fitted(self, tensor: TensorSpec, array: Array) -> Array:
        """The tensor of one text, with a row axis and in the element type that the spec names."""
        array = np.asarray(array, numpy_dtype(tensor.dtype))
        array = array[None] if array.ndim < len(tensor.shape) else array
        argument = next(name for name, known in ARGUMENTS.items() if known == tensor.name)
        if array.ndim != len(tensor.shape):
            raise UsageError(
                f"one prompt's {argument} is {array.shape}, but this model takes {tensor.shape}",
                hint="pass one row per prompt",
            )
        for size, wanted in zip(array.shape[1:], tensor.shape[1:], strict=True):
            if isinstance(wanted, int) and size != wanted:
                raise UsageError(
                    f"{argument} have {size} channels, but this model takes {wanted}",
                    hint="pass the outputs of this model's text encoders",
                )
            bounds = self.conditioner.spec.profile.get(str(wanted))
            if bounds is not None and size not in bounds:
                raise UsageError(
                    f"{argument} have {size} tokens, but this bundle takes {bounds.min} to {bounds.max}",
                    hint="shorten the text before you encode it; where the model sets no limit of its own, build with "
                    "a larger max_sequence_length in ditc.json"
                    if size > bounds.max
                    else f"pass the states of at least {bounds.min} token(s)",
                )
        return array

    def _encode(
        self, encoders: Sequence[TextEncoder], tokens: Sequence[TokenBatch], negative: bool
    ) -> Mapping[str, Array]:
        named: dict[str, Array] = {}
        for encoder, batch in zip(encoders, tokens, strict=True):
            outputs = encoder.session.run(_token_feeds(encoder.session.spec, batch))
            host = {name: to_numpy(tensor) for name, tensor in outputs.items()}
            for name, tensor in host.items():
                if not np.isfinite(tensor).all():
                    raise NumericsError(
                        f"{encoder.spec.stage}: {name} has NaN or Inf for this text",
                        hint="text encoders of this kind overflow in fp16: build this stage in bf16 or fp32",
                    )
            selected, mask = encoder.tokenizer.select(
                host, batch.attention_mask, encoder.spec, negative=negative
            )
            named |= selected
            if encoder.spec.mask is not None:
                named[encoder.spec.mask] = mask
        return self._merge(named)

    def _merge(self, named: Mapping[str, Array]) -> Mapping[str, Array]:
        row: dict[str, Array] = {}
        for session in filter(None, (self.conditioner, self.control_conditioner)):
            outputs = session.run({tensor.name: named[tensor.name] for tensor in session.spec.inputs})
            for name, output in outputs.items():
                row[name] = to_numpy(output)
                if row[name].dtype.kind == "f" and not np.isfinite(row[name]).all():
                    raise NumericsError(
                        f"{session.spec.name}: {name} has NaN or Inf", hint="rebuild in bf16 or fp32"
                    )
        return row


def _row_or_error(row: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array] | NumericsError:
    try:
        return row()
    except NumericsError as error:  # of one text, which must not end the pictures of the others
        return error


def stack_texts(rows: Sequence[Mapping[str, Array]], padding: Mapping[str, Padding]) -> dict[str, Array]:
    """The rows of several texts as one read-only array per name. Without rows, there are no names.

    Shorter ones are filled up to the length of the longest.

    Raises:
        UsageError: prompts and negative prompts have different lengths.
    """
    if not rows:
        return {}
    if padding:
        longest = max(text_length(row, padding) for row in rows)
        rows = [lengthened(row, padding, longest) for row in rows]
    for name in rows[0]:
        shapes = {row[name].shape[1:] for row in rows}
        if len(shapes) > 1:
            sizes = next(sorted(set(axis)) for axis in zip(*shapes, strict=True) if len(set(axis)) > 1)
            raise UsageError(
                f"prompts and negative prompts have different lengths: {' and '.join(map(str, sizes))} tokens",
                hint="pass prompt_embeds and negative_prompt_embeds with the same number of tokens; "
                "max_sequence_length sets the number of tokens of a text",
            )
    stacked = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    for array in stacked.values():
        array.flags.writeable = False  # a read-only array is sent to a device once, not in every step
    return stacked


def _token_feeds(spec: StageSpec, batch: TokenBatch) -> dict[str, Array]:
    feeds = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return {tensor.name: feeds[tensor.name] for tensor in spec.inputs}
