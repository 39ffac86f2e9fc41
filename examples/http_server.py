"""A stateless server: clients send the whole conversation, and the model computes only its new part.

python examples/http_server.py [model.gguf [port]]
curl --data-binary $'User: hello\\nAssistant:' http://127.0.0.1:PORT/

Without a port, the server chooses a free one and prints it. Ctrl-C stops the server.
"""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from _model import model_file

import erllama

_MAX_BYTES = 1 << 20  # limit of a conversation; longer ones are refused before they are read
_STATUS: dict[type, int] = {
    erllama.PromptError: 400,
    erllama.PromptTooLong: 413,
    erllama.QueueFull: 503,
    erllama.DeadlineExceeded: 504,
}


class Handler(BaseHTTPRequestHandler):
    model: erllama.Model

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        if not 0 <= length <= _MAX_BYTES:
            self.send_error(413)
            return
        prompt = self.rfile.read(length).decode("utf-8", "replace")
        try:
            reply = self.model.complete(prompt, max_tokens=32, temperature=0, stop="\nUser:", timeout=60)
        except erllama.Error as error:
            self.send_error(_STATUS.get(type(error), 500), explain=str(error))
            return
        hits = self.model.cache.counters()["hits_longest_prefix"]
        print(f"{reply.cache.tokens} prompt tokens from the cache; hits_longest_prefix: {hits}", flush=True)
        body = reply.text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Suppress the default log line: `do_POST` prints more details."""


def main() -> None:
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with model_file() as path, erllama.Cache() as cache, erllama.load_model(path, cache=cache) as model:
        Handler.model = model
        with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
            print(f"http://127.0.0.1:{server.server_port}/", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("stopped")


if __name__ == "__main__":
    main()
