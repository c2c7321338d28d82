# SPDX-License-Identifier: Apache-2.0
"""Results in MLflow: what becomes a metric, where files go, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from monai_synth.errors import UserError
from monai_synth.evaluate.tracking import flat_values, log_report, tracking_uri

VALUES = {
    "synthetic": {
        "fid": {"value": 12.5, "n": [30, 20], "ci": [10.0, 15.0]},
        "ssim": {"value": 0.4, "n": 60, "ci": None},
        "kid": {"value": None, "n": [0, 0], "ci": None},
    },
    "rate ≥ 1": 0.25,
    "title": "text",
}


def test_a_result_becomes_its_value_interval_and_n_and_what_was_not_measured_nothing() -> None:
    assert dict(flat_values(VALUES)) == {
        "synthetic.fid": 12.5, "synthetic.fid.low": 10.0, "synthetic.fid.high": 15.0,
        "synthetic.fid.n_a": 30.0, "synthetic.fid.n_b": 20.0, "synthetic.ssim": 0.4, "synthetic.ssim.n": 60.0,
        "rate _ 1": 0.25,
    }  # fmt: skip


def test_without_an_address_nothing_is_logged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri() is None
    assert log_report(None, experiment="e", run="r", values={}, params={}) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert tracking_uri() == "http://localhost:5000"
    assert tracking_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlruns.db"
    with pytest.raises(UserError, match="allowed are http, https"):
        tracking_uri("ftp://somewhere")


def test_a_finished_run_holds_metrics_parameters_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    report = tmp_path / "report.html"
    report.write_text("<p>page</p>")
    uri = tracking_uri(str(tmp_path / "records"))
    run_id = log_report(
        uri, experiment="fidelity", run="a", values=VALUES, params={"seed": 0, "a": {"b": "c"}}, files=[report]
    )
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == dict(flat_values(VALUES))
    assert run.data.params == {"seed": "0", "a.b": "c"}
    assert [f.path for f in client.list_artifacts(run_id)] == ["report.html"]
    assert list(elsewhere.iterdir()) == []


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="the report itself is complete"):
        log_report("http://127.0.0.1:9", experiment="e", run="r", values=VALUES, params={})
