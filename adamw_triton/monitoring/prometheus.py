"""An endpoint for Prometheus, by prometheus_client: what it asks for is read when it asks."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIServer

import torch

from adamw_triton import installing
from adamw_triton._version import __version__
from adamw_triton.monitoring.names import (
    COUNTER,
    INFO,
    LEARNING_RATE,
    MEMORY,
    METRICS,
    OF_PARAMETERS,
    SKIPPED,
    SPILLS,
    TOTALS,
    Metric,
)

if TYPE_CHECKING:
    from adamw_triton.optimizer import AdamW

MOST_PARAMETERS = 500
MOST_GROUPS = 100
NAMED = 3
"""Of what is left out, in the log."""

Sample = tuple[Metric, tuple[str, ...], float]

_log = logging.getLogger("adamw_triton")


def start_http_server(
    optimizer: AdamW,
    port: int,
    addr: str = "127.0.0.1",
    *,
    model: torch.nn.Module | None = None,
    per_param: bool = False,
    most_parameters: int = MOST_PARAMETERS,
) -> tuple[WSGIServer, Thread]:
    """Serve ``http://addr:port/metrics`` from a thread of its own, for one optimizer.

    Training waits for no scrape. A scrape gets the newest statistics that have arrived; only how many steps
    were skipped, with ``nonfinite="skip"``, it waits for. The optimizer is not kept alive; without it, the
    endpoint is empty. Capture CUDA graphs with ``capture_error_mode="thread_local"`` beside it.

    Args:
        optimizer: with ``telemetry``; without, there are only memory, learning rates, skipped steps, spills.
        port: 0 takes any that is free: ``server.server_port``.
        addr: to listen at; ``"0.0.0.0"`` lets other machines scrape. There is no password.
        model: for the names of parameters, if the optimizer was not given named ones.
        per_param: also every statistic of every parameter, 13 to 17 series each.
        most_parameters: have these; the log names others, once.

    Returns:
        The server and its thread, as prometheus_client's function of this name does. ``server.shutdown()``
        ends it.

    Raises:
        ImportError: prometheus_client is missing.
        OSError: the port is taken.
    """
    client = _client()
    registry = client.CollectorRegistry()
    registry.register(Collector(optimizer, model=model, per_param=per_param, most_parameters=most_parameters))
    server: WSGIServer
    thread: Thread
    server, thread = client.start_http_server(port, addr, registry)
    return server, thread


class Collector:
    """For a registry of prometheus_client, where a process has one already:
    ``prometheus_client.REGISTRY.register(Collector(optimizer))``. A registry takes one optimizer. The
    arguments are those of ``start_http_server``.
    """

    def __init__(
        self,
        optimizer: AdamW,
        *,
        model: torch.nn.Module | None = None,
        per_param: bool = False,
        most_parameters: int = MOST_PARAMETERS,
    ) -> None:
        self._client = _client()
        self._optimizer = weakref.ref(optimizer)
        self._model: Callable[[], torch.nn.Module | None] = _nothing if model is None else weakref.ref(model)
        self._per_param = per_param
        self._parameters = _Bounded("parameters", most_parameters, "most_parameters")
        self._groups = _Bounded("parameter groups", MOST_GROUPS)
        if not optimizer.telemetry:
            _log.warning(
                "monitoring: telemetry is off, so there are no statistics of steps: make the optimizer with "
                "telemetry=True, or telemetry=10 for every tenth step"
            )

    def describe(self) -> Iterator[Any]:
        """Names, so that a registry refuses a second one."""
        return map(self._family, METRICS)

    def collect(self) -> Iterator[Any]:
        """Called at each scrape, by another thread than that which trains."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        families: dict[Metric, Any] = {}
        for metric, labels, value in (*self._statistics(optimizer), *self._others(optimizer)):
            if metric not in families:
                families[metric] = self._family(metric)
            families[metric].add_metric(labels, value)
        yield from families.values()

    def _family(self, metric: Metric) -> Any:
        core = self._client.core
        kind = core.CounterMetricFamily if metric.kind == COUNTER else core.GaugeMetricFamily
        return kind(metric.name, metric.help, labels=metric.labels, unit=metric.unit)

    def _statistics(self, optimizer: AdamW) -> Iterator[Sample]:
        if not optimizer.telemetry:
            return
        stats = optimizer.stats(per_param=self._per_param, wait=False, model=self._model())
        split = {key: key.partition("/") for key in stats}
        shown = self._parameters.of(name for _, slash, name in split.values() if slash)
        for key, (metric, slash, name) in split.items():
            if not slash:
                yield TOTALS[metric], (), stats[key]
            elif name in shown:
                yield OF_PARAMETERS[metric], (name,), stats[key]

    def _others(self, optimizer: AdamW) -> Iterator[Sample]:
        rates = {str(index): group["lr"] for index, group in enumerate(optimizer.param_groups)}
        shown = self._groups.of(rates)
        for group, rate in rates.items():
            if group in shown and not (isinstance(rate, torch.Tensor) and rate.device.type != "cpu"):
                yield LEARNING_RATE, (group,), float(rate)
        memory = optimizer.memory()
        for place in ("gpu", "host", "staging"):
            yield MEMORY, (place,), memory[place]
        yield SKIPPED, (), optimizer.skipped_steps
        yield SPILLS, (), optimizer.spills
        plan = optimizer.plan
        chosen = plan.chosen.label if plan is not None and plan.chosen is not None else ""
        yield INFO, (optimizer.variant, chosen, __version__), 1


class _Bounded:
    """Who came first, of those that would have series."""

    def __init__(self, what: str, most: int, argument: str = "") -> None:
        if most < 1:
            raise ValueError(f"{argument}={most!r}: allowed are numbers from 1 on")
        self._what, self._most, self._argument = what, most, argument
        self._shown: set[str] = set()
        self._told = False

    def of(self, names: Iterable[str]) -> set[str]:
        left_out = []
        for name in dict.fromkeys(names):
            if name not in self._shown:
                if len(self._shown) < self._most:
                    self._shown.add(name)
                else:
                    left_out.append(name)
        if left_out and not self._told:
            self._told = True
            _log.warning(
                "monitoring: %d %s have series%s, and %d have none: %s%s",
                *(self._most, self._what, f" ({self._argument}={self._most})" if self._argument else ""),
                *(len(left_out), ", ".join(left_out[:NAMED]), ", ..." if len(left_out) > NAMED else ""),
            )
        return self._shown


def _nothing() -> None:
    return None


def _client() -> Any:
    try:
        import prometheus_client.core
    except ImportError as error:
        raise ImportError(installing.missing("prometheus_client", "monitoring")) from error
    return prometheus_client
