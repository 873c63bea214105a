"""Runs in the environment of xllamacpp: greedy answers to prompts, with or without a drafter.

Reads {"target": GGUF, "drafter": GGUF or null, "kind", "size", "prompts", "tokens", "temperature"} from standard input.
"""

import json
import sys

import xllamacpp


def main() -> None:
    """Prints text, tokens and accepted drafts of every answer."""
    request = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = request["target"]
    params.n_ctx, params.n_parallel, params.warmup, params.cache_prompt = 1024, 1, False, False
    params.cpuparams.n_threads = 1
    if request["drafter"]:
        params.speculative.draft.mparams.path = request["drafter"]
        params.speculative.draft.n_max = request["size"]
        kind = f"COMMON_SPECULATIVE_TYPE_DRAFT_{request['kind'].upper()}"
        params.speculative.types = [getattr(xllamacpp.common_speculative_type, kind)]
    server, found = xllamacpp.Server(params), []
    for prompt in request["prompts"]:
        asked = {"prompt": prompt, "n_predict": request["tokens"], "temperature": request["temperature"], "seed": 1}
        answer = server.handle_completions(asked | {"cache_prompt": False, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
        timings = answer["timings"]
        accepted, count = timings.get("draft_n_accepted", 0), timings["predicted_n"]
        found.append({"text": answer["choices"][0]["text"], "tokens": count, "accepted": accepted})
    print("RESULT " + json.dumps({"version": xllamacpp.__version__, "answers": found}))


main()
