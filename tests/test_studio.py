# SPDX-License-Identifier: Apache-2.0
"""The studio's logic, without a page: maps, uploads, sampling as the bundles do it, cancelling, downloads, reading."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import threading
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import studio_toy
from bundle_runs import run
from PIL import Image

from monai_synth.data.semantic import LABELS
from monai_synth.errors import UserError
from monai_synth.studio import maps, uploads
from monai_synth.studio.jobs import Request
from monai_synth.studio.places import find_places
from monai_synth.studio.reading import Case, Reading, score
from monai_synth.studio.runs import CancelledError, write_zip
from monai_synth.studio.session import Session, Studio


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("studio")
    studio_toy.write_models(folder, tiny_dataset)
    return folder


@pytest.fixture
def studio(root: Path, tiny_dataset: Path, tmp_path: Path) -> Studio:
    return Studio(studio_toy.places(root, tiny_dataset), tmp_path / "work")


def ask(**given: object) -> Request:
    return Request(**{"num_images": 2, "num_steps": 3, "sampler": "ddim", "batch_size": 2, **given})


def generate(studio: Studio, session: Session, bundle: str, request: Request, **options: object):
    session.begin()
    return studio.generate(session, bundle, request, **options)


def archive(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as content:
        return {name: content.read(name) for name in content.namelist()}


# Maps


def test_colours_differ_and_the_background_is_black() -> None:
    for num in (2, 5, 12):
        colours = maps.colours_of({f"l{i}": i for i in range(num)})
        assert len(np.unique(colours, axis=0)) == num
        assert not colours[0].any()


def test_a_stamp_is_a_disc_of_the_given_size_and_place() -> None:
    stamped = maps.stamp(np.zeros((64, 64), np.uint8), 6, (20, 40), 16)
    rows, columns = np.nonzero(stamped)
    assert (rows.mean(), columns.mean()) == (20, 40)
    assert len(rows) == pytest.approx(np.pi * 64, rel=0.03)
    assert (maps.stamp(np.zeros((8, 8), np.uint8), 1, (3, 3), 1) > 0).sum() == 1
    for center, diameter in (((64, 3), 5), ((-1, 3), 5), ((3, 3), 0), ((3, 3), float("nan"))):
        with pytest.raises(UserError, match="does not fit"):
            maps.stamp(stamped, 6, center, diameter)


# Uploads


def write(path: Path, array: np.ndarray) -> Path:
    if path.suffix.lower() == ".png":
        Image.fromarray(array).save(path, format="PNG")
    else:
        nib.save(nib.Nifti1Image(array.T[..., None], np.eye(4)), path)
    return path


@pytest.mark.parametrize("name", ["map.png", "MAP.PNG", "map.nii", "map.nii.gz", "..%2f..%2fmap.png"])
def test_png_and_nifti_give_the_same_map_and_leave_no_file(name: str, tmp_path: Path) -> None:
    label = np.random.default_rng(0).integers(0, 8, (64, 48)).astype(np.uint8)
    path, folder = tmp_path / name, tmp_path / "session"
    folder.mkdir()
    write(path, label)
    found = uploads.read_map(path, folder, labels=LABELS, size=(64, 48))
    np.testing.assert_array_equal(found, label)
    assert not list(folder.iterdir())


def test_a_map_of_another_size_is_resized_only_when_asked_and_keeps_its_nodule(tmp_path: Path) -> None:
    label = np.full((256, 256), 4, np.uint8)
    label[100:102, 50:52] = 7
    path = write(tmp_path / "map.png", label)
    with pytest.raises(UserError, match="256x256, the model makes 64x64; tick 'resize'"):
        uploads.read_map(path, tmp_path, labels=LABELS, size=(64, 64))
    found = uploads.read_map(path, tmp_path, labels=LABELS, size=(64, 64), resize=True)
    assert found.shape == (64, 64)
    assert (found == 7).any()


def bomb() -> bytes:
    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 1))
    header.set_data_dtype(np.uint8)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    return gzip.compress(header.binaryblock + b"\0" * 4)


def many_pixels() -> bytes:
    content = io.BytesIO()
    Image.new("1", (5000, 5000)).save(content, format="PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("map.jpg", b"\xff\xd8\xff", "no PNG or NIfTI"),
        ("map", b"", "no PNG or NIfTI"),
        ("map.png", b"<script>alert(1)</script>", "not what its ending"),
        ("map.png", b"", "not what its ending"),
        ("map.nii.gz", b"\x89PNG\r\n\x1a\n", "not what its ending"),
        ("map.png", b"\x89PNG\r\n\x1a\n" + b"x" * 50, "damaged"),
        ("map.nii.gz", gzip.compress(b"x" * 500), "damaged"),
        ("map.nii.gz", bomb(), "pixels, allowed are"),
        ("map.png", many_pixels(), "pixels, allowed are"),
        ("map.png", b"\x89PNG\r\n\x1a\n" + b"\0" * uploads.MAX_BYTES, "32 MB, allowed"),
    ],
    ids=[
        "jpeg",
        "no ending",
        "script",
        "empty",
        "another type",
        "damaged png",
        "damaged nifti",
        "bomb",
        "wide",
        "large",
    ],
)
def test_an_upload_is_refused_by_one_message_and_nothing_is_left(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    folder = tmp_path / "session"
    folder.mkdir()
    with pytest.raises(UserError, match=told) as caught:
        uploads.read_map(tmp_path / "in" / name, folder, labels=LABELS, size=(64, 64))
    assert str(tmp_path) not in str(caught.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("value", [8, 255, -1, 2.5, float("nan")])
def test_labels_that_the_model_does_not_know_are_refused(value: float, tmp_path: Path) -> None:
    label = np.zeros((64, 64), np.float32)
    label[3, 3] = value
    with pytest.raises(UserError, match=r"has values|NaN"):
        uploads.read_map(write(tmp_path / "m.nii.gz", label), tmp_path, labels=LABELS, size=(64, 64))


# Sampling


def bundle_images(bundle: str, folder: Path, out: Path, **values: object) -> dict[str, bytes]:
    """Pictures that the bundle's own sampling writes."""
    given = {"num_steps": 3, "sampler": "ddim", "seed": 5, "batch_size": 2, "device": "cpu", "precision": "float32"}
    if bundle == "spade_gan":
        given = {key: given[key] for key in ("seed", "batch_size", "device")}
    options = given | {"ckpt_dir": str(folder), "output_dir": str(out)} | values
    run(bundle, "inference.json", "inference", "run", **options)
    return {p.name: p.read_bytes() for p in out.rglob("*.png") if p.parent.name not in ("figures", out.name)}


@pytest.mark.parametrize("bundle", ["lsdm", "spade_gan", "jdm", "pairs", "cfg_ddpm", "fad"])
def test_the_same_seed_gives_the_same_bytes_as_the_bundles_own_sampling(
    bundle: str, studio: Studio, root: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    name = "jdm" if bundle == "pairs" else bundle
    session, place = studio.session("a"), studio.places[name]
    request = ask(
        seed=5, precision="float32", guidance_scale=2.0, classes=["left", "right"] if not place.labels else []
    )
    values: dict = {"num_samples": 2}
    if name in ("lsdm", "spade_gan"):
        drawing = studio.take_case(session, name, "test / p0016-s1-z0001")
        values |= {"dataset_dir": str(tiny_dataset)}
        request = dataclasses.replace(request, num_images=1)
        values["num_samples"] = 1
        if bundle == "lsdm":
            values["guidance_scale"] = 2.0
    elif bundle == "jdm":
        drawing = studio.stamp(session, name, "nucleus", row=12, column=14, diameter=10)
        (tmp_path / "masks").mkdir()
        write(tmp_path / "masks" / f"{drawing.name}.png", drawing.label)
        values |= {"condition": "mask", "masks": str(tmp_path / "masks"), "dataset_dir": str(tmp_path)}
    elif bundle == "pairs":
        values |= {"dataset_dir": str(tmp_path)}
    else:
        values = {"per_class": 2} | ({"guidance_scale": 2.0} if bundle == "cfg_ddpm" else {})
    made = generate(studio, session, name, request, given="nothing" if bundle == "pairs" else "map")
    own = bundle_images(name, place.ckpt_dir, tmp_path / "own", **values)
    form = made.forms[-2] if place.labels else made.forms[-1]
    form = "nnU-Net dataset (PNG)" if place.labels else form
    content = archive(write_zip(made, session.folder, form))
    pictures = {Path(p).name: data for p, data in content.items() if p.endswith(".png") and "samples" not in p}
    assert len(own) >= 2
    shared = own.keys() & pictures.keys()
    assert shared == pictures.keys()
    for picture in own:
        assert pictures[picture] == own[picture], picture
    lines = next(data for p, data in content.items() if p.endswith("provenance.jsonl")).decode().splitlines()
    theirs = next((tmp_path / "own").rglob("provenance.jsonl")).read_text().splitlines()
    for line, other in zip(map(json.loads, lines), map(json.loads, theirs), strict=True):
        line["conditioning"].pop("source", None), other["conditioning"].pop("source", None)
        assert line == other


def test_features_and_guidance_change_the_image_and_enter_the_provenance(studio: Studio) -> None:
    session = studio.session("a")
    studio.take_case(session, "lsdm", "test / p0016-s1-z0001")
    plain = generate(studio, session, "lsdm", ask(guidance_scale=0.0))
    asked = generate(studio, session, "lsdm", ask(guidance_scale=500.0, targets={"spiculation": 5}))
    images = [next(run.samples()).image for run in (plain, asked)]
    assert (images[0] != images[1]).any()
    lines = archive(write_zip(asked, session.folder, "PNG"))["provenance.jsonl"].decode().splitlines()
    assert json.loads(lines[0])["conditioning"]["targets"] == {"spiculation": 5.0}
    assert json.loads(lines[0])["guidance"]["scales"]["spiculation"] == 500.0


def test_a_map_that_is_changed_is_no_longer_the_datasets(studio: Studio) -> None:
    session = studio.session("a")
    first = studio.take_case(session, "lsdm", "test / p0016-s1-z0001")
    assert studio.take_drawn(session, "lsdm", first.label.copy()) is first
    drawn = studio.stamp(session, "lsdm", "nodule_malignant", row=30, column=20, diameter=8)
    assert (drawn.case, drawn.origin) == (None, "drawing")
    made = generate(studio, session, "lsdm", ask())
    sample = next(made.samples())
    np.testing.assert_array_equal(sample.label, drawn.label)
    assert sample.case_id == f"{drawn.name}_s000000"


def test_cancel_stops_within_the_step_and_the_next_generation_works(studio: Studio) -> None:
    session = studio.session("a")
    steps = []

    def stop(done: int, total: int) -> None:
        steps.append((done, total))
        if done == 4:
            session.cancel()

    with pytest.raises(CancelledError):
        generate(studio, session, "cfg_ddpm", ask(num_steps=20, classes=["left"]), progress=stop)
    assert steps == [(1, 20), (2, 20), (3, 20), (4, 20)]
    assert "cfg_ddpm" not in session.runs
    steps.clear()
    generate(
        studio,
        session,
        "cfg_ddpm",
        ask(num_steps=3, batch_size=1, classes=["left"]),
        progress=lambda *a: steps.append(a),
    )
    assert steps == [(i + 1, 6) for i in range(6)]


def test_one_user_generates_once_at_a_time_and_cancels_while_waiting(studio: Studio) -> None:
    first, second = studio.session("a"), studio.session("b")
    first.begin()
    with pytest.raises(UserError, match="waiting or running"):
        first.begin()
    second.begin()  # another user is not in the way
    assert second.cancel()
    with pytest.raises(CancelledError):
        studio.generate(second, "jdm", ask(), given="nothing")
    assert not second.cancel()
    studio.generate(first, "jdm", ask(), given="nothing")


def test_a_click_gives_one_turn_and_a_second_click_none(studio: Studio) -> None:
    session = studio.session("a")
    session.begin()
    with pytest.raises(UserError, match="waiting or running"):
        session.begin()
    assert [session.take_turn(), session.take_turn()] == [True, False]


def test_users_take_turns_and_do_not_see_each_others_images(studio: Studio) -> None:
    order: list[str] = []

    def work(user: str) -> None:
        generate(
            studio, studio.session(user), "cfg_ddpm", ask(classes=["left"]), progress=lambda *_: order.append(user)
        )

    threads = [threading.Thread(target=work, args=(user,)) for user in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "".join(order) in ("aaabbb", "bbbaaa")
    assert studio.session("a").runs["cfg_ddpm"] is not studio.session("b").runs["cfg_ddpm"]
    assert studio.session("a").folder != studio.session("b").folder


def test_a_closed_session_stops_and_leaves_no_file(studio: Studio) -> None:
    session = studio.session("a")
    with pytest.raises(CancelledError):
        generate(studio, session, "cfg_ddpm", ask(classes=["left"]), progress=lambda *_: studio.close("a"))
    assert not session.folder.exists()
    assert not list(studio.work_dir.glob("session-*"))
    assert studio.known("a") is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_images": 0}, "num_images is 0"),
        ({"num_images": 65}, "num_images is 65"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"targets": {"spiculation": 9}}, "spiculation is 9"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(given: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Request(**given)


@pytest.mark.parametrize(
    ("bundle", "given", "told"),
    [
        ("cfg_ddpm", {"classes": ["up"]}, "unknown class"),
        ("cfg_ddpm", {"classes": []}, "no class is named"),
        ("cfg_ddpm", {"classes": ["left"], "num_steps": 51}, "51"),
        ("cfg_ddpm", {"classes": ["left"], "sampler": "magic"}, "magic"),
        ("cfg_ddpm", {"classes": ["left"], "precision": "half"}, "half"),
        ("fad", {"classes": ["left", "right"], "num_images": 33}, "allowed are 64 in all"),
    ],
)
def test_what_the_sampling_refuses_is_told_and_leaves_the_session_free(
    bundle: str, given: dict, told: str, studio: Studio
) -> None:
    session = studio.session("a")
    with pytest.raises(UserError, match=told):
        generate(studio, session, bundle, ask(**given))
    session.begin()


def test_another_resolution_gives_the_same_bytes_as_the_bundles_own_sampling(
    studio: Studio, tiny_dataset: Path, tmp_path: Path
) -> None:
    session, place = studio.session("a"), studio.places["lsdm"]
    studio.take_case(session, "lsdm", "test / p0016-s1-z0001")
    studio.take_size(session, "lsdm", (96, 96))
    made = generate(studio, session, "lsdm", ask(num_images=1, seed=5, precision="float32", guidance_scale=2.0))
    values = {"num_samples": 1, "guidance_scale": 2.0, "dataset_dir": str(tiny_dataset), "dataset#image_size": [96, 96]}
    own = bundle_images("lsdm", place.ckpt_dir, tmp_path / "own", **values)
    content = archive(write_zip(made, session.folder, "nnU-Net dataset (PNG)"))
    pictures = {Path(name).name: data for name, data in content.items() if "Tr/" in name}
    assert {name: pictures[name] for name in own} == own
    assert all(Image.open(io.BytesIO(data)).size == (96, 96) for data in own.values())


def test_masks_for_an_image_are_those_of_the_bundles_own_sampling(studio: Studio, tmp_path: Path) -> None:
    session, folder = studio.session("a"), tmp_path / "images"
    folder.mkdir()
    path = write(tmp_path / "my image.png", np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8))
    image = studio.take_picture(session, "jdm", path, resize=False)
    made = generate(studio, session, "jdm", ask(seed=5, precision="float32"), given="image")
    case_id = made.batches[0]["case_id"][0].rsplit("_s", 1)[0]
    write(folder / f"{case_id}.png", image[0])
    values = {"num_samples": 2, "condition": "image", "images": str(folder), "dataset_dir": str(tmp_path)}
    own = bundle_images("jdm", studio.places["jdm"].ckpt_dir, tmp_path / "own", **values)
    content = archive(write_zip(made, session.folder, "nnU-Net dataset (PNG)"))
    pictures = {Path(name).name: data for name, data in content.items() if "Tr/" in name}
    assert {name: pictures[name] for name in own} == own
    np.testing.assert_array_equal(next(made.samples()).image, image[0])


@pytest.mark.parametrize(
    ("shape", "told"),
    [((32, 32, 3), r"colour \(3 channels\), the model's images are grey"), ((48, 32), "tick 'resize'")],
)
def test_an_image_of_other_channels_or_size_is_refused(shape: tuple, told: str, studio: Studio, tmp_path: Path) -> None:
    session = studio.session("a")
    path = write(tmp_path / "image.png", np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match=told):
        studio.take_picture(session, "jdm", path, resize=False)
    with pytest.raises(UserError, match="there is no image yet"):
        generate(studio, session, "jdm", ask(), given="image")


def test_a_model_makes_the_sizes_that_its_network_takes_and_no_other(studio: Studio) -> None:
    session = studio.session("a")
    assert studio.places["lsdm"].sizes == ((64, 64), (48, 48), (80, 80), (96, 96), (128, 128))
    for bundle in ("spade_gan", "cfg_ddpm", "fad"):
        assert studio.places[bundle].sizes == (studio.places[bundle].size,)
    with pytest.raises(UserError, match="lsdm makes 64x64, 48x48, .* here, not 100x100"):
        studio.take_size(session, "lsdm", (100, 100))
    place = dataclasses.replace(studio.places["jdm"], stride=16)
    assert place.sizes == ((32, 32), (48, 48), (64, 64))


def test_a_change_of_resolution_keeps_the_map_and_an_old_drawing_no_longer_fits(studio: Studio) -> None:
    session = studio.session("a")
    drawn = studio.stamp(session, "jdm", "nucleus", row=12, column=14, diameter=10)
    studio.take_size(session, "jdm", (48, 48))
    label = studio.drawing(session, "jdm").label
    assert label.shape == (48, 48)
    assert label.sum() == pytest.approx(1.5**2 * drawn.label.sum(), rel=0.1)
    for given in ("map", "nothing"):
        made = generate(studio, session, "jdm", ask(num_images=1), given=given)
        assert next(made.samples()).image.shape == (48, 48)
    studio.take_size(session, "jdm", (32, 32))
    assert studio.drawing(session, "jdm").label.shape == (32, 32)


# Downloads


@pytest.mark.parametrize("bundle", ["lsdm", "jdm", "fad"])
def test_each_form_holds_every_image_with_its_provenance_and_the_same_bytes_again(bundle: str, studio: Studio) -> None:
    session = studio.session("a")
    labelled = bool(studio.places[bundle].labels)
    if labelled:
        studio.stamp(session, bundle, list(studio.places[bundle].labels)[-1], row=12, column=14, diameter=8)
    made = generate(studio, session, bundle, ask(num_images=3, classes=[] if labelled else ["left"]))
    for form in made.forms:
        path = write_zip(made, session.folder, form)
        content = archive(path)
        before = path.read_bytes()
        assert write_zip(made, session.folder, form).read_bytes() == before
        lines = next(data for name, data in content.items() if name.endswith("provenance.jsonl")).decode().splitlines()
        ending = ".nii.gz" if "NIfTI" in form else ".png"
        images = [name for name in content if name.endswith(ending) and "label" not in name and "samples" not in name]
        assert (len(lines), len(images)) == (3, 3), form
        assert form.startswith(("nnU-Net", "class")) == any(name.endswith("dataset.json") for name in content)
        assert not any(name.startswith(("/", "..")) for name in content)
    with pytest.raises(UserError, match="allowed are PNG"):
        write_zip(made, session.folder, "TIFF")


def test_nifti_of_ct_holds_hounsfield_units_and_the_maps_spacing(studio: Studio, tmp_path: Path) -> None:
    session = studio.session("a")
    studio.take_case(session, "lsdm", "test / p0016-s1-z0001")
    made = generate(studio, session, "lsdm", ask(num_images=1))
    content = archive(write_zip(made, session.folder, "NIfTI"))
    (tmp_path / "image.nii.gz").write_bytes(next(data for name, data in content.items() if name.startswith("images/")))
    image = nib.load(tmp_path / "image.nii.gz")
    assert np.asarray(image.dataobj).min() >= -1024
    assert image.header.get_zooms()[:2] == (1.0, 1.0)


# Reading


def case(label: np.ndarray, **given: object) -> Case:
    return Case("c", np.zeros(label.shape, np.uint8), label, True, **given)


def test_a_mark_hits_up_to_three_pixels_from_the_nodule() -> None:
    label = np.zeros((40, 40), np.uint8)
    label[10:14, 20:24] = 7
    for mark, hit in (((11, 21), True), ((10, 26), True), ((10, 27), False), ((30, 30), False)):
        assert score(case(label), mark, 4).hit is hit, mark
    assert score(case(label), (10, 33), 4).distance == 10.0


@pytest.mark.parametrize(("value", "right"), [(5, {1, 2}), (6, {3}), (7, {4, 5})])
def test_a_rating_is_right_where_it_says_what_the_label_says(value: int, right: set[int]) -> None:
    label = np.zeros((9, 9), np.uint8)
    label[4, 4] = value
    assert {rating for rating in range(1, 6) if score(case(label), (4, 4), rating).rating_fits} == right


def test_misses_false_alarms_and_right_rejections_are_counted() -> None:
    empty, full = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    full[3:6, 3:6] = 7
    reading = Reading([case(empty), case(empty), case(full), case(full), case(full)])
    answers = {True: [((4, 4), 5), ((15, 15), 2), (None, None)], False: [(None, None), ((2, 2), 1)]}
    while reading.current is not None:
        reading.answer(*answers[bool(reading.current.label.any())].pop())
    totals = reading.totals()
    assert totals == {
        "num_read": 5, "num_cases": 5, "num_present": 3, "num_found": 1, "num_absent": 2, "num_false_alarms": 1,
        "num_rated": 1, "num_rated_right": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match="all cases are answered"):
        reading.answer(None, None)


def test_masks_that_tell_no_malignancy_need_no_rating() -> None:
    label = np.zeros((9, 9), np.uint8)
    label[4, 4] = 1
    assert score(case(label, malignancies=False), (4, 4), None).hit
    with pytest.raises(UserError, match="rate from 1"):
        score(case(label), (4, 4), None)
    with pytest.raises(UserError, match="outside the picture"):
        score(case(label), (9, 0), 3)


def test_real_and_generated_cases_are_read_together_in_an_order_of_the_seed(studio: Studio) -> None:
    session = studio.session("a")
    with pytest.raises(UserError, match="no case to read"):
        studio.start_reading(session, "lsdm", "generated")
    studio.take_case(session, "lsdm", "test / p0016-s1-z0001")
    generate(studio, session, "lsdm", ask())
    orders = [[c.name for c in studio.start_reading(session, "lsdm", "both", seed).cases] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(c.synthetic for c in session.reading.cases) == [False] * 4 + [True] * 2


# Places


def test_no_trained_files_give_no_place_and_a_named_folder_without_them_is_refused(tmp_path: Path) -> None:
    assert find_places(tmp_path) == {}
    with pytest.raises(UserError, match="holds no model.pt"):
        find_places(tmp_path, ckpt_dirs={"lsdm": str(tmp_path)})
    with pytest.raises(UserError, match="unknown bundle 'vae'"):
        find_places(tmp_path, ckpt_dirs={"vae": str(tmp_path)})


def test_a_checkpoint_of_another_bundle_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trained by the bundle 'jdm', not by 'lsdm'"):
        find_places(tmp_path, ckpt_dirs={"lsdm": str(root / "jdm")})
