"""Which pipeline a family draws: its class and its components. Any other pipeline draws other pictures, and is refused.

The weights do not tell pipelines apart: perturbed-attention guidance, a control network or an input picture use the
same transformer, text encoder and VAE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ditc.export.checkpoint.model_index import component_classes, pipeline_class
from ditc.export.checkpoint.open import INCOMPLETE, Checkpoint
from ditc.runtime.errors import CheckpointError

# The library of the classes that ditc itself defines, for families that upstream has no checkpoint layout for.
LIBRARIES = ("diffusers", "transformers", "ditc")


@dataclass(frozen=True, slots=True)
class OtherPipeline:
    """A pipeline with the same transformer that is not served.

    Attributes:
        why: what it does that ditc does not compute.
        hint: what to do instead; "" where the served pipeline can draw something with the weights.
    """

    why: str
    hint: str = ""


CONTROLNET = "controlnet"  # the name of its component
UNKNOWN = OtherPipeline("it is not known to draw the same pictures")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPipeline:
    """The pipeline that a family computes.

    Attributes:
        components: the classes that each component may have, as "library.class". () leaves it to those who read the
            component.
        also: classes with the same components whose pictures the family computes, too.
        optional: components that may be [null, null].
        others: the other pipelines with the same transformer, by class.
        unused: components that the class takes and that do nothing for a text prompt, with what they are for.
    """

    class_name: str
    components: Mapping[str, tuple[str, ...]]
    also: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    others: Mapping[str, OtherPipeline] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)


def choose_pipeline(checkpoint: Checkpoint, *served: ServedPipeline) -> ServedPipeline:
    """The one of the pipelines that model_index.json names, or else the first."""
    name = pipeline_class(checkpoint.path, checkpoint.model_index)
    return next((one for one in served if one.class_name == name), served[0])


def check_pipeline(checkpoint: Checkpoint, served: ServedPipeline) -> None:
    """Refuse a checkpoint that model_index.json does not describe as the served pipeline with all its components.

    Raises:
        CheckpointError: the pipeline is another one; or a component is missing, unknown, or of a class that the family
            does not compute.
    """
    _check_class(checkpoint, served)
    found = component_classes(checkpoint.path, checkpoint.model_index)
    for name in served.components:
        left_out = name in served.optional and checkpoint.model_index.get(name) == [None, None]
        if name not in found and not left_out:
            entry = (
                f"says {name} = {checkpoint.model_index[name]!r}"
                if name in checkpoint.model_index
                else "omits it"
            )
            raise CheckpointError(
                f"{checkpoint.path} has no {name}, which a {served.class_name} needs: model_index.json {entry}",
                hint=f"{INCOMPLETE}; {_what_may_be_left_out(served)}",
            )
    for name, opened_as in found.items():
        if name in served.unused:
            raise CheckpointError(
                f"{checkpoint.path} has a component {name} ({opened_as}), {served.unused[name]}, which is not served",
                hint=f'write "{name}": [null, null] in model_index.json: pictures of text prompts alone stay the same',
            )
        if name not in served.components:
            raise CheckpointError(
                f"{checkpoint.path} has a component {name} ({opened_as}), which is not served: "
                f"a {served.class_name} has {', '.join(served.components)}",
                hint=f"a model that needs its {name} cannot be built; if it does not need it, remove the entry from "
                "model_index.json",
            )
        allowed = served.components[name]
        if name == CONTROLNET and checkpoint.controlnet is not None and str(opened_as) not in allowed:
            raise CheckpointError(
                f"{checkpoint.controlnet} is a {opened_as.name}, but {checkpoint.path} takes "
                f"a {' or '.join(one.rpartition('.')[2] for one in allowed)}",
                hint="give a ControlNet that was trained for this checkpoint",
            )
        if (str(opened_as) not in allowed) if allowed else (opened_as.library not in LIBRARIES):
            raise CheckpointError(
                f"{checkpoint.path}: model_index.json opens {name} as a {opened_as}, but only "
                f"{' or '.join(allowed or LIBRARIES)} is served",
                hint=f"use the {name} that the checkpoint was published with",
            )


def _check_class(checkpoint: Checkpoint, served: ServedPipeline) -> None:
    name = pipeline_class(checkpoint.path, checkpoint.model_index)
    if name in (served.class_name, *served.also):
        return
    if checkpoint.controlnet is not None:
        raise CheckpointError(
            f"{checkpoint.path} takes no ControlNet, so {checkpoint.controlnet} cannot be joined with it: "
            f"there is no {name}, or ditc does not compute it",
            hint="leave --controlnet out, or give the checkpoint that the ControlNet was trained for",
        )
    other = served.others.get(name, UNKNOWN)
    raise CheckpointError(
        f"{checkpoint.path} is a {name}, but with this transformer only {served.class_name} is served: {other.why}",
        hint=other.hint
        or f"if you want the pictures of a {served.class_name} with these weights, which are others: "
        f"{served.class_name}.from_pipe(pipe).save_pretrained(...)",
    )


def _what_may_be_left_out(served: ServedPipeline) -> str:
    if not served.optional:
        return "nothing can be left out"
    return f"only {' and '.join(sorted(served.optional))} can be left out, as [null, null]"
