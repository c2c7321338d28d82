# SPDX-License-Identifier: Apache-2.0
"""The studio's page, served on loopback: over HTTP, and in a headless Chromium at the widths of a desk and a phone.

The browser is looked for as ``chromium``, ``chromium-browser``, ``google-chrome`` or what ``MONAI_SYNTH_CHROMIUM``
names. ``MONAI_SYNTH_SCREENSHOTS`` names a folder that is to keep pictures of the pages.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import socket
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


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        made = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--enable-unsafe-swiftshader"])
        yield made
        made.close()


@pytest.fixture(params=list(WIDTHS))
def tab(request: pytest.FixtureRequest, browser: Any, place: tuple) -> Iterator[Any]:
    """An open page that has asked no other machine for anything."""
    width, height = WIDTHS[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    hosts: set[str] = set()
    page.on("request", lambda r: hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
    page.goto(place[0])
    page.wait_for_selector("#lsdm-generate")
    page.wait_for_selector("#lsdm-editor canvas")
    yield page
    folder = os.environ.get("MONAI_SYNTH_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{request.node.originalname}-{request.param}.png"), full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    page.close()
    assert hosts == {place[0].removeprefix("http://")}


def says(page: Any, name: str, text: str) -> None:
    page.wait_for_function(
        "([name, text]) => document.querySelector(name)?.innerText.includes(text)", arg=[name, text], timeout=PATIENCE
    )


def draw(tab: Any) -> None:
    """A stroke of the brush in the middle of the map."""
    canvas = tab.locator("#lsdm-editor canvas").first
    canvas.scroll_into_view_if_needed()
    tab.locator("#lsdm-editor").get_by_role("button", name="Brush", exact=True).click()
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(*middle)
    tab.mouse.down()
    tab.mouse.move(middle[0] + 15, middle[1] + 8, steps=5)
    tab.mouse.up()
    tab.wait_for_timeout(1500)


def panel(page: Any) -> Any:
    return page.locator("[role=tabpanel]:visible").first


@pytest.mark.slow
@needs_browser
def test_upload_draw_generate_and_download(tab: Any, tmp_path: Path) -> None:
    label = np.zeros((64, 64), np.uint8)
    label[8:56, 8:56] = 4
    Image.fromarray(label).save(tmp_path / "my map.png")
    tab.locator("#lsdm-upload input[type=file]").set_input_files(tmp_path / "my map.png")
    says(tab, "body", "Labels in it: background, lung.")
    if tab.viewport_size["width"] == WIDTHS["desk"][0]:
        draw(tab)
    else:  # where there is little room a nodule is stamped
        tab.click("#lsdm-stamp")
        says(tab, "body", "Stamped nodule_malignant")
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
    assert (label == 7).sum() > 3  # what was drawn
    assert set(np.unique(label)) == {0, 4, 7}


@pytest.mark.slow
@needs_browser
def test_a_wrong_upload_and_an_empty_map_are_told(tab: Any, tmp_path: Path) -> None:
    tab.click("#lsdm-generate")
    says(tab, "body", "the label map is empty")
    (tmp_path / "map.png").write_text("no picture")
    tab.locator("#lsdm-upload input[type=file]").set_input_files(tmp_path / "map.png")
    says(tab, "body", "is not what its ending .png says")


@pytest.mark.slow
@needs_browser
def test_cancel_stops_and_a_second_click_does_not_start_another(tab: Any) -> None:
    tab.get_by_role("tab", name="jdm").click() if tab.get_by_role("tab", name="jdm").is_visible() else None
    tab.locator("#jdm-what").get_by_text("whole pairs").click()
    panel(tab).get_by_label("number input for Images", exact=False).first.fill("64")
    panel(tab).get_by_role("button", name="Sampler").click()
    panel(tab).get_by_label("number input for Steps", exact=False).first.fill("50")
    tab.click("#jdm-generate")
    says(tab, "#jdm-status", "Cancel stops it")
    tab.click("#jdm-generate")
    says(tab, "body", "waiting or running")
    tab.click("#jdm-cancel")
    says(tab, "#jdm-status", "Cancelled")


@pytest.mark.slow
@needs_browser
def test_a_reader_marks_by_keyboard_and_learns_the_truth_after(tab: Any) -> None:
    if not tab.get_by_role("tab", name="reader training").is_visible():
        tab.locator("button.overflow-menu, .overflow-menu button").first.click()
    tab.get_by_text("reader training").last.click()
    tab.locator("#reading-start").press("Enter")
    says(tab, "#reading-status", "Case 1 of 4")
    tab.locator("#reading-row input").fill("30")
    tab.locator("#reading-column input").fill("20")
    tab.locator("#reading-rating input").nth(3).press("Space")
    tab.locator("#reading-answer").press("Enter")
    says(tab, "#reading-status", "It was a case of the dataset (p00")
    says(tab, "#reading-totals", "Read 1 of 4")
    tab.locator("#reading-next").press("Enter")
    says(tab, "#reading-status", "Case 2 of 4")


@pytest.mark.slow
@needs_gradio
def test_without_models_the_first_screen_tells_how_to_train_one(tmp_path: Path) -> None:
    lines: list[str] = []
    page = serve(
        bundles=str(tmp_path), port=0, device="cpu", work_dir=str(tmp_path / "work"), report=lines.append, wait=False
    )
    try:
        content = get(lines[0].split()[2])[1].decode()
        assert "No trained model is here yet" in content
        assert "bundles/lsdm/configs/train.json" in content
    finally:
        page.close(verbose=False)
