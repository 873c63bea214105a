"""Runs in the environment of xllamacpp: llama.cpp's HTTP server, until its standard input ends.

Reads {"target": GGUF, "context": tokens of a request, "slots": requests at a time} from the first line of it.
"""

import json
import sys

import xllamacpp


def main() -> None:
    """Prints the address."""
    request = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = request["target"]
    params.n_parallel, params.warmup, params.port = request["slots"], False, 0
    params.n_ctx = request["context"] * request["slots"]
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    print("RESULT " + json.dumps({"version": xllamacpp.__version__, "url": server.listening_address}), flush=True)
    sys.stdin.read()


main()
