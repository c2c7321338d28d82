# SPDX-License-Identifier: Apache-2.0
"""Serves the page: on loopback, from one folder, and without a word to any other machine."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from monai_synth.checks import chosen_device
from monai_synth.errors import UserError
from monai_synth.studio.places import find_places
from monai_synth.studio.session import Studio
from monai_synth.studio.uploads import MAX_BYTES

MAX_REQUEST = MAX_BYTES + 2**20  # a file and what is said about it
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# The page's own scripts are inline and compile templates; from other machines nothing may be loaded.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "object-src 'none'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)


class Guard:
    """ASGI middleware that adds headers to every answer, and refuses a request that is too large before it is read."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        told = int(length) if length.isdigit() else 0
        read, answered = 0, False

        async def send_more(message: dict[str, Any]) -> None:
            nonlocal answered
            if read > MAX_REQUEST and not answered:
                return  # the answer is ours
            if message["type"] == "http.response.start":
                answered = True
                more = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
                message["headers"] = [*message.get("headers", []), *((k.encode(), v.encode()) for k, v in more.items())]
            await send(message)

        async def receive_some() -> dict[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            return message if read <= MAX_REQUEST else {"type": "http.disconnect"}

        if told <= MAX_REQUEST:
            try:
                await self.app(scope, receive_some, send_more)
            except Exception:
                if read <= MAX_REQUEST:
                    raise
        if max(told, read) > MAX_REQUEST and not answered:
            await _refuse(send, max(told, read))


async def _refuse(send: Any, size: int) -> None:
    """Answer that a request is too large, and close the connection, so that no more of it is read."""
    body = f"{size / 2**20:.0f} MB were sent, allowed are {MAX_BYTES // 2**20}; give one map in one file"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})


def serve(
    *,
    bundles: str = "bundles",
    ckpt_dir: Mapping[str, str] | None = None,
    dataset_dir: Mapping[str, str] | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    work_dir: str | None = None,
    device: str | None = None,
    report: Callable[[str], None] = print,
    wait: bool = True,
) -> Any:
    """Start the studio.

    Args:
        bundles: folder of the bundles.
        ckpt_dir: bundle -> folder of trained files in their stead.
        dataset_dir: bundle -> prepared dataset.
        host: address to listen at.
        port: to listen at; 0 takes a free one.
        work_dir: folder for uploads and results; None takes a temporary one that is removed at the end.
        device: "cpu" or "cuda"; None takes a GPU where there is one.
        report: told where the page is.
        wait: until the process is interrupted; False returns the running page, whose ``close`` ends it.

    Raises:
        UserError: Gradio is not installed, the port is in use, a folder cannot be written, or trained files are wrong.
    """
    places = find_places(bundles, ckpt_dirs=ckpt_dir, dataset_dirs=dataset_dir)
    device = chosen_device(device)
    port = free_port(host, port)
    with contextlib.ExitStack() as ending:
        if wait:
            ending.enter_context(_ended_by_sigterm())
        folder, is_ours = _work_dir(work_dir)
        if is_ours:
            ending.callback(shutil.rmtree, folder, ignore_errors=True)
        page_module = _page_module(folder)
        studio = Studio(places, folder, device=device)
        page = page_module.build_page(studio)
        page.queue(max_size=64, api_open=False)
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, inbrowser=False, prevent_thread_lock=True,
            allowed_paths=[str(folder)], max_file_size=MAX_BYTES, show_error=False, enable_monitoring=False,
            ssr_mode=False, pwa=False, mcp_server=False, footer_links=[], css=page_module.CSS,
            theme=page_module.theme(), app_kwargs={"middleware": [_middleware()]},
        )  # fmt: skip
        page.studio = studio
        shown = ", ".join(places) or "no bundle yet, the page says how to train one"
        place = f"[{host}]" if ":" in host else host
        report(f"monai-synth studio: http://{place}:{port} ({shown}; {device}). Stop: Ctrl-C")
        if host not in LOOPBACK:
            report(f"warning: {host} can be reached from other machines, and the page asks nobody for a password")
        if not wait:
            ending.pop_all()
            return page
        ending.callback(studio.close_all)
        ending.callback(page.close, verbose=False)
        page.block_thread()
    return None


def free_port(host: str, port: int) -> int:
    """The port, if one can listen there; 0 becomes a free one.

    Raises:
        UserError: it is in use, is none, or the host is not of this machine.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise UserError(f"port is {port!r}; allowed are whole numbers from 1 to 65535, or 0 for any that is free")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                msg = (
                    f"port {port} of {host} is in use, perhaps by another studio; give another, e.g. --port {port + 1}"
                )
            elif error.errno == errno.EACCES:
                msg = f"port {port} of {host} may not be used; give one from 1024, e.g. --port 7860"
            else:
                msg = f"cannot listen at host {host!r} ({error.strerror}); give an address of this machine (--host)"
            raise UserError(msg) from error
        return int(probe.getsockname()[1])


def _work_dir(given: str | None) -> tuple[Path, bool]:
    """The folder, and whether it is a temporary one."""
    if given is None:
        return Path(tempfile.mkdtemp(prefix="monai_synth_studio_")), True
    folder = Path(given).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"work_dir {folder} cannot be written ({error.strerror}); give another --work-dir") from error
    return folder, False


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within, what ends a service is like Ctrl-C, so that the folder is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _page_module(folder: Path) -> Any:
    """The module of the page, and with it Gradio, silent and within the folder: it reads its environment on import."""
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(folder / "gradio"), HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1", GRADIO_SHARE="False",
    )  # fmt: skip
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        msg = f"the studio needs Gradio, which is not there ({error}); install it: pip install 'monai_synth[studio]'"
        raise UserError(msg) from error
    from monai_synth.studio import page

    return page


def _middleware() -> Any:
    from starlette.middleware import Middleware

    return Middleware(Guard)
