"""Notices that a Spot VM of Google Cloud is about to be taken away."""

import os
import signal
import threading
import time
import urllib.parse
import urllib.request

from esft_jax.errors import InputError

_WAIT = 60  # seconds that the server may hold an answer back


def watch_preemption() -> None:
    """Send this process SIGTERM when the metadata server says that its VM is preempted.

    The server (`GCE_METADATA_HOST`, or the usual name) holds its answer back until the value
    `instance/preempted` changes, so that a notice arrives at once; about 30 seconds are left then.

    Raises:
        InputError: there is no such server, as anywhere but on Google Cloud.
    """
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    try:
        value, version = _ask(host, {})
    except (OSError, ValueError) as error:
        raise InputError(
            f"--preemption-notices: no metadata server at {host}: {error}; expected a VM of Google "
            "Cloud"
        ) from None
    threading.Thread(target=_watch, args=(host, value, version), daemon=True).start()


def _watch(host: str, value: str, version: str) -> None:
    while value != "TRUE":
        query = {"wait_for_change": "true", "last_etag": version, "timeout_sec": str(_WAIT)}
        try:
            value, version = _ask(host, query)
        except (OSError, ValueError):  # the server may be away for moments
            time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _ask(host: str, query: dict[str, str]) -> tuple[str, str]:
    """The value, and the version to wait for a change of."""
    url = f"http://{host}/computeMetadata/v1/instance/preempted?{urllib.parse.urlencode(query)}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    # Never through a proxy: the server is a link-local address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=2 * _WAIT if query else 5) as answer:
        return answer.read().decode().strip(), answer.headers.get("ETag", "0")
