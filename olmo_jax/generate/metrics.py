"""What /metrics tells, in Prometheus' text form."""

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from olmo_jax.generate.driver import Driver

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one server."""

    def __init__(self, driver: Driver):
        disable_created_metrics()  # half of the lines, of no use here
        self._driver = driver
        self._registry = CollectorRegistry()
        self._registry.register(self)  # type: ignore[arg-type]  # it has `collect`
        self.requests = Counter(
            "olmo_jax_requests",
            "Answered HTTP requests for text.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self.first_token = self._histogram(
            "time_to_first_token", "From a request's arrival to its first tokens."
        )
        self.duration = self._histogram("request", "From a request's arrival to its end.")

    def _histogram(self, name: str, help: str) -> Histogram:
        name = f"olmo_jax_{name}_seconds"
        return Histogram(name, help, buckets=_SECONDS, registry=self._registry)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """The engine's own counts, when they are asked for."""
        engine = self._driver.engine
        gauges = {
            "running": ("Texts that are being made, each in a slot.", engine.running),
            "waiting": ("Texts that wait for a slot.", engine.waiting),
        }
        for name, (help, value) in gauges.items():
            yield GaugeMetricFamily(f"olmo_jax_{name}", help, value)
        counters = {
            "generated_tokens": ("Tokens generated.", engine.tokens),
            "prompt_tokens": ("Tokens of prompts read.", engine.prompt_tokens),
        }
        for name, (help, value) in counters.items():
            yield CounterMetricFamily(f"olmo_jax_{name}", help, value)

    def text(self) -> bytes:
        return generate_latest(self._registry)
