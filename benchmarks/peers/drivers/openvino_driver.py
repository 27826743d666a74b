"""openvino-genai in process: its continuous-batching pipeline on the CPU, prefix caching on.

python openvino_driver.py MODEL_DIR [--cache GIB] [--tokens TOKENS_A_STEP] [--lookup DRAFT_TOKENS]
"""

from __future__ import annotations

import argparse
import itertools
import time

from protocol import Record, Request, protocol_stream, record, serve


def main() -> None:
    stream = protocol_stream()
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--cache", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--lookup", type=int, default=0, help="draft so many tokens a step from the prompt")
    args = parser.parse_args()

    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = args.cache
    scheduler.max_num_batched_tokens = args.tokens
    scheduler.enable_prefix_caching = True
    properties = {"prompt_lookup": True} if args.lookup else {}
    pipe = genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", properties)
    ids = itertools.count()

    def settings(max_tokens: int) -> genai.GenerationConfig:
        config = genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        if args.lookup:
            config.num_assistant_tokens, config.max_ngram_size = args.lookup, 4
        return config

    def run(requests: list[Request]) -> list[Record]:
        origin = time.perf_counter()
        todo = sorted(range(len(requests)), key=lambda i: requests[i]["at"])
        running: dict[int, tuple[object, float, list[float], list[int]]] = {}
        done: dict[int, Record] = {}
        while todo or running:
            now = time.perf_counter() - origin
            if not running and requests[todo[0]]["at"] > now:
                time.sleep(requests[todo[0]]["at"] - now)
                continue
            while todo and requests[todo[0]]["at"] <= now:
                i = todo.pop(0)
                prompt = ov.Tensor(np.array([requests[i]["prompt"]], dtype=np.int64))
                start = time.perf_counter() - origin
                handle = pipe.add_request(next(ids), prompt, settings(requests[i]["max_tokens"]))
                running[i] = (handle, start, [], [])
            pipe.step()
            now = time.perf_counter() - origin
            for i, (handle, start, moments, tokens) in list(running.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        tokens += output.generated_ids
                        moments += [now] * len(output.generated_ids)
                if len(tokens) >= requests[i]["max_tokens"]:
                    done[i] = record(start, moments, tokens)
                    del running[i]
                elif str(handle.get_status()).endswith(("FINISHED", "IGNORED", "CANCEL", "STOP")):
                    raise RuntimeError(f"a request ended after {len(tokens)} tokens: {handle.get_status()}")
        while pipe.has_non_finished_requests():
            pipe.step()
        return [done[i] for i in range(len(requests))]

    serve(stream, run)


if __name__ == "__main__":
    main()
