"""Continue a prompt with a GGUF artifact, in llama.cpp: pip install llama-cpp-python

python generate.py OpenELM-450M-gguf-int4 "Once upon a time" 40
"""

import sys
from pathlib import Path

from llama_cpp import Llama

folder, prompt, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model = Llama(str(next(folder.glob("*.gguf"))), n_ctx=0, verbose=False)  # n_ctx=0: the context that the file names
answer = model.create_completion(prompt, max_tokens=count, temperature=0)
print(prompt + answer["choices"][0]["text"])
