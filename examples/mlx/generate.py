"""Continue a prompt with an MLX artifact, in mlx-lm: pip install mlx-lm (on Linux also 'mlx[cpu]')

python generate.py OpenELM-450M-mlx-int4 "Once upon a time" 40
"""

import sys

from mlx_lm import generate, load

folder, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, tokenizer = load(folder)
print(generate(model, tokenizer, prompt, max_tokens=count))
