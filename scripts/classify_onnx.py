"""Classify texts with a folder that export_onnx.py wrote: arguments, or lines of standard input.

Needs onnxruntime and tokenizers alone; copy this file wherever the folder goes.

  python classify_onnx.py FOLDER "The plot is witty ."
  python classify_onnx.py FOLDER --int8 < lines.txt
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what export_onnx.py wrote")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="text to classify")
    parser.add_argument("--int8", action="store_true", help="use model.int8.onnx")
    options = parser.parse_intermixed_args()
    path = options.folder / ("model.int8.onnx" if options.int8 else "model.onnx")
    try:
        about = json.loads((options.folder / "classifier.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_str(
            (options.folder / "tokenizer.json").read_text(encoding="utf-8")
        )
        session = onnxruntime.InferenceSession(path.read_bytes())
    except Exception as error:  # each library has its own
        if options.int8 and not path.is_file() and path.with_name("model.onnx").is_file():
            parser.exit(2, f"error: {options.folder} holds no {path.name}; leave out --int8\n")
        parser.exit(2, f"error: {options.folder} is no folder of export_onnx.py ({error})\n")
    if about["max_length"] is not None:
        tokenizer.enable_truncation(about["max_length"])
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    try:
        for text in options.texts or (line.rstrip("\r\n") for line in sys.stdin):
            answer = classify(text, session, tokenizer, about)
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    except BrokenPipeError:  # the reader has seen enough; closing the pipe at exit must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        sys.exit(130)


def classify(
    text: str, session: onnxruntime.InferenceSession, tokenizer: Tokenizer, about: dict[str, Any]
) -> dict[str, Any]:
    """Text, label and probability; `about` is what classifier.json says."""
    # Lone surrogates, which no tokenizer takes, become U+FFFD, as in training.
    ids = tokenizer.encode(re.sub("[\ud800-\udfff]", "\ufffd", text)).ids
    input_ids = np.array([ids or [about["empty_token_id"]]], dtype=np.int64)  # (1, T)
    inputs = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
    probabilities = session.run(["probabilities"], inputs)[0][0]  # (K,)
    answer = int(probabilities.argmax())
    result = {"text": text, "label": about["labels"][answer]}
    result["probability"] = round(float(probabilities[answer]), 6)
    if about["multi_label"]:
        pairs = zip(about["labels"], probabilities, strict=True)
        result["labels"] = [name for name, p in pairs if p >= 0.5]
    return result


if __name__ == "__main__":
    main()
