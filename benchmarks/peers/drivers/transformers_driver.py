"""transformers' `generate` in process, bfloat16: one request alone, more of them in static batches.

python transformers_driver.py MODEL_DIR [--batch 16]

A batch waits for its longest answer, so requests are put together by output length, which is kinder than the order
in which they come. Only tokens that were asked for count.
"""

from __future__ import annotations

import argparse
import os
import time

from protocol import Record, Request, protocol_stream, record, serve


def main() -> None:
    stream = protocol_stream()
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.eval()
    model.generation_config.eos_token_id = None  # lengths are exact

    class Clock(BaseStreamer):
        """Notes when the tokens of each step come; the prompt comes first."""

        def __init__(self) -> None:
            self.moments: list[float] = []
            self.prompt = True

        def put(self, value: torch.Tensor) -> None:
            if not self.prompt:
                self.moments.append(time.perf_counter())
            self.prompt = False

        def end(self) -> None:
            pass

    def generate(group: list[Request]) -> list[tuple[list[float], list[int]]]:
        """Moments and tokens of each of the requests, run as one left-padded batch."""
        width = max(len(r["prompt"]) for r in group)
        out = max(r["max_tokens"] for r in group)
        prompts = torch.zeros(len(group), width, dtype=torch.long)  # [batch, width]
        mask = torch.zeros_like(prompts)
        for row, request in enumerate(group):
            prompts[row, width - len(request["prompt"]) :] = torch.tensor(request["prompt"])
            mask[row, width - len(request["prompt"]) :] = 1
        clock = Clock()
        with torch.inference_mode():
            result = model.generate(
                prompts,
                attention_mask=mask,
                max_new_tokens=out,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
        tokens = result[:, width:].tolist()
        wanted = [r["max_tokens"] for r in group]
        return [(clock.moments[:n], row[:n]) for n, row in zip(wanted, tokens, strict=True)]

    def run(requests: list[Request]) -> list[Record]:
        if any(r["at"] for r in requests):
            raise ValueError("generate takes no requests while it runs")
        origin = time.perf_counter()
        order = sorted(range(len(requests)), key=lambda i: requests[i]["max_tokens"])
        done: dict[int, Record] = {}
        for at in range(0, len(order), args.batch):
            group = order[at : at + args.batch]
            for i, (moments, tokens) in zip(group, generate([requests[i] for i in group]), strict=True):
                done[i] = record(0.0, [m - origin for m in moments], tokens)
        return [done[i] for i in range(len(requests))]

    serve(stream, run)


if __name__ == "__main__":
    main()
