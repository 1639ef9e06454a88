"""Metrics: what is counted, and that no label can hold what a client sent."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ditc.runtime.load_options import LoadOptions
from ditc.runtime.request import Request
from ditc.runtime.serving.metrics import Metrics
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Refusal
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.scheduling.job import Cancelled, Event, Finished, Refused
from ditc.runtime.serving.settings import Bounds

REQUEST = Request(
    prompt="a secret cat", num_inference_steps=3, height=64, width=64, seed=3, output_type="pil"
)


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Iterator[tuple[Models, Metrics]]:
    metrics = Metrics()
    models = Models(
        {"tiny": tiny_bundle, "other": tiny_bundle},
        admission=Admission(Bounds(requests=2)),
        load=LoadOptions(threads=1),
        observe=metrics.observer,
        warm_up_seconds=0.0,
    )
    metrics.watch(models)
    models.open("tiny")
    yield models, metrics
    models.close()


def values(metrics: Metrics) -> dict[str, float]:
    """All samples by name and labels, as Prometheus reads them."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        sample.name
        + "".join(f",{name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def draw(models: Models, request: Request = REQUEST, *, cancel: bool = False) -> Any:
    ended, ends = threading.Event(), list[Event]()

    def listen(event: Event) -> None:
        if isinstance(event, Finished | Refused | Cancelled):
            ends.append(event)
            ended.set()

    with models.using() as model:
        job = model.submit(request, listen, id="secret-id")
        if cancel:
            model.scheduler.cancel(job)
        assert ended.wait(60)
    return ends[0]


def test_a_drawn_request_is_counted_with_its_times(served: tuple[Models, Metrics]) -> None:
    models, metrics = served
    before = values(metrics)
    assert isinstance(draw(models), Finished)
    now = values(metrics)

    def more(name: str) -> float:
        return now[name] - before.get(name, 0.0)

    assert more("ditc_requests_total,model=tiny,outcome=finished") == 1
    assert more("ditc_pictures_total,model=tiny") == 1
    assert more("ditc_pixel_steps_total,model=tiny") == 64 * 64 * 3
    assert more("ditc_step_seconds_count,model=tiny") == more("ditc_batch_size_sum,model=tiny") == 3
    assert more("ditc_stage_seconds_count,model=tiny,stage=text") == 1
    assert more("ditc_stage_seconds_count,model=tiny,stage=vae_decoder") == 1
    assert more("ditc_wait_seconds_count,model=tiny") == more("ditc_request_seconds_count,model=tiny") == 1
    assert more("ditc_actual_to_predicted_ratio_count,model=tiny") == 1
    assert more("ditc_text_cache_misses_total,model=tiny") >= 1
    assert now["ditc_queue_depth,model=tiny"] == now["ditc_running,model=tiny"] == 0
    assert now["ditc_model_ready,model=tiny"] == 1 and now["ditc_model_ready,model=other"] == 0
    assert any(name.startswith("ditc_best_batch_size,model=tiny,rows=2,size=") for name in now)
    with models.using() as model:
        facts = f"backend=onnxruntime,certified=no,digest={model.digest},model=tiny,precision=fp32"
    assert now[f"ditc_bundle_info,{facts}"] == 1


def test_other_ends_are_counted_by_their_reason(served: tuple[Models, Metrics]) -> None:
    models, metrics = served
    draw(models, cancel=True)
    assert values(metrics)["ditc_requests_total,model=tiny,outcome=cancelled"] == 1
    with models.using() as model:
        model.scheduler.admission.bounds = Bounds(requests=2, pixel_steps=1)
        with pytest.raises(Refusal):
            draw(models)
        model.scheduler.admission.bounds = Bounds(requests=2)
    assert values(metrics)["ditc_rejected_total,model=tiny,reason=too_much_work"] == 1
    observer = metrics.observer("tiny")
    observer.rejected(Refusal("no", code="a code\nthat nobody knows"))
    observer.crashed()
    now = values(metrics)
    assert now["ditc_rejected_total,model=tiny,reason=other"] == 1
    assert now["ditc_session_crashes_total,model=tiny"] == 1


def test_no_metric_holds_what_a_client_sent_and_all_begin_with_the_prefix(
    served: tuple[Models, Metrics],
) -> None:
    models, metrics = served
    draw(models)
    text = metrics.text().decode()
    assert "secret" not in text
    names = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert all(name.startswith(("ditc_", "python_info")) for name in names), names
    labels = {label for sample in text.splitlines() for label in re.findall(r'(\w+)="', sample)}
    allowed = {"model", "outcome", "reason", "stage", "le", "size", "rows", "method", "status"}
    assert labels <= allowed | {"digest", "backend", "precision", "certified"} | {
        *("implementation", "major", "minor", "patchlevel", "version")
    }
