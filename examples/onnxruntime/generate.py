"""Continue a prompt with an ONNX artifact, in plain onnxruntime: pip install onnxruntime tokenizers numpy

python generate.py OpenELM-450M-onnx-int4 "Once upon a time" 40
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, prompt, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # puts the token that begins texts before the prompt
ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
ends = set(ends) if isinstance(ends, list) else {ends}

options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # errors only: a remark on `logits_to_keep` means nothing here
session = onnxruntime.InferenceSession(next(folder.glob("onnx/*.onnx")), options)
names = [output.name for output in session.get_outputs()]
types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# An empty cache. Layers differ in their number of heads, so the shape is read off each input: [batch, heads, past, head_dim].
cache = {
    past.name: np.zeros((1, past.shape[1], 0, past.shape[3]), types[past.type])
    for past in session.get_inputs()
    if past.name.startswith("past_key_values.")
}

tokens, read = tokenizer.encode(prompt).ids, 0
start = len(tokens)
while len(tokens) < start + count:
    inputs = {
        "input_ids": np.array([tokens[read:]]),  # the prompt first, then a token at a time
        "attention_mask": np.ones((1, len(tokens)), np.int64),
    }
    outputs = dict(zip(names, session.run(names, inputs | cache), strict=True))
    cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
    read = len(tokens)
    token = int(outputs["logits"][0, -1].argmax())  # greedy; draw from softmax(logits / temperature) for variety
    if token in ends:
        break
    tokens.append(token)
print(tokenizer.decode(tokens))
