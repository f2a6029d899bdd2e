"""Where people look at what steps did. ``optimizer.stats()`` of an ``AdamW(telemetry=10)`` is a flat dict of
floats; ``SummaryWriter.add_scalar``, ``wandb.log`` and ``mlflow.log_metrics`` take it as it is. Here is
the rest:

- ``start_http_server(optimizer, 9400)``: an endpoint for Prometheus; ``Collector`` for one's own registry
- ``JsonLines(path)``: a line for each dict; ``read_json_lines`` reads them back
- ``grouped(stats)``: names by which boards put what belongs together side by side
- ``monitoring.plots``: norms and ratios by layer; ``monitoring.lightning``: a callback for Lightning
"""

from adamw_triton.monitoring.json_lines import JsonLines, read_json_lines
from adamw_triton.monitoring.names import grouped
from adamw_triton.monitoring.prometheus import Collector, start_http_server

__all__ = ["Collector", "JsonLines", "grouped", "read_json_lines", "start_http_server"]
