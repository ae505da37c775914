"""MLflow: an SQLite database and artifacts in the run's folder, unless MLFLOW_TRACKING_URI says otherwise."""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grr.training.loggers.logger import PROJECT, Line, last_steps, run_facts, run_files
from grr.training.loggers.run_ids import read_run_id, write_run_id

DEFAULTS = {  # of the environment: a server that does not answer holds a step up for seconds, not for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
MOST_PARAMETERS = 100  # that MLflow takes at a time


class MLflow:
    """A run of MLflow. client: an MlflowClient. held: the last step of each split."""

    def __init__(self, client: Any, run_id: str, held: Mapping[str, int]) -> None:
        self.held, self._client, self._run_id = held, client, run_id

    def write(self, line: Line) -> None:
        from mlflow.entities import Metric

        if line.pictures:  # before the numbers, which show at a resume that the line is there
            place = f"{line.split}/step_{line.step:08d}"
            for i, (image, _) in enumerate(line.pictures):
                array = image.permute(1, 2, 0).cpu().numpy()
                self._client.log_image(self._run_id, array, artifact_file=f"{place}/{i:02d}.png")
            captions = {f"{i:02d}.png": text for i, (_, text) in enumerate(line.pictures)}
            self._client.log_dict(self._run_id, captions, f"{place}/captions.json")
        now = int(time.time() * 1000)
        metrics = [Metric(f"{line.split}/{key}", value, now, line.step) for key, value in line.numbers.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")


def open_mlflow(folder: Path, step: int) -> MLflow:
    """Begin or continue the run. Its parameters are those of its first start; config.yaml is of the last."""
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)
    from mlflow.entities import Param
    from mlflow.tracking import MlflowClient

    place = folder.resolve()
    given = os.environ.get("MLFLOW_TRACKING_URI")
    client = MlflowClient(tracking_uri=given or f"sqlite:///{place / 'mlflow.db'}")
    run_id = read_run_id(folder, "mlflow")
    if run_id is None:
        experiment = _experiment(client, artifacts=None if given else (place / "mlflow").as_uri())
        run_id = client.create_run(experiment, run_name=place.name).info.run_id
        write_run_id(folder, "mlflow", run_id)
    client.update_run(run_id, status="RUNNING")
    data = client.get_run(run_id).data
    parameters = [Param(key, value) for key, value in _flat(run_facts(folder)) if key not in data.params]
    for i in range(0, len(parameters), MOST_PARAMETERS):
        client.log_batch(run_id, params=parameters[i : i + MOST_PARAMETERS])
    for file in run_files(folder):
        client.log_artifact(run_id, str(file))
    first_keys = {key.partition("/")[0]: key for key in data.metrics}  # one of each split
    histories = [client.get_metric_history(run_id, key) for key in first_keys.values()]
    return MLflow(client, run_id, last_steps([(m.key, m.step) for history in histories for m in history]))


def _experiment(client: Any, *, artifacts: str | None) -> str:
    """The id of the experiment, which is made if there is none of its name."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name, artifact_location=artifacts)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested sections as text, by section.key."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
