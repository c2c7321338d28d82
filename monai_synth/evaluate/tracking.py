# SPDX-License-Identifier: Apache-2.0
"""Results of evaluations in MLflow, where the trainings are: values with n and interval as metrics, reports as files.

Nothing is written to MLflow unless a tracking address is given or set in ``MLFLOW_TRACKING_URI``: the report on disk
is the result, this is its copy.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from monai_synth.errors import UserError

VARIABLE = "MLFLOW_TRACKING_URI"
_MAX_TEXT = 6000  # characters that MLflow takes for a parameter
_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # else minutes for no server


def tracking_uri(given: str | None = None) -> str | None:
    """The address to log to: the one given, or that of ``MLFLOW_TRACKING_URI``; None logs nothing.

    Args:
        given: ``http://...``, ``sqlite:///file.db``, or a folder for one, in which ``mlruns.db`` is written.

    Raises:
        UserError: an address of a kind that MLflow does not know.
    """
    uri = given or os.environ.get(VARIABLE)
    if not uri:
        return None
    kind = urlsplit(uri).scheme
    if not kind:
        return f"sqlite:///{Path(uri).expanduser().absolute() / 'mlruns.db'}"
    if kind not in ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks"):
        raise UserError(
            f"the tracking address {uri!r} starts with {kind!r}; allowed are http, https, sqlite or a folder"
        )
    return uri


def log_report(
    uri: str | None,
    *,
    experiment: str,
    run: str,
    values: Mapping[str, Any],
    params: Mapping[str, Any],
    files: Sequence[str | Path] = (),
) -> str | None:
    """Write one finished run of an evaluation.

    Args:
        uri: of `tracking_uri`; None does nothing.
        experiment: what kind of evaluation it is, e.g. ``fidelity``.
        run: what was evaluated; the time is appended.
        values: numbers, or results ``{"value", "n", "ci", ...}``, nested by name as they like. A result becomes the
            metrics ``name``, ``name.low``, ``name.high`` and ``name.n`` (with two sets ``name.n_a`` and ``name.n_b``);
            what was not measured is left out.
        params: settings, nested as they like.
        files: the report and its JSON.

    Returns:
        The run's id, or None.

    Raises:
        UserError: MLflow cannot be reached or written; the files themselves are untouched.
    """
    if uri is None:
        return None
    for name, value in _RETRIES.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # else it tells of each step by which it makes a database
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    created = int(time.time() * 1000)
    metrics = [Metric(name, value, created, 0) for name, value in flat_values(values)]
    texts = [Param(_name(name), str(value)[:_MAX_TEXT]) for name, value in _flat(params) if value is not None]
    try:
        _make_folder(uri)
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else client.create_experiment(experiment, _artifacts(uri))
        started = client.create_run(number, run_name=f"{run}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        run_id = started.info.run_id
        try:
            for start in range(0, max(len(metrics), len(texts)), 100):  # as many as one request may hold
                client.log_batch(run_id, metrics[start : start + 100], texts[start : start + 100])
            for path in files:
                client.log_artifact(run_id, str(path))
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id, "FINISHED")
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        msg = f"MLflow at {uri} cannot be written ({reason}); the report itself is complete. Start the server, or give "
        raise UserError(msg + "another --mlflow address") from error
    return str(run_id)


def flat_values(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Metrics of MLflow of nested results, see `log_report`."""
    for key, value in values.items():
        name = f"{prefix}{_name(key)}"
        if isinstance(value, Mapping) and "value" in value and "n" in value:
            if value["value"] is None:
                continue
            yield name, float(value["value"])
            if value.get("ci"):
                yield f"{name}.low", float(value["ci"][0])
                yield f"{name}.high", float(value["ci"][1])
            n = value["n"]
            for end, number in zip((".n_a", ".n_b"), n, strict=False) if isinstance(n, Sequence) else [(".n", n)]:
                yield name + end, float(number)
        elif isinstance(value, Mapping):
            yield from flat_values(value, f"{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, float(value)


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _name(text: Any) -> str:
    """As MLflow takes it."""
    return re.sub(r"[^A-Za-z0-9_\-. /]", "_", str(text))


def _local_database(uri: str) -> Path | None:
    return Path(uri[len("sqlite:///") :]) if uri.startswith("sqlite:///") else None


def _make_folder(uri: str) -> None:
    database = _local_database(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)


def _artifacts(uri: str) -> str | None:
    """Files of a local database lie beside it, not in whatever folder the command was started in."""
    database = _local_database(uri)
    return None if database is None else (database.parent.absolute() / "mlartifacts").as_uri()
