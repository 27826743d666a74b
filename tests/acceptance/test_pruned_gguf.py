"""A pruned SmolLM2 with sizes of its own in every layer, two of them without heads or neurons, in llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from llmtool.prune.export import gguf
from llmtool.prune.model import Loaded, find, load_model
from llmtool.prune.remove import remove, sizes_after
from llmtool.prune.units import Kept

PROMPT = "The capital of France is the city of"
# Its own process: llama.cpp's threads end with it.
RUN = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
server = xllamacpp.Server(params)
asked = {"prompt": sys.argv[2], "n_predict": 16, "temperature": 0, "n_probs": 5, "ignore_eos": True}
answer = server.handle_completions(asked)
print(json.dumps(answer["choices"][0]["logprobs"]["content"]))
"""


def kept_units(loaded: Loaded) -> Kept:
    kept: list[tuple[int, ...]] = []
    for s in loaded.sublayers:
        if s.layer in (5, 11):
            kept.append(())
        elif s.kind == "mlp":
            kept.append(tuple(range(s.layer * 16, s.num_units)))
        else:
            kept.append((tuple(range(6)), (0, 2, 3, 5, 6, 8), tuple(range(9)))[s.layer % 3])
    return tuple(kept)


def test_llama_cpp_says_what_transformers_says(tmp_path: Path) -> None:
    loaded = load_model(find("smollm2-135m"))
    kept = kept_units(loaded)
    small = remove(loaded, loaded.model, kept)
    gguf.write(loaded, small, sizes_after(loaded.sublayers, kept), tmp_path / "m.gguf")
    ids = loaded.tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    rounded = small.half().float()
    out = rounded.generate(ids, max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(ids))
    expected = out[0, ids.shape[1] :].tolist()
    with torch.no_grad():
        logprobs = rounded(ids).logits[0, -1].log_softmax(-1)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "m.gguf"), PROMPT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tokens = json.loads(done.stdout.strip().splitlines()[-1])
    assert [t["id"] for t in tokens] == expected
    for candidate in tokens[0]["top_logprobs"]:
        assert abs(candidate["logprob"] - float(logprobs[candidate["id"]])) < 0.03
