"""Prometheus metrics of the server. No label holds what a client sent: no prompt, key, id or path.

The names of models come from the operator, and all other labels from fixed sets, so the number of series is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from ditc.runtime.serving.model import Model
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Refusal
from ditc.runtime.serving.scheduling.admission import work_of
from ditc.runtime.serving.scheduling.job import Cancelled, End, Finished, Job
from ditc.runtime.serving.scheduling.observer import Observer
from ditc.runtime.serving.scheduling.policy import BatchKey

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds, from a step of a small model to a queue of minutes.
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_RATIOS = (0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2, 3, 5, 10)
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
# Codes of refusals that are counted by name. A new one is "other" until it is added here.
_REASONS = frozenset(
    {"overloaded", "too_much_work", "deadline_exceeded", "unavailable", "generation_failed", "bad_picture"}
)
# Latent sizes of which the best batch is shown, the first ones that were drawn.
_KEYS = 32


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="ditc", registry=self.registry)
        PlatformCollector(registry=self.registry)
        label, registry = ["model"], self.registry
        self.requests = Counter(
            "ditc_requests", "Accepted requests that have ended.", [*label, "outcome"], registry=registry
        )
        self.rejected = Counter(
            "ditc_rejected", "Valid requests that were not accepted.", [*label, "reason"], registry=registry
        )
        self.pictures = Counter("ditc_pictures", "Pictures that were drawn.", label, registry=registry)
        self.videos = Counter("ditc_videos", "Videos that were drawn.", label, registry=registry)
        self.frames = Counter("ditc_frames", "Frames of videos that were drawn.", label, registry=registry)
        self.pixel_steps = Counter(
            "ditc_pixel_steps",
            "Pixels times steps of the requests that were drawn.",
            label,
            registry=registry,
        )
        self.crashes = Counter("ditc_session_crashes", "Sessions that have failed.", label, registry=registry)
        self.steps = Histogram(
            "ditc_step_seconds", "Time of a run of the denoiser.", label, buckets=_SECONDS, registry=registry
        )
        self.sizes = Histogram(
            "ditc_batch_size", "Pictures per run of the denoiser.", label, buckets=_SIZES, registry=registry
        )
        self.stages = Histogram(
            "ditc_stage_seconds",
            "Time of encoding texts, or of decoding a picture or a latent frame of a video.",
            [*label, "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.waits = Histogram(
            "ditc_wait_seconds",
            "Time until a request's work began.",
            label,
            buckets=_SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "ditc_request_seconds",
            "Time from a request's acceptance to its pictures, before they are encoded.",
            label,
            buckets=_SECONDS,
            registry=registry,
        )
        self.predicted = Histogram(
            "ditc_actual_to_predicted_ratio",
            "Time that a request took, relative to what was predicted when it was accepted.",
            label,
            buckets=_RATIOS,
            registry=registry,
        )
        self.http = Counter(
            "ditc_http_responses", "Answers, by status.", ["method", "status"], registry=registry
        )

    def observer(self, model: str) -> Observer:
        """The observer of a model's scheduler."""
        return _ModelObserver(self, model)

    def watch(self, models: Models) -> None:
        """Also show the state of these models, which is read whenever metrics are."""
        self.registry.register(_ModelsCollector(models))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _ModelObserver(Observer):
    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._steps, self._sizes = metrics.steps.labels(model), metrics.sizes.labels(model)

    def rejected(self, refusal: Refusal) -> None:
        self._metrics.rejected.labels(self._model, _reason(refusal)).inc()

    def stage(self, name: str, seconds: float) -> None:
        self._metrics.stages.labels(self._model, name).observe(seconds)

    def stepped(self, key: BatchKey, size: int, seconds: float) -> None:
        self._steps.observe(seconds)
        self._sizes.observe(size)

    def ended(self, job: Job, end: End) -> None:
        metrics, model = self._metrics, job.variant or self._model
        metrics.requests.labels(model, _outcome(end)).inc()
        if job.began is not None:
            metrics.waits.labels(model).observe(max(0.0, job.began - job.arrived))
        if isinstance(end, Finished):
            total = end.seconds["total"]
            metrics.seconds.labels(model).observe(total)
            metrics.pictures.labels(model).inc(sum(image is not None for image in end.images))
            metrics.videos.labels(model).inc(sum(video is not None for video in end.videos))
            metrics.frames.labels(model).inc(sum(len(video) for video in end.videos if video is not None))
            metrics.pixel_steps.labels(model).inc(work_of(job.plan))
            if job.predicted > 0:
                metrics.predicted.labels(model).observe(total / job.predicted)

    def crashed(self) -> None:
        self._metrics.crashes.labels(self._model).inc()


class _ModelsCollector(Collector):
    """Reads queues, caches and versions at the moment of a scrape."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def describe(self) -> list[Metric]:
        return []  # nothing is collected at registration

    def collect(self) -> Iterator[Metric]:
        models = self._models
        admission = models.admission
        yield GaugeMetricFamily(
            "ditc_accepted_requests", "Requests that wait or are drawn.", value=admission.requests
        )
        yield GaugeMetricFamily(
            "ditc_accepted_pixel_steps", "Their pixels times steps.", value=admission.pixel_steps
        )
        ready = GaugeMetricFamily("ditc_model_ready", "Whether a model can draw now.", labels=["model"])
        for state in models.states():
            ready.add_metric([state.name], state.state == "ready")
        yield ready
        yield from _opened(models.all_opened())


def _opened(models: tuple[Model, ...]) -> Iterator[Metric]:
    label = ["model"]
    depth = GaugeMetricFamily("ditc_queue_depth", "Requests whose work has not begun.", labels=label)
    running = GaugeMetricFamily("ditc_running", "Requests whose work has begun.", labels=label)
    memory = GaugeMetricFamily("ditc_model_bytes", "Memory that an opened model takes.", labels=label)
    hits = CounterMetricFamily("ditc_text_cache_hits", "Texts that were encoded before.", labels=label)
    misses = CounterMetricFamily("ditc_text_cache_misses", "Texts that had to be encoded.", labels=label)
    best = GaugeMetricFamily(
        "ditc_best_batch_size",
        "Pictures of which a step is fastest per picture, from measured times, by size in latent cells.",
        labels=["model", "size", "rows"],
    )
    info = GaugeMetricFamily(
        "ditc_bundle_info",
        "The opened version of each bundle.",
        labels=["model", "digest", "backend", "precision", "certified"],
    )
    for model in models:
        waiting, begun = model.scheduler.counts
        depth.add_metric([model.name], waiting)
        running.add_metric([model.name], begun)
        memory.add_metric([model.name], model.size_bytes)
        cache, times = model.pipeline.conditioning.cache, model.scheduler.times
        hits.add_metric([model.name], cache.hits)
        misses.add_metric([model.name], cache.misses)
        for key in list(times.measured())[:_KEYS]:
            size = "x".join(str(cells) for cells in key.latents[1:])
            best.add_metric(
                [model.name, size, str(key.rows)], times.best_size(key, model.scheduler.max_batch)
            )
        pipeline = model.pipeline
        certified = "no" if pipeline.uncertified else "yes"
        info.add_metric([model.name, model.digest, pipeline.backend, pipeline.precision, certified], 1)
    yield from (depth, running, memory, hits, misses, best, info)


def _outcome(end: End) -> str:
    if isinstance(end, Finished):
        return "partly_failed" if end.failures else "finished"
    return "cancelled" if isinstance(end, Cancelled) else _reason(end.refusal)


def _reason(refusal: Refusal) -> str:
    return refusal.code if refusal.code in _REASONS else "other"
