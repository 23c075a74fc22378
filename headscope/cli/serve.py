"""The command that opens the dashboard: app."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from . import options as opt

PORT = 8501
_PATIENCE = 120.0  # seconds until an app that does not answer is given up
_LOCAL = ("localhost", "127.0.0.1", "::1")
# Nothing is watched, nothing is sent, nobody but this machine is served unless asked.
_FLAGS = {
    "server.fileWatcherType": "none",
    "server.headless": "true",
    "server.maxUploadSize": "4",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "viewer",
    "client.showErrorDetails": "none",
    "logger.level": "warning",
}


def app(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]…", help="Run directories, or folders of them; ./runs and the demo's if left out."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder for live views, if not the one the run names.")
    ] = None,
    device: opt.Device = "auto",
    port: Annotated[int, typer.Option(help="Port to serve on.")] = PORT,
    address: Annotated[
        str, typer.Option(help="Address to serve on; others than localhost are open to the network.")
    ] = "localhost",
    allow_jobs: Annotated[
        bool, typer.Option("--allow-jobs", help="Let everybody who reaches --address start scans and sweeps.")
    ] = False,
) -> None:
    """Open the dashboard on runs: atlas of heads, head pages, text, zoomable maps, interventions, comparison."""
    if importlib.util.find_spec("streamlit") is None:
        raise UserError('The app needs streamlit, which is not installed: pip install "headscope[app]".')
    for run in runs or []:
        if not run.is_dir():
            raise UserError(f"There is no run directory {run}.")
    if model is not None and not Path(model).is_dir():
        raise UserError(f"--model must be a model folder on this machine; there is no folder {model}.")
    print(f"Serving on http://{address}:{port} (stop with Ctrl-C)", file=sys.stderr)
    try:
        said = command(runs or [], model, device, port, address, allow_jobs)
        code = subprocess.call(said, env=environment())
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)


def command(
    runs: list[Path], model: str | None, device: str, port: int, address: str, allow_jobs: bool = False
) -> list[str]:
    """The command line that runs the app. Only this machine may start jobs in it, unless ``allow_jobs``."""
    from ..app.theme import flags

    script = Path(importlib.util.find_spec("headscope.app.main").origin)
    settings = [f"--{k}={v}" for k, v in (_FLAGS | {"server.address": address, "server.port": str(port)}).items()]
    chosen = [str(r.resolve()) for r in runs]
    extra = ["--device", device] + (["--model", str(Path(model).resolve())] if model else [])
    extra += [] if allow_jobs or address in _LOCAL else ["--no-jobs"]
    return [sys.executable, "-m", "streamlit", "run", str(script), *settings, *flags(), "--", *chosen, *extra]


def environment() -> dict[str, str]:
    """The environment of the app: it finds this headscope also from a source checkout."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": root + (os.pathsep + path if path else "")}


@contextmanager
def running(runs: list[Path], log: Path | None = None) -> Iterator[tuple[str, int]]:
    """The app on a free port of this machine, on the CPU, while the block runs: for pictures and measurements.

    Args:
        runs: Run directories, or folders of them.
        log: A file for what it prints.

    Yields:
        Its address and its process id.

    Raises:
        UserError: If it does not answer.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}"
    with Path(log or os.devnull).open("wb") as out:
        server = subprocess.Popen(
            command(runs, None, "cpu", port, "localhost"), env=environment(), stdout=out, stderr=subprocess.STDOUT
        )
        try:
            _wait(server, address)
            yield address, server.pid
        finally:
            server.terminate()
            server.wait(20)


def _wait(server: subprocess.Popen, address: str) -> None:
    """Until the app answers."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/_stcore/health", timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise UserError(f"The app does not answer on {address}. Open it with 'headscope app' to see why.")
