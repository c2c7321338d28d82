# SPDX-License-Identifier: Apache-2.0
"""A MONAI Label server on loopback answers for the bundles; needs MONAI Label's own environment (`.ci/label`)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundle_runs import BUNDLES
from label_toy import AFFINE, as_nifti, mask, semantic, write_models
from PIL import Image

from monai_synth.errors import UserError
from monai_synth.label.folder import write_label_app

pytest.importorskip("monailabel", reason="MONAI Label has an environment of its own; run .ci/label")
requests = pytest.importorskip("requests")


ADDED = {"add_to_datastore": True}


class Server:
    """The server's address and its datastore's folder."""

    def __init__(self, url: str, studies: Path, app: Path, models: dict[str, str]) -> None:
        self.url, self.studies, self.app, self.models = url, studies, app, models

    def get(self, path: str, **options: Any) -> Any:
        return requests.get(self.url + path, **options)

    def infer(self, model: str, image: str = "map1", output: str = "image", files: Any = None, **params: Any) -> Any:
        return self.ask(model, image, params, output=output, files=files)

    def ask(self, model: str, image: str, params: dict[str, Any], output: str = "image", files: Any = None) -> Any:
        sent = {"params": (None, json.dumps(params)), **(files or {})}
        query = {"image": image, "output": output} if image else {"output": output}
        return requests.post(f"{self.url}/infer/{model}", params=query, files=sent)

    def post(self, path: str, content: dict[str, Any]) -> Any:
        return requests.post(self.url + path, json=content)

    def put(self, place: str, name: str, content: bytes, **query: Any) -> Any:
        """Send an image or a label to the datastore."""
        field = "file" if place == "image" else "label"
        address = f"{self.url}/datastore/{place}"
        return requests.put(address, params=query, files={field: (name, content)}, data={"params": "{}"})

    def cases(self) -> dict[str, Any]:
        return self.get("/datastore/?output=all").json()["objects"]

    def wait(self, path: str) -> dict[str, Any]:
        """The status of a background task when it is over."""
        while (status := self.get(path).json())["status"] in ("SUBMITTED", "RUNNING"):
            time.sleep(0.5)
        return status


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Iterator[Server]:
    """The command of the README on loopback, with untrained models and two kinds of sources."""
    root = tmp_path_factory.mktemp("label")
    models = write_models(root / "toy", tiny_dataset)
    app, studies = write_label_app(str(root / "app")), root / "studies"
    studies.mkdir()
    as_nifti(semantic(tiny_dataset), studies / "map1.nii.gz")
    as_nifti(semantic(tiny_dataset)[:, ::-1], studies / "map2.nii.gz")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "MONAI_LABEL_SESSION_PATH": str(root / "sessions"), "HOME": str(root), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(BUNDLES.parent), os.environ.get("PYTHONPATH", "")]),
        "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
    }  # fmt: skip
    command = [
        sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies),
        "--host", "127.0.0.1", "--port", str(port),
        "--conf", "bundles", ",".join(f"{k}={v}" for k, v in models.items()), "--conf", "bundles_dir", str(BUNDLES),
    ]  # fmt: skip
    with open(root / "server.log", "w") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True)
        made = Server(f"http://127.0.0.1:{port}", studies, app, models)
        try:
            while process.poll() is None:
                try:
                    if made.get("/info/").status_code == 200:
                        break
                except requests.ConnectionError:
                    time.sleep(0.5)
            assert process.poll() is None, (root / "server.log").read_text()[-3000:]
            yield made
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def read(answer: Any, path: Path) -> nib.Nifti1Image:
    assert answer.status_code == 200, answer.text
    path.write_bytes(answer.content)
    return nib.load(path)


def test_info_lists_the_bundles_their_trainers_and_the_queue_for_review(server: Server) -> None:
    info = server.get("/info/").json()
    assert set(info["models"]) == set(info["trainers"]) == {"lsdm", "spade_gan", "jdm"}
    assert {model["type"] for model in info["models"].values()} == {"others"}
    assert {model["version"] for model in info["models"].values()} == {"0.1.0"}
    assert "synthetic" in info["strategies"]
    assert {"lung", "nucleus"} <= set(info["labels"])


def test_the_same_seed_gives_the_same_bytes_on_the_grid_of_the_map(server: Server, tmp_path: Path) -> None:
    first = server.infer("lsdm", seed=7, num_steps=3)
    image = read(first, tmp_path / "a.nii.gz")
    assert (image.shape, image.get_data_dtype()) == ((64, 64, 1), np.int16)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    assert server.infer("lsdm", seed=7, num_steps=3).content == first.content
    assert server.infer("lsdm", seed=8, num_steps=3).content != first.content


def test_features_that_are_asked_for_change_the_image(server: Server) -> None:
    answers = [
        server.infer("lsdm", seed=7, num_steps=3, guidance_scale=20, nodule={"spiculation": value}).content
        for value in (1, 5)
    ]
    assert answers[0] != answers[1]


def test_a_map_that_is_sent_gives_the_image_of_the_same_map_in_the_datastore(
    server: Server, tiny_dataset: Path, tmp_path: Path
) -> None:
    sent = as_nifti(semantic(tiny_dataset), tmp_path / "mine.nii.gz").read_bytes()
    answer = server.infer("lsdm", "", files={"file": ("../../mine.nii.gz", sent)}, seed=7, num_steps=3)
    assert answer.content == server.infer("lsdm", seed=7, num_steps=3).content


def test_a_drawn_mask_and_a_whole_pair_come_from_jdm(server: Server, tmp_path: Path) -> None:
    Image.fromarray(mask(0) * 255).save(tmp_path / "m.png")
    drawn = {"file": ("m.png", (tmp_path / "m.png").read_bytes())}
    made = server.infer("jdm", "", files=drawn, seed=1, num_steps=3)
    assert made.status_code == 200, made.text
    (tmp_path / "i.png").write_bytes(made.content)
    assert np.asarray(Image.open(tmp_path / "i.png")).shape == (32, 32)
    pair = {"condition": "none", "seed": 3, "num_steps": 3}
    answers = [server.infer("jdm", "none", **pair, **{"return": kind}) for kind in ("image", "label", "image")]
    assert [a.status_code for a in answers] == [200] * 3, answers[0].text
    assert answers[0].content == answers[2].content != answers[1].content


def test_a_case_that_is_added_carries_its_label_and_where_it_comes_from(server: Server) -> None:
    params = {"seed": 21, "num_steps": 3, "add_to_datastore": True, "case_id": "../Mr. X/../../x"}
    answer = server.infer("lsdm", output="json", **params).json()
    case = answer["case_id"]
    assert "/" not in case
    assert "." not in case
    objects = server.cases()
    info = objects[case]["image"]["info"]
    assert info["synthetic"]["seed"] == 21
    assert info["synthetic"]["checkpoints"].keys() >= {"model.pt", "autoencoder.pt"}
    assert objects[case]["labels"]["original"]["info"]["params"]["label_names"]["lung"] == 4
    image, label = (
        nib.load(server.studies / f"{case}.nii.gz"),
        nib.load(server.studies / "labels" / "original" / f"{case}.nii.gz"),
    )
    np.testing.assert_array_equal(image.affine, label.affine)
    assert image.shape == label.shape
    np.testing.assert_array_equal(np.asarray(label.dataobj), nib.load(server.studies / "map1.nii.gz").dataobj)
    assert server.infer("lsdm", **params).status_code == 400  # it is there already
    assert [p for p in server.studies.parent.rglob("*") if p.name == "x"] == []


def test_cases_for_review_come_one_by_one_and_those_reviewed_are_listed_for_training(server: Server) -> None:
    server.infer("lsdm", output="json", seed=31, num_steps=3, add_to_datastore=True, case_id="review_me")
    offered = server.post("/activelearning/synthetic", {}).json()["id"]
    waiting = {k for k, v in server.cases().items()
               if "synthetic" in v["image"]["info"] and "final" not in v["labels"]}  # fmt: skip
    assert offered in waiting
    label = (server.studies / "labels" / "original" / f"{offered}.nii.gz").read_bytes()
    answer = server.put("label", f"{offered}.nii.gz", label, image=offered, tag="final")
    assert answer.status_code == 200, answer.text
    assert server.post("/activelearning/synthetic", {}).json().get("id") != offered
    listed = server.get("/datastore/?output=train").json()
    assert any(offered in pair["image"] and "/final/" in pair["label"] for pair in listed)


def test_long_sampling_is_sent_to_the_batch_endpoint_which_makes_cases_of_every_map(server: Server) -> None:
    refused = server.infer("lsdm", num_steps=51)
    assert refused.status_code == 400
    assert "/batch/infer/lsdm" in refused.json()["detail"]
    assert server.infer("lsdm", num_steps=51, in_batch=True).status_code == 400
    content = {"num_steps": 3, "num_samples": 2, "seed": 5, "device": "cpu"}
    assert server.post("/batch/infer/lsdm?images=all", content).status_code == 200
    added = 0
    while server.get("/batch/infer/").json()["status"] in ("SUBMITTED", "RUNNING"):  # requests go on meanwhile
        answer = server.infer("jdm", "none", "json", condition="none", seed=100 + added, num_steps=1, **ADDED)
        assert answer.status_code == 200, answer.text
        added += 1
        time.sleep(0.5)
    assert server.wait("/batch/infer/")["status"] == "DONE"
    objects = server.cases()
    made = {f"synthetic_lsdm_{m}_s{s:06d}" for m in ("map1", "map2") for s in (5, 6)}
    made |= {f"synthetic_jdm_s{100 + number:06d}" for number in range(added)}
    assert added
    assert [case for case in made if "synthetic" not in objects[case]["image"]["info"]] == []
    assert [case for case in made if "original" not in objects[case]["labels"]] == []
    alone = server.infer("lsdm", "map2", seed=6, num_steps=3).content
    assert (server.studies / "synthetic_lsdm_map2_s000006.nii.gz").read_bytes() == alone


@pytest.mark.parametrize(
    ("image", "params", "told"),
    [
        ("map1", {"malignency": 1}, "malignency"),
        ("map1", {"sampler": "$__import__('os').getcwd()"}, "not allowed"),
        ("map1", {"nodule": {"spiculation": 9}}, "1 to 5"),
        ("map1", {"seed": -1}, "integers from 0"),
        ("map1", {"source_tag": "../final"}, "source_tag"),
        ("map1", {"source_tag": "final"}, "no label"),
        ("nobody", {}, "nobody"),
        ("/etc/passwd", {}, "passwd"),
        ("map1", {"image": "/etc/passwd"}, "passwd"),
        ("map1", {"label": "/etc/passwd"}, "passwd"),
    ],
)
def test_a_request_that_cannot_be_met_is_told_why_in_one_message(
    server: Server, image: str, params: dict[str, Any], told: str
) -> None:
    answer = server.ask("lsdm", image, params)
    assert answer.status_code == 400, answer.text
    assert told in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]


def test_parameters_that_are_no_json_are_told(server: Server) -> None:
    answer = requests.post(f"{server.url}/infer/lsdm", params={"image": "map1"}, data={"params": "{seed: 1}"})
    assert answer.status_code == 400, answer.text
    assert "no JSON" in answer.json()["detail"]


@pytest.mark.parametrize(("name", "content"), [("a.nii.gz", b"no NIfTI"), ("a.png", b"no PNG"), ("a.exe", b"MZ")])
def test_files_that_are_no_maps_are_refused(server: Server, name: str, content: bytes) -> None:
    answer = server.infer("lsdm", "", files={"file": (name, content)})
    assert answer.status_code == 400
    assert "map" in answer.json()["detail"]


def test_an_app_for_viewers_answers_with_the_label_and_adds_the_case(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monailabel.config import settings

    from monai_synth.label.app import SynthApp

    monkeypatch.setattr(settings, "MONAI_LABEL_DATASTORE_AUTO_RELOAD", False)
    monkeypatch.setattr(settings, "MONAI_LABEL_SESSION_PATH", str(tmp_path / "sessions"))
    conf = {"bundles": f"lsdm={server.models['lsdm']}", "bundles_dir": str(BUNDLES), "viewer": "true"}
    (tmp_path / "studies").mkdir()
    shutil.copyfile(server.studies / "map1.nii.gz", tmp_path / "studies" / "map1.nii.gz")
    app = SynthApp(str(tmp_path / "app"), str(tmp_path / "studies"), conf)
    model = app.info()["models"]["lsdm"]
    assert (model["type"], model["labels"]["lung"]) == ("segmentation", 4)
    made = app.infer({"model": "lsdm", "image": "map1", "num_steps": 2})
    given, answered = (np.asarray(nib.load(p).dataobj) for p in (server.studies / "map1.nii.gz", made["file"]))
    np.testing.assert_array_equal(answered, given)
    Path(made["file"]).unlink()
    assert (tmp_path / "studies" / f"{made['params']['case_id']}.nii.gz").is_file()
    with pytest.raises(UserError, match="max_steps"):
        SynthApp(str(tmp_path / "app"), str(tmp_path / "studies"), {**conf, "max_steps": "-1"})


@pytest.mark.parametrize(
    ("place", "name", "query", "told"),
    [
        ("image", "a.exe", {"image": "bad"}, ".exe"),
        ("image", "a.nii.gz", {"image": "bad"}, "cannot be read"),
        ("image", "a.png", {"image": "../../bad"}, "case id"),
        ("image", "..png", {}, "case id"),
        ("label", "a.png", {"image": "map1", "tag": "../../bad"}, "tag"),
        ("label", "a.nii.gz", {"image": "map1", "tag": "bad"}, "cannot be read"),
        ("label", "a.png", {"image": "nobody", "tag": "final"}, "no such case"),
    ],
)
def test_the_datastore_takes_nothing_that_is_no_image_and_nothing_to_another_place(
    server: Server, tmp_path: Path, place: str, name: str, query: dict[str, str], told: str
) -> None:
    Image.fromarray(mask(0)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes() if name.endswith(".png") else b"MZ"
    before = server.cases()
    answer = server.put(place, name, content, **query)
    assert answer.status_code in (400, 404), answer.text
    assert told in answer.json()["detail"]
    assert server.cases() == before
    assert [p for p in server.studies.parent.rglob("*") if p.name.startswith("bad")] == []


def test_of_two_requests_at_once_for_one_case_id_one_adds_it_and_the_other_is_told(server: Server) -> None:
    def ask(seed: int) -> Any:
        return server.infer("jdm", "none", "json", condition="none", seed=seed, num_steps=2, case_id="one", **ADDED)

    with ThreadPoolExecutor(2) as pool:
        answers = sorted(pool.map(ask, (1, 2)), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [200, 400]
    assert "already" in answers[1].json()["detail"]
    assert server.cases()["one"]["image"]["info"]["synthetic"]["seed"] == answers[0].json()["synthetic"]["seed"]


def test_files_of_another_bundle_are_refused_also_where_they_come_while_the_server_runs(server: Server) -> None:
    model, other = (Path(server.models[name]) / "model.pt" for name in ("spade_gan", "jdm"))
    kept = model.read_bytes()
    try:
        model.write_bytes(other.read_bytes())
        answer = server.infer("spade_gan")
    finally:
        model.write_bytes(kept)
    assert answer.status_code == 400
    assert "trained by the bundle 'jdm'" in answer.json()["detail"]


def test_an_unknown_model_is_told(server: Server) -> None:
    answer = server.infer("nothing")
    assert answer.status_code == 400
    assert "lsdm" in answer.json()["detail"]


def test_training_takes_annotated_pairs_can_be_stopped_and_its_model_is_served_from_then_on(
    server: Server, tmp_path: Path
) -> None:
    def sample() -> bytes:
        return server.infer("jdm", "none", condition="none", seed=3, num_steps=3).content

    names = [f"cell{number}" for number in range(4)]
    for number, name in enumerate(names):
        grey = np.where(mask(number) > 0, 200, 60).astype(np.uint8)
        for place, array, query in (("image", grey, {}), ("label", mask(number), {"tag": "final"})):
            Image.fromarray(array).save(tmp_path / "a.png")
            sent = server.put(place, "a.png", (tmp_path / "a.png").read_bytes(), image=name, **query)
            assert sent.status_code == 200, sent.text
    listed = [pair for pair in server.get("/datastore/?output=train").json() if "cell" in pair["image"]]
    assert len(listed) == 4
    before, latest = sample(), BUNDLES / "jdm" / "models" / "latest.json"
    remembered = latest.read_bytes() if latest.is_file() else None
    # CT slices that were reviewed have a final label too, and are none of this model's
    settings = {
        "images": names, "image_size": [32, 32], "iterations_per_epoch": 1, "batch_size": 2, "val_interval": 1,
        "save_interval": 1, "device": "cpu",
    }  # fmt: skip
    for bad, told in (({"dataset_dir": "/etc"}, "dataset_dir"), ({"batch_size": 0}, "batch_size")):
        refused = server.post("/train/jdm?run_sync=true", {**settings, **bad})
        assert refused.status_code == 400, refused.text
        assert told in refused.json()["detail"]

    assert server.post("/train/jdm", {**settings, "num_iterations": 100_000}).status_code == 200
    while not list((server.app / "model" / "jdm").glob("*/last_model.pt")):  # it has begun to step
        assert server.get("/train/").json()["status"] in ("SUBMITTED", "RUNNING"), server.get("/train/").json()
        time.sleep(0.5)
    assert server.post("/train/jdm", settings).status_code == 429  # one at a time
    assert requests.delete(f"{server.url}/train/").status_code == 200
    assert server.wait("/train/")["status"] == "STOPPED"
    assert sample() == before

    done = server.post("/train/jdm?run_sync=true", {**settings, "num_iterations": 2})
    assert done.status_code == 200, done.text
    assert (server.app / "model" / "jdm" / done.json()["run"] / "model.pt").is_file()
    assert sample() != before
    assert (latest.read_bytes() if latest.is_file() else None) == remembered
