"""`Pipeline.with_sessions`: the same pipeline with other sessions for some stages, and who closes them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from ditc.runtime import Pipeline
from ditc.runtime.bundle.manifest import Tiling
from ditc.runtime.errors import UsageError
from ditc.runtime.session import Session, Tensor
from ditc.runtime.spec import DENOISER, VAE_ENCODER


class Watched:
    """Wraps a session, counts its runs and records whether it was closed."""

    def __init__(self, session: Session) -> None:
        self.session, self.spec = session, session.spec
        self.runs, self.closed = 0, False

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.runs += 1
        return self.session.run(feeds)

    def close(self) -> None:
        self.closed = True


def test_with_sessions_uses_them_and_leaves_the_first_pipeline_as_it_is(pipeline: Pipeline) -> None:
    settings = {"seed": 1, "num_inference_steps": 2, "output_type": "np"}
    expected, before = pipeline("cat", **settings).images, dict(pipeline.sessions)
    denoiser = Watched(pipeline.sessions[DENOISER])
    other = pipeline.with_sessions({DENOISER: denoiser}, chosen="watched")
    np.testing.assert_array_equal(other("cat", **settings).images, expected)
    assert denoiser.runs == 2 and other.chosen == "watched"
    assert other.uncertified == "its sessions are not the bundle's"
    assert pipeline.sessions == before
    assert other.conditioning is pipeline.conditioning, (
        "no text stage was replaced, so the cached rows stay valid"
    )


def test_with_sessions_replaces_text_stages_where_texts_are_encoded(pipeline: Pipeline) -> None:
    pipeline("cat", seed=1, num_inference_steps=1)  # so that the first pipeline has the row in its cache
    watched = {name: Watched(session) for name, session in pipeline.sessions.items()}
    pipeline.with_sessions(watched)("cat", seed=1, num_inference_steps=1)
    assert {name for name, session in watched.items() if not session.runs} == {VAE_ENCODER}


def test_with_sessions_keeps_what_was_set_on_the_pipeline(pipeline: Pipeline) -> None:
    first = pipeline.with_sessions({})
    first.tiling, first.steps_per_launch = Tiling(tile=48, stride=32), 3
    second = first.with_sessions({DENOISER: Watched(first.sessions[DENOISER])})
    assert (second.tiling, second.steps_per_launch) == (first.tiling, 3)


@pytest.mark.parametrize("owned", [False, True])
def test_closing_closes_other_sessions_only_if_they_are_owned(pipeline: Pipeline, owned: bool) -> None:
    kept = {name: Watched(session) for name, session in pipeline.sessions.items()}
    given = Watched(pipeline.sessions[DENOISER])
    first = Pipeline(pipeline.manifest, kept, pipeline.conditioning)
    with first.with_sessions({DENOISER: given}, owned=owned):
        pass
    assert given.closed is owned
    assert not any(session.closed for session in kept.values())
    first.close()
    assert all(session.closed for session in kept.values())


def test_with_sessions_refuses_a_stage_that_is_not_there(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="no stage denoizer") as caught:
        pipeline.with_sessions({"denoizer": pipeline.sessions[DENOISER]})
    assert DENOISER in str(caught.value.hint)
