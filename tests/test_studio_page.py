# SPDX-License-Identifier: Apache-2.0
"""The studio's page, served on loopback: over HTTP, and in a headless Chromium at the widths of a desk and a phone.

The browser is looked for as ``chromium``, ``chromium-browser``, ``google-chrome`` or what ``MONAI_SYNTH_CHROMIUM``
names. ``MONAI_SYNTH_SCREENSHOTS`` names a folder that is to keep pictures of the pages.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import studio_toy
from PIL import Image

from monai_synth.errors import UserError
from monai_synth.studio.places import Place
from monai_synth.studio.server import free_port, serve

CHROMIUM = os.environ.get("MONAI_SYNTH_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
CONTRAST = Path(__file__).parent / "studio_contrast.js"
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
PATIENCE = 20_000  # ms that a page may take on a busy machine


def lacks(*modules: str) -> bool:
    return any(importlib.util.find_spec(name) is None for name in modules)


needs_gradio = pytest.mark.skipif(lacks("gradio"), reason="gradio is not installed (the extra studio)")
needs_browser = pytest.mark.skipif(
    lacks("gradio", "playwright") or CHROMIUM is None,
    reason="needs gradio, playwright and a chromium on the path (or named by MONAI_SYNTH_CHROMIUM)",
)


# Without a page


def test_a_port_in_use_is_told_with_another_to_take() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use.*--port {port + 1}"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    assert free_port("127.0.0.1", 0) > 0


@pytest.mark.parametrize("given", [-1, 70000, "80", True])
def test_what_is_no_port_is_refused(given: Any) -> None:
    with pytest.raises(UserError, match="whole numbers from 1 to 65535"):
        free_port("127.0.0.1", given)


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(UserError, match="give an address of this machine"):
        free_port("192.0.2.1", 0)


def test_without_gradio_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'monai_synth\[studio\]'"):
        serve(bundles=str(tmp_path), port=0, device="cpu", work_dir=str(tmp_path / "work"), wait=False)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another --work-dir"):
        serve(bundles=str(tmp_path), port=0, device="cpu", work_dir=str(tmp_path / "file"), wait=False)


# With a page


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("studio_page")
    studio_toy.write_models(folder, tiny_dataset)
    return folder


@pytest.fixture(scope="module")
def place(root: Path, tiny_dataset: Path) -> Iterator[tuple[str, Path, Any]]:
    """Address and folder of a running studio with all bundles, and the page."""
    found: dict[str, Place] = studio_toy.places(root, tiny_dataset)
    lines: list[str] = []
    page = serve(
        bundles=str(root / "nothing"),
        ckpt_dir={name: str(p.ckpt_dir) for name, p in found.items()},
        dataset_dir={name: str(p.dataset.root) for name, p in found.items() if p.dataset},
        port=0, work_dir=str(root / "work"), device="cpu", report=lines.append, wait=False,
    )  # fmt: skip
    address = lines[0].split()[2]
    yield address, root / "work", page
    page.close(verbose=False)


def get(address: str) -> tuple[int, bytes, Any]:
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


@pytest.mark.slow
@needs_gradio
def test_the_page_is_served_on_loopback_and_may_load_nothing_from_elsewhere(place: tuple) -> None:
    address = place[0]
    assert address.startswith("http://127.0.0.1:")
    status, content, headers = get(address)
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert b"fonts.googleapis" not in content
    assert not place[2].analytics_enabled


@pytest.mark.slow
@needs_gradio
@pytest.mark.parametrize("path", ["{work}/../secret.txt", "/etc/passwd", "{work}/%2e%2e/secret.txt", "secret.txt"])
def test_no_file_outside_its_folder_is_served(path: str, place: tuple) -> None:
    (place[1].parent / "secret.txt").write_text("secret")
    status, content, _ = get(f"{place[0]}/gradio_api/file={path.format(work=place[1])}")
    assert status in (403, 404)
    assert b"secret" not in content or b"detail" in content


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def form(name: str) -> tuple[bytes, dict[str, str]]:
    """The head of an upload, and its headers."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode(), {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.slow
@needs_gradio
def test_an_upload_of_100_mb_is_refused_before_it_is_read_and_nothing_is_left(place: tuple) -> None:
    before = files(place[1])
    head, headers = form("map.png")
    connection = http.client.HTTPConnection(place[0].removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/gradio_api/upload")
    for name, value in {**headers, "Content-Length": str(100 * 2**20)}.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(head)
    answer = connection.getresponse()
    assert answer.status == 413
    assert b"100 MB were sent, allowed are 32" in answer.read()
    connection.close()
    assert files(place[1]) == before


@pytest.mark.slow
@needs_gradio
def test_an_upload_that_does_not_tell_its_size_is_cut_off_and_nothing_is_left(place: tuple) -> None:
    before = files(place[1])
    head, headers = form("map.png")
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield head
        while sent < 100:
            sent += 1
            yield bytes(2**20)

    connection = http.client.HTTPConnection(place[0].removeprefix("http://"), timeout=60)
    with contextlib.suppress(OSError, http.client.HTTPException):  # where the connection ends before all is sent
        connection.request("POST", "/gradio_api/upload", endless(), headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    connection.close()
    assert files(place[1]) == before


@pytest.mark.slow
@needs_gradio
@pytest.mark.parametrize(
    "name", ["../../evil.png", "..%2f..%2fevil.png", "..\\..\\evil.png", "/evil.png", "a/../../evil.png"]
)
def test_no_name_of_an_upload_leads_out_of_the_folder(name: str, place: tuple) -> None:
    head, headers = form(name)
    body = head + b"x\r\n--x--\r\n"
    request = urllib.request.Request(f"{place[0]}/gradio_api/upload", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        (path,) = json.loads(answer.read())
    assert Path(path).resolve().is_relative_to(place[1].resolve())
    assert not [found for found in place[1].parent.rglob("*evil.png") if not found.is_relative_to(place[1])]
    assert not Path("/evil.png").exists()


@pytest.mark.slow
@needs_gradio
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "service"])
def test_the_folder_is_removed_on_ctrl_c_and_when_the_service_is_stopped(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # is the other page's again afterwards
    before, there = signal.getsignal(signal.SIGTERM), []

    def stop(line: str) -> None:
        there.extend(tmp_path.glob("monai_synth_studio_*"))
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, number)).start()

    serve(bundles=str(tmp_path), port=0, device="cpu", report=stop)
    assert len(there) == 1
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        made = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(params=list(WIDTHS))
def tab(request: pytest.FixtureRequest, browser: Any, place: tuple) -> Iterator[Any]:
    """An open page that has asked no other machine for anything; by finger at the width of a phone."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(
        viewport={"width": width, "height": height}, has_touch=request.param == "phone", accept_downloads=True
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    hosts: set[str] = set()
    faults: list[str] = []
    page.on("request", lambda r: hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(place[0])
    page.wait_for_selector("#lsdm-generate")
    yield page
    picture(page, f"{request.node.originalname}-{request.param}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    context.close()
    assert hosts == {place[0].removeprefix("http://")}
    assert not faults


def picture(page: Any, name: str) -> None:
    folder = os.environ.get("MONAI_SYNTH_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def says(page: Any, name: str, text: str) -> None:
    page.wait_for_function(
        "([name, text]) => document.querySelector(name)?.innerText.includes(text)", arg=[name, text], timeout=PATIENCE
    )


def go_to(page: Any, name: str) -> None:
    """Open a tab, from the menu of those that find no place where there is little."""
    shown = page.get_by_role("tab", name=name, exact=True)
    if not shown.is_visible():
        page.locator(".overflow-menu button").first.click()
    page.get_by_text(name, exact=True).last.click()


def draw(page: Any) -> None:
    """A stroke of the brush from the middle of the map to the right."""
    canvas = page.locator("#lsdm-map canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + box["width"] / 8, middle[1], steps=4)
    page.mouse.up()


@pytest.mark.slow
@needs_browser
def test_upload_draw_generate_and_download(tab: Any, tmp_path: Path) -> None:
    label = np.zeros((64, 64), np.uint8)
    label[8:56, 8:56] = 4
    Image.fromarray(label).save(tmp_path / "my map.png")
    tab.locator("#lsdm-upload input[type=file]").set_input_files(tmp_path / "my map.png")
    says(tab, "#lsdm-map-status", "Your map was read")
    says(tab, "#lsdm-map", "On the map: background, lung.")
    draw(tab)
    says(tab, "#lsdm-map", "On the map: background, lung, nodule_malignant.")
    tab.click("#lsdm-generate")
    says(tab, "#lsdm-status", "4 images, seeds from 0")
    assert tab.locator("#lsdm-gallery img").count() >= 4
    tab.click("#lsdm-pack")
    link = tab.locator("#lsdm-download a[download]").first
    link.wait_for()
    with tab.expect_download() as caught:
        link.click()
    with zipfile.ZipFile(io.BytesIO(Path(caught.value.path()).read_bytes())) as content:
        names = content.namelist()
        label = np.asarray(Image.open(io.BytesIO(content.read(next(n for n in names if n.startswith("labels/"))))))
    assert len([name for name in names if name.startswith("images/")]) == 4
    assert "provenance.jsonl" in names
    assert set(np.unique(label)) == {0, 4, 7}
    rows, columns = np.nonzero(label == 7)  # what was drawn is where it was drawn, as wide as the brush
    assert abs(rows.mean() - 31.5) < 1
    assert columns.min() < 31 < 39 < columns.max() < 44
    assert np.ptp(rows) + 1 == pytest.approx(4, abs=1)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("tab", ["desk"], indirect=True)
def test_by_keyboard_alone_a_map_is_painted_and_stamped_and_an_image_made(tab: Any) -> None:
    def reach(name: str) -> None:
        for _ in range(120):
            tab.keyboard.press("Tab")
            if tab.evaluate("name => document.activeElement?.closest(name) !== null", name):
                return
        raise AssertionError(f"{name} is not reached by the tab key")

    reach("#lsdm-stamp")
    tab.keyboard.press("Enter")
    says(tab, "#lsdm-map-status", "Stamped nodule_malignant at row 31, column 31")
    reach("#lsdm-map input[type=radio]")
    tab.keyboard.press("ArrowUp")
    reach("#lsdm-map canvas")
    for key in ("Shift+ArrowUp", "ArrowLeft", "Space"):
        tab.keyboard.press(key)
    says(tab, "#lsdm-map", "Row 24, column 31 of 64 x 64. On the map: background, nodule_indeterminate, nodule_malig")
    tab.keyboard.press("Control+z")
    says(tab, "#lsdm-map", "On the map: background, nodule_malignant.")
    reach("#lsdm-generate")
    tab.keyboard.press("Enter")
    says(tab, "#lsdm-status", "4 images, seeds from 0")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("tab", ["desk"], indirect=True)
def test_another_resolution_resizes_the_map_and_the_images(tab: Any) -> None:
    tab.click("#lsdm-take")
    says(tab, "#lsdm-map-status", "Map of test / p0016")
    tab.locator("#lsdm-size input").click()
    tab.get_by_role("option", name="96 x 96").click()
    says(tab, "#lsdm-map", "of 96 x 96. On the map: background, body")
    tab.click("#lsdm-generate")
    says(tab, "#lsdm-status", "4 images, seeds from 0")
    width = "document.querySelector('#lsdm-gallery img').naturalWidth"
    tab.wait_for_function(f"{width} > 0")
    assert tab.evaluate(width) == 3 * 96


@pytest.mark.slow
@needs_browser
def test_a_wrong_upload_and_an_empty_map_are_told(tab: Any, tmp_path: Path) -> None:
    tab.click("#lsdm-generate")
    says(tab, "#lsdm-status", "the label map is empty")
    (tmp_path / "map.png").write_text("no picture")
    tab.locator("#lsdm-upload input[type=file]").set_input_files(tmp_path / "map.png")
    says(tab, "#lsdm-map-status", "is not what its ending .png says")


def begin_a_long_sampling(tab: Any) -> None:
    """As long as the page lets it be, so that a busy machine does not end it before the test does."""
    go_to(tab, "jdm")
    tab.locator("#jdm-what").get_by_text("whole pairs").click()
    tab.locator("#jdm-map").wait_for(state="hidden")
    panel = tab.locator("[role=tabpanel]:visible").first
    panel.get_by_label("number input for Images", exact=True).fill("64")
    panel.get_by_role("button", name="Sampler").click()
    panel.get_by_label("number input for Steps").fill("50")
    panel.get_by_label("number input for Images at once").fill("1")
    tab.click("#jdm-generate")
    says(tab, "#jdm-status", "Cancel stops it")


@pytest.mark.slow
@needs_browser
def test_cancel_stops_and_a_second_click_does_not_start_another(tab: Any) -> None:
    begin_a_long_sampling(tab)
    tab.wait_for_selector("#jdm-gallery .progress-text, #jdm-gallery .progress-level")
    picture(tab, f"sampling-{tab.viewport_size['width']}")
    tab.click("#jdm-generate")
    says(tab, "#jdm-status", "waiting or running")
    tab.click("#jdm-cancel")
    says(tab, "#jdm-status", "Cancelled")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("tab", ["desk"], indirect=True)
def test_masks_are_made_for_an_uploaded_image(tab: Any, tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 99, np.uint8)).save(tmp_path / "image.png")
    go_to(tab, "jdm")
    tab.locator("#jdm-what").get_by_text("masks for an image").click()
    tab.locator("#jdm-map").wait_for(state="hidden")
    tab.click("#jdm-generate")
    says(tab, "#jdm-status", "there is no image yet")
    tab.locator("#jdm-upload-image input[type=file]").set_input_files(tmp_path / "image.png")
    says(tab, "#jdm-image-status", "Your image was read")
    tab.click("#jdm-generate")
    says(tab, "#jdm-status", "4 images, seeds from 0")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("tab", ["desk"], indirect=True)
def test_a_second_user_waits_until_the_first_ones_sampling_ends(tab: Any, browser: Any, place: tuple) -> None:
    begin_a_long_sampling(tab)
    second = browser.new_page(viewport={"width": 1280, "height": 900})
    second.set_default_timeout(PATIENCE)
    second.goto(place[0])
    second.wait_for_selector("#lsdm-generate")
    go_to(second, "cfg_ddpm")
    second.click("#cfg_ddpm-generate")
    says(second, "#cfg_ddpm-status", "Waiting for your turn")
    second.wait_for_timeout(500)
    assert second.locator("#cfg_ddpm-gallery img").count() == 0
    tab.click("#jdm-cancel")
    says(tab, "#jdm-status", "Cancelled")
    says(second, "#cfg_ddpm-status", "4 images, seeds from 0")
    second.close()


@pytest.mark.slow
@needs_browser
def test_a_closed_browser_ends_its_sampling_and_its_files(browser: Any, place: tuple) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.goto(place[0])
    page.wait_for_selector("#lsdm-generate")
    before = set(place[1].glob("session-*"))
    begin_a_long_sampling(page)
    folder = next(iter(set(place[1].glob("session-*")) - before))
    session = next(s for s in place[2].studio._sessions.values() if s.folder == folder)
    assert session._busy
    page.close()
    for _ in range(200):
        if not session._busy and not folder.exists():
            break
        time.sleep(0.1)
    assert not folder.exists()
    assert not session._busy
    assert "jdm" not in session.runs


@pytest.mark.slow
@needs_browser
def test_a_reader_marks_by_keyboard_and_learns_the_truth_after(tab: Any) -> None:
    go_to(tab, "reader training")
    tab.locator("#reading-start").press("Enter")
    says(tab, "#reading-status", "Case 1 of 4")
    picture(tab, f"reading-before-{tab.viewport_size['width']}")
    tab.locator("#reading-row input").fill("30")
    tab.locator("#reading-column input").fill("20")
    tab.locator("#reading-rating input").nth(3).press("Space")
    tab.locator("#reading-answer").press("Enter")
    says(tab, "#reading-status", "It was a case of the dataset (p00")
    says(tab, "#reading-totals", "Read 1 of 4")
    tab.locator("#reading-next").press("Enter")
    says(tab, "#reading-status", "Case 2 of 4")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("tab", ["phone"], indirect=True)
def test_every_control_has_a_name_and_every_word_stands_out(tab: Any) -> None:
    tab.click("#lsdm-take")
    says(tab, "#lsdm-map-status", "Map of")
    for name in ("lsdm", "spade_gan", "jdm", "cfg_ddpm", "fad", "reader training"):
        go_to(tab, name)
        tab.wait_for_timeout(300)
        for button in tab.get_by_role("button", name="Sampler").all():
            if button.is_visible():
                button.click()
        found = tab.evaluate(CONTRAST.read_text(encoding="utf-8"))
        assert found == {"unnamed": [], "faint": []}, name
        assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"], name


@pytest.mark.slow
@needs_gradio
def test_without_models_the_first_screen_tells_how_to_train_one(tmp_path: Path, repo_root: Path) -> None:
    lines: list[str] = []
    page = serve(
        bundles=str(tmp_path), port=0, device="cpu", work_dir=str(tmp_path / "work"), report=lines.append, wait=False
    )
    try:
        content = get(lines[0].split()[2])[1].decode()
        assert "No trained model is here yet" in content
        for config in re.findall(r"--config_file (bundles/\S+?\.json)", content):
            assert (repo_root / config).is_file()
        assert "run training --config_file bundles/lsdm/configs/train.json" in content
    finally:
        page.close(verbose=False)
