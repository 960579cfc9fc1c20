"""A tracking server that wants a user and a password, for tests."""

import base64
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER, PASSWORD = "somebody", "pl4nted%20w0rd"
"""As they stand in an address."""
SECRETS = ("pl4nted%20w0rd", "pl4nted w0rd", "pl4nted")

_HEADER = "Basic " + base64.b64encode(b"somebody:pl4nted w0rd").decode()


class GuardedServer:
    """Passes on what comes with the right header, and answers 401 to all else.

    Args:
        upstream: address of the real server; None: one without experiments is played.
    """

    def __init__(self, upstream: str | None = None) -> None:
        self.upstream = upstream
        self.num_refused = self.num_let_in = 0
        guard = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                code, text = guard.answer(self.command, self.path, dict(self.headers), body)
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.place = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, bytes]:
        if headers.get("Authorization") != _HEADER:
            self.num_refused += 1
            return 401, b"You are not authenticated."
        self.num_let_in += 1
        if self.upstream is None:
            return 200, b'{"experiments": []}'
        kept = {k: v for k, v in headers.items() if k in ("Content-Type", "Accept")}
        asked = urllib.request.Request(
            f"{self.upstream}{path}", data=body or None, headers=kept, method=method
        )
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
