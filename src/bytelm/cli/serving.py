"""``bytelm serve``: the HTTP server."""

import ipaddress
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from bytelm.cli.app import app, console, status
from bytelm.cli.options import Checkpoint, Device, Precision
from bytelm.errors import ConfigError

if TYPE_CHECKING:
    from bytelm.serving import Settings

KEY_VARIABLE = "BYTELM_API_KEY"


@app.command()
def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")
    ] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model. (default: that of the folder)")
    ] = None,
    slots: Annotated[
        int, typer.Option(min=1, help="Largest number of continuations generated at once.")
    ] = 16,
    max_document_bytes: Annotated[
        int, typer.Option(min=1, help="Longest prompt and continuation together, in bytes.")
    ] = 8192,
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate",
            help="Let the decoder of a BLT draft bytes of a continuation that is alone; the text "
            "stays the same.",
        ),
    ] = False,
    queue: Annotated[
        int, typer.Option(min=1, help="Most continuations that are in progress or waiting.")
    ] = 256,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Key that clients must send; can be given several times. (also: {KEY_VARIABLE}, "
            "which other users of the computer cannot see)"
        ),
    ] = None,
    rate_limit: Annotated[
        float | None,
        typer.Option(min=1, help="Requests per minute for each key, or each address without keys."),
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Largest body of a request, in bytes.")] = 1
    << 20,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Longest time that a request may take, in seconds.")
    ] = 600.0,
    grace: Annotated[
        int, typer.Option(min=0, help="Seconds to finish requests in when the server is stopped.")
    ] = 60,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose pages may use the server, such as https://example.org; can be given "
            "several times. (default: none)"
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads to compute with, of each replica. (default: OMP_NUM_THREADS, or all; "
            "replicas share them)",
        ),
    ] = None,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray", help="Serve replicas with Ray Serve, on this computer or at RAY_ADDRESS."
        ),
    ] = False,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Number of replicas, with --ray. (default: 1)")
    ] = None,
) -> None:
    """Serve a model over HTTP, with OpenAI's API of completions.

    SIGINT (Ctrl+C) and SIGTERM end the server after the requests that are in progress. --ray serves
    several replicas of the model behind one address.

    [dim]bytelm serve runs/blt-1m
    curl http://127.0.0.1:8000/health[/]
    """
    _check_installed()
    if replicas is not None and not ray:
        raise ConfigError("--replicas needs --ray: without it there is one process")
    from bytelm.display import COMPILING, explaining
    from bytelm.language_model import load
    from bytelm.serving import Settings, create_app, listen
    from bytelm.serving import serve as run
    from bytelm.threads import use_threads

    keys = [*(api_key or ()), *([os.environ[KEY_VARIABLE]] if KEY_VARIABLE in os.environ else ())]
    settings = Settings(
        name=name or checkpoint.resolve().name,
        num_slots=slots,
        max_document_bytes=max_document_bytes,
        speculate=speculate,
        api_keys=tuple(keys),
        rate_limit=rate_limit,
        max_body=max_body,
        max_open=queue,
        timeout=timeout,
        cors_origins=tuple(cors_origin or ()),
    )
    if ray:
        try:
            from bytelm.serving.replicas import ReplicaOptions, deployed, wait_until_stopped
        except ModuleNotFoundError as error:
            missing = error.name or "Ray Serve"
            raise ConfigError(f"--ray needs {missing}: pip install 'bytelm[ray]'") from None

        options = ReplicaOptions(replicas or 1, threads, device, precision, grace)
        with deployed(checkpoint, settings, options, host, port) as found:
            _announce(settings, host, found)
            wait_until_stopped()
        return
    with listen(host, port) as listening:
        lm = load(checkpoint, device, precision)
        if threads is not None:
            use_threads(threads, device)
        with explaining(status, COMPILING):
            application = create_app(lm, settings)
        _announce(settings, host, listening.getsockname()[1])
        run(application, listening, grace)


def _announce(settings: "Settings", host: str, port: int) -> None:
    """Say where the server is, and warn if others can reach it without a key."""
    if not settings.api_keys and not _is_loopback(host):
        status.print(
            f"warning: {host} can be reached from other computers, and no key is needed: "
            f"set --api-key or {KEY_VARIABLE}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    shown = f"[{host}]" if ":" in host else host
    console.print(
        f"{settings.name} at http://{shown}:{port} (Ctrl+C stops it)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _check_installed() -> None:
    """Refuse if a package that only the server needs is missing.

    Raises:
        ConfigError: it is.
    """
    for package in ("fastapi", "prometheus_client", "uvicorn"):
        if find_spec(package) is None:
            raise ConfigError(f'serving needs {package}: pip install "bytelm[serve]"')


def _is_loopback(host: str) -> bool:
    """Whether an address is that of the computer itself, and for itself only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
