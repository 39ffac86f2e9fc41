"""A Ray cluster of one node for the tests: its own directory, no dashboard, a small object store, long timeouts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Ray gives up after seconds if a process of it starts slowly, as on a machine whose cores are all busy.
_PATIENCE = {
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_gcs_server_request_timeout_seconds": "300",
    "RAY_gcs_rpc_server_connect_timeout_s": "120",
    "RAY_py_gcs_connect_timeout_s": "120",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_raylet_client_connect_timeout_milliseconds": "30000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_worker_niceness": "0",  # as the caller; Ray's default of 15 starves beside other programs
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


@contextmanager
def ray_cluster(port: int, n_cpus: int = 2) -> Iterator[None]:
    """Start Ray and its HTTP proxy in this process; stop both at the end.

    Args:
        port: of the proxy, on 127.0.0.1.
        n_cpus: that Ray distributes, however many the machine has. Ray starts as many idle processes.
    """
    os.environ.update(_PATIENCE)
    import ray
    from ray import serve

    directory = tempfile.mkdtemp(prefix="ray")  # short: the paths of sockets have at most 107 bytes
    try:
        ray.init(
            num_cpus=n_cpus,
            object_store_memory=100 << 20,
            include_dashboard=False,
            log_to_driver=bool(os.environ.get("ERLLAMA_FLEET_LOGS")),
            _temp_dir=directory,
        )
        with suppress(TimeoutError):  # of the proxy, after 60 seconds: `Environment.deploy` waits for it
            serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)
