"""A server in a thread that answers as a test wants, and what a command has written."""

import contextlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def read(path):
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line]


class FakeServer:
    """An OpenAI-compatible server whose `answer(body, attempt)` gives the text of a response, a dict (the whole
    body), bytes (of the body, as they are), or (status, headers); None: the connection is dropped. `attempt`: how
    often the same body was asked before. `seen`: the requests; `at_once`: the most at the same time."""

    def __init__(self, answer):
        self.answer, self.seen, self.headers, self.asked = answer, [], [], Counter()
        self.now = self.at_once = 0
        self.lock, fake = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    key = json.dumps(body, sort_keys=True)
                    attempt = fake.asked[key]
                    fake.asked[key] += 1
                    fake.seen.append((self.path, body))
                    fake.headers.append(self.headers)
                    fake.now += 1
                    fake.at_once = max(fake.at_once, fake.now)
                try:
                    answer = fake.answer(body, attempt)
                finally:
                    with fake.lock:  # before the client has the reply and may ask again
                        fake.now -= 1
                with contextlib.suppress(OSError):  # the client has gone
                    self.reply(answer)

            def reply(self, answer):
                if answer is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                status, headers = answer if isinstance(answer, tuple) else (200, {})
                if isinstance(answer, str):
                    answer = {"choices": [{"message": {"content": answer}, "text": answer}]}
                data = b"{}" if isinstance(answer, tuple) else answer
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(data), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
