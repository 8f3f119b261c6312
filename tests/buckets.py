"""A server of buckets on this machine, which speaks as much of Google Cloud Storage's protocol as
TensorStore does, keeps to conditions on generations, and fails when it is asked to."""

import contextlib
import http.server
import itertools
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator

_PAGE = 7  # names that a listing has at once


class Buckets:
    """Attributes:
    environment: variables by which TensorStore finds the server, also in other processes.
    objects: by bucket and name, generation and content.
    trouble: asked before every request, by method and the name of an object ("" for a listing):
        the status to answer with instead, negative to do what is asked and then answer so, or 0.
    requests: methods and names of all requests.
    """

    def __init__(self):
        self.objects: dict[str, dict[str, tuple[int, bytes]]] = {}
        self.trouble: Callable[[str, str], int] = lambda method, name: 0
        self.requests: list[tuple[str, str]] = []
        self._generations = itertools.count(1)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{self._server.server_port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
        }

    def make(self) -> str:
        """A new, empty bucket: gs://NAME."""
        name = f"bucket-{len(self.objects)}"
        self.objects[name] = {}
        return f"gs://{name}"

    @contextlib.contextmanager
    def troubled(self, trouble: Callable[[str, str], int]) -> Iterator[None]:
        """Answers otherwise for a while; see `trouble`."""
        self.trouble = trouble
        try:
            yield
        finally:
            self.trouble = lambda method, name: 0

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()

    def answer(
        self, method: str, bucket: str, name: str, asked: dict[str, str], body: bytes
    ) -> tuple[int, dict, bytes]:
        """Status, headers and content of the answer to a request."""
        with self._lock:
            self.requests.append((method, name))
            status = self.trouble(method, name)
            if status > 0:
                return status, {}, b""
            if bucket not in self.objects:
                return 404, {}, json.dumps({"error": {"code": 404}}).encode()
            answered = getattr(self, f"_{method}")(self.objects[bucket], name, asked, body)
            return (-status, {}, b"") if status < 0 else answered

    def _list(self, objects, name, asked, body):
        after = asked.get("pageToken", "")
        start, end = asked.get("startOffset", ""), asked.get("endOffset", "")
        found = sorted(key for key in objects if key >= start and (not end or key < end))
        found = [key for key in found if key > after]
        page: dict = {"items": [_about(key, objects[key]) for key in found[:_PAGE]]}
        if len(found) > _PAGE:
            page["nextPageToken"] = found[_PAGE - 1]
        return 200, {}, json.dumps(page).encode()

    def _read(self, objects, name, asked, body):
        generation, content = objects.get(name, (0, b""))
        if not generation:
            return 404, {}, b""
        if not _holds(asked, generation):
            return 412, {}, b""
        if asked.get("ifGenerationNotMatch") == str(generation):
            return 304, {}, b""
        if asked.get("alt") == "json":
            return 200, {}, json.dumps(_about(name, objects[name])).encode()
        return 200, {"x-goog-generation": str(generation)}, content

    def _write(self, objects, name, asked, body):
        if not _holds(asked, objects.get(name, (0, b""))[0]):
            return 412, {}, b""
        objects[name] = next(self._generations), body
        return 200, {}, json.dumps(_about(name, objects[name])).encode()

    def _delete(self, objects, name, asked, body):
        if name not in objects:
            return 404, {}, b""
        if not _holds(asked, objects[name][0]):
            return 412, {}, b""
        del objects[name]
        return 204, {}, b""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # connections that TensorStore opens at once


def _holds(asked: dict[str, str], generation: int) -> bool:
    """Whether an object is of the generation that a request asks for, 0 where there is none."""
    return asked.get("ifGenerationMatch", str(generation)) == str(generation)


def _about(name: str, found: tuple[int, bytes]) -> dict:
    generation, content = found
    return {"name": name, "generation": str(generation), "size": str(len(content))}


def _handler(buckets: Buckets) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # one packet for head and content

        def log_message(self, *arguments):
            pass

        def _answer(self, of_object: str, of_all: str):
            url = urllib.parse.urlsplit(self.path)
            asked = dict(urllib.parse.parse_qsl(url.query))
            bucket, _, name = url.path.partition("/b/")[2].partition("/o")
            name = asked.get("name") or urllib.parse.unquote(name.removeprefix("/"))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            method = of_object if name else of_all
            status, headers, content = buckets.answer(method, bucket, name, asked, body)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            if status not in (204, 304):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self._answer("read", "list")

        def do_POST(self):
            self._answer("write", "write")

        def do_DELETE(self):
            self._answer("delete", "delete")

    return Handler
