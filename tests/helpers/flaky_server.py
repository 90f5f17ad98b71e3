"""An HTTP server on loopback that fails as it is told."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class FlakyServer:
    """Serves `files` by path, plain GET alone. The first requests meet what `script` names."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.script: list[int | str] = []
        """A status, "drop" (the connection is lost half-way) or "short" (half of it is given out for the whole)."""
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(f"GET {self.path}")
                outer.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        data = self.files.get(path)
        fault = self.script.pop(0) if self.script else 200 if data is not None else 404
        if data is None or (isinstance(fault, int) and fault != 200):
            handler.send_error(fault if isinstance(fault, int) else 404)
            return
        handler.send_response(200)
        if path.endswith("/"):
            handler.send_header("Content-Type", "text/html")
        if fault != "short":
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data if fault == 200 else data[: len(data) // 2])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
