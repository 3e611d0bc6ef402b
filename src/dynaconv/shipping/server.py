"""The process of the HTTP server: where it listens, who must bear a token, and how it ends."""

import contextlib
import logging
import os
import signal
import socket
import sys
import warnings
from dataclasses import replace

from dynaconv.errors import UserError, WorkError
from dynaconv.shipping.prediction import PictureClassifier
from dynaconv.shipping.serve import ServeSettings, build_app

LOOPBACK = ("127.0.0.1", "::1", "localhost")
TOKEN = "DYNACONV_TOKEN"  # noqa: S105 -- the name of a variable, not a secret


def serve(classifier: PictureClassifier, host: str, port: int, settings: ServeSettings) -> None:
    """Serves until SIGTERM or Ctrl-C; answers what was accepted, then returns.

    Raises:
        UserError: another host than this machine without a token, or an address that cannot be listened at.
        WorkError: it could not start.
    """
    import uvicorn

    token = os.environ.get(TOKEN) or None
    if host not in LOOPBACK and token is None:
        raise UserError(
            f"--host {host} can be reached from other machines; set {TOKEN} to a token that they must bear."
        )
    settings = replace(settings, token=token)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    logging.getLogger("uvicorn.access").disabled = True
    warnings.filterwarnings("ignore", module="PIL")  # what is odd inside a stranger's picture is nobody's business
    listener = _listen(host, port)
    server = uvicorn.Server(
        uvicorn.Config(
            build_app(classifier, settings),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=int(settings.seconds) + 5,
            server_header=False,
        )
    )
    shown = f"[{host}]" if ":" in host else host
    logging.getLogger("dynaconv.serve").info(f"Serving on http://{shown}:{listener.getsockname()[1]}, Ctrl-C ends it.")
    before = signal.getsignal(signal.SIGTERM)
    # When all is answered, uvicorn raises again the signal that ended it. To be told to end is how a server ends.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with listener, contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
    if not server.started:
        raise WorkError("The server could not start; what happened is told above.")


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens; raises UserError where that cannot be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)  # localhost has two
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # the latter where no host can be called so
        named = isinstance(error, (socket.gaierror, UnicodeError))
        reason = str(error) if named else os.strerror(error.errno or 0)
        raise UserError(
            f"{host}, port {port}, cannot be listened at: {reason.lower()}; name another with --host or --port."
        ) from error
