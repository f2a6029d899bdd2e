"""``stats()`` goes into the tools that people look at as it is, and is read back from what they keep."""

from __future__ import annotations

import json
import math
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adamw_triton.monitoring import grouped
from adamw_triton.telemetry.observed import METRICS
from tests.monitoring.training import Run

Rows = dict[int, dict[str, float]]
"""By step."""


def by_tensorboard(rows: Rows, folder: Path) -> Rows:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step, row in rows.items():
            for key, value in row.items():
                writer.add_scalar(key, value, step)
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found: Rows = {step: {} for step in rows}
    for tag in read.Tags()["scalars"]:
        for event in read.Scalars(tag):
            found[event.step][tag] = event.value
    return found


def by_wandb(rows: Rows, folder: Path) -> Rows:
    """Offline: what it would send lies in a file."""
    wandb: Any = pytest.importorskip("wandb")
    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(project="test", mode="offline", dir=str(folder), settings=settings)
    for step, row in rows.items():
        run.log(row, step=step)
    run.finish()
    wandb.teardown()  # which waits until all is written
    (file,) = folder.rglob("*.wandb")
    found: Rows = {}
    from wandb.proto.wandb_internal_pb2 import Record

    for data in leveldb_records(file.read_bytes()):
        record: Any = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = {each.key or "/".join(each.nested_key): each.value_json for each in record.history.item}
            row = {key: json.loads(value) for key, value in items.items() if not key.startswith("_")}
            found[int(items["_step"])] = row
    return found


def leveldb_records(file: bytes) -> Iterator[bytes]:
    """Behind a header of 7 bytes, blocks of 32 KiB of records, which may go on in the next one."""
    place, record = 7, b""
    while place + 7 <= len(file):
        left = -place % 32768
        if 0 < left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", file, place)
        place += 7
        record += file[place : place + size]
        place += size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def by_mlflow(rows: Rows, folder: Path) -> Rows:
    """Its file store."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the file store's future
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow: Any = pytest.importorskip("mlflow")
        store = (folder / "runs").as_uri()
        mlflow.set_tracking_uri(store)
        with mlflow.start_run() as run:
            for step, row in rows.items():
                mlflow.log_metrics(row, step=step)
        client = mlflow.MlflowClient(store)
        found: Rows = {step: {} for step in rows}
        for key in client.get_run(run.info.run_id).data.metrics:
            for metric in client.get_metric_history(run.info.run_id, key):
                found[metric.step][key] = metric.value
        return found


@pytest.mark.parametrize(
    ("library", "exact"),
    [(by_tensorboard, False), (by_wandb, True), (by_mlflow, True)],
    ids=["tensorboard", "wandb", "mlflow"],
)
@pytest.mark.parametrize("per_param", [False, True])
def test_the_numbers_arrive(
    library: Callable[[Rows, Path], Rows], exact: bool, per_param: bool, tmp_path: Path
) -> None:
    run, rows = Run(nonfinite="skip"), {}
    for poison in (None, None, math.nan):
        every = run.step(poison)
        rows[run.steps] = run.optimizer.stats(per_param=per_param)
        assert rows[run.steps] == pytest.approx(every if per_param else short(every), nan_ok=True)
        # MLflow's file store cannot keep `grad_norm` beside `grad_norm/<name>`.
        if per_param and library is by_mlflow:
            rows[run.steps] = grouped(rows[run.steps])
    found = library(rows, tmp_path)
    assert found.keys() == rows.keys()
    assert all(len(row) == (4 * 13 + 2 * 4 + 18 if per_param else 18) for row in rows.values())
    for step, row in rows.items():
        assert found[step].keys() == row.keys()
        rel = 0 if exact else 1e-6  # of TensorBoard's fp32
        assert found[step] == pytest.approx(row, rel=rel, abs=0, nan_ok=True)
    assert any(map(math.isnan, found[3].values()))


def short(stats: dict[str, float]) -> dict[str, float]:
    found = {key: value for key, value in stats.items() if "/" not in key}
    assert set(found) == {"step", *METRICS}
    return found
