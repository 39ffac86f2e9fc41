"""`erllama rpc-server`: offers the devices of this machine to models on other machines."""

from __future__ import annotations

import os

import click


@click.command("rpc-server")
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="IPv4 address to listen on."
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=50052,
    show_default=True,
    metavar="N",
    help="Port to listen on.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads of the CPU. Default: half of them.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    help="Device to offer, by its name in `erllama doctor`. Can be repeated. Default: the GPUs, or the CPU.",
)
def rpc_server(host: str, port: int, threads: int | None, devices: tuple[str, ...]) -> None:
    """Offer the devices of this machine to other machines.

    For trusted networks only: the server checks neither who connects nor what is sent.
    """
    from erllama.engine.backends.llama_library import rpc_server_program

    program = str(rpc_server_program())
    command = [program, "--host", host, "--port", str(port)]
    if threads is not None:
        command += ["--threads", str(threads)]
    if devices:
        command += ["--device", ",".join(devices)]
    os.execv(program, command)  # signals, output and exit status are the program's own
