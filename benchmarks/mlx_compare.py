"""`elmexport mlx` beside mlx-lm's own quantizers (convert, GPTQ, DWQ) on one checkpoint: time, peak memory, size, and KL divergence from the model.

python benchmarks/mlx_compare.py --text held-out.txt                     `tiny`
python benchmarks/mlx_compare.py --model DIR --text a.txt b.txt --only convert,gptq,ours-gptq

All read the same calibration tokens, `--tokens` of the text that elmexport brings; mlx-lm's programs would fetch a text, so their functions are
called with these. KL divergence is measured in one way for all: weights as mlx itself dequantizes them, in one float32 forward pass, against the model in float32,
on texts that nothing was tuned on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import report, run

COLUMNS = {
    "program": "{program}",
    "bits": "{bits:.2f}",
    "MiB": "{mib:.2f}",
    "wall s": "{wall_s:.1f}",
    "peak MiB": "{peak_mib:.0f}",
}
# Writes the checkpoint in Apple's layout in fp16, with tokenizer files, and the calibration tokens; prints the number of parameters.
SAVE = """
import sys, shutil
from pathlib import Path
import numpy as np
import torch
from calibration.text import bundled_text, sample_windows
from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.save import save_checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.exporting import export_checkpoint
from targets.mlx import MlxTarget
model, folder, tokens, window = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
checkpoint = open_checkpoint(model)
save_checkpoint(folder, checkpoint.config, {name: checkpoint.read(name).to(torch.float16) for name in checkpoint.specs})
artifact = export_checkpoint(checkpoint, "mlx", "fp16", out=folder.with_name("companions"), verify=False).path
for path in artifact.glob("*token*"):
    shutil.copyfile(path, folder / path.name)
sample = sample_windows(load_tokenizer(checkpoint.tokenizer_path), [bundled_text("calibration")], "calibration text", tokens=tokens, window=window)
np.save(folder / "calibration.npy", np.asarray(sample.ids))
print(checkpoint.config.parameter_count)
"""
CONVERT = """
import sys
from mlx_lm.convert import convert
convert(sys.argv[1], sys.argv[2], quantize=True, q_bits=4, q_group_size=64)
"""
GPTQ = """
import sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import load, save
source, out = sys.argv[1:]
model, tokenizer, config = load(source, lazy=True, return_config=True)
data = mx.array(np.load(Path(source) / "calibration.npy"))
model.set_dtype(mx.float32)  # it sums Hessians in the model's type; fp16 gave an infinite KL divergence
model, config["quantization"] = gptq_quantize(model, data, 4, 64, 6, 64)
model.set_dtype(mx.float16)
save(out, source, model, tokenizer, config)
"""
# Its own settings, but for the text and its length; a learning rate of 1e-6 as it has by itself.
DWQ = """
import copy, sys
from pathlib import Path
import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.utils import load, quantize_model, save
source, out = sys.argv[1:]
model, tokenizer, config = load(source, return_config=True)
student = copy.deepcopy(model)
_, config = quantize_model(student, config, group_size=64, bits=4)
ids = np.load(Path(source) / "calibration.npy").tolist()
held = max(1, len(ids) // 16)
train, valid = [(row, 0) for row in ids[held:]], [(row, 0) for row in ids[:held]]
optimizer = optimizers.Adam(learning_rate=1e-6, bias_correction=True)
dwq_quantize(student, lambda batch, index, split: model(batch), optimizer, train, valid, 1, len(ids[0]), 123)
save(out, source, student, tokenizer, config)
"""
# Each model against the checkpoint on windows of texts: mean KL divergence of each text, in nats per token. Where a folder has an eps of its own
# (elmexport scales the residual stream so that fp16 holds it), all norms take that, as they do in mlx-lm.
KL = """
import json, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.tokenizer import load_tokenizer
from elmexport.divergence import divergence
from elmexport.graph.forward import KVCaches, forward
from elmexport.models import trace
from tests.targets.mlx.mlx_files import config, weights
model, windows, window, texts, folders = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *map(json.loads, sys.argv[4:])
checkpoint = open_checkpoint(model)
graph, tokenizer = trace(checkpoint.config), load_tokenizer(checkpoint.tokenizer_path)
own = {name: checkpoint.tensor(name).float() for name in checkpoint.specs}

def logits(graph, tensors, part):
    with torch.inference_mode():
        x = torch.tensor(part)[None]
        return forward(graph, lambda spec: tensors[spec.name], x, 0, KVCaches(graph, context=len(part)))[0].numpy()

opened, found = {}, {name: {} for name in folders}
for name, folder in folders.items():
    eps = config(Path(folder)).get("rms_norm_eps", 1e-6)
    nodes = tuple(replace(n, attrs=n.attrs | {"eps": eps}) if n.op == "rms_norm" else n for n in graph.nodes)
    opened[name] = replace(graph, nodes=nodes), {key: torch.from_numpy(np.array(value)) for key, value in weights(Path(folder)).items()}
for text in texts:
    ids = tokenizer.encode(Path(text).read_text(encoding="utf-8")[: 12 * windows * window], bos=False)
    sums = dict.fromkeys(folders, 0.0)
    for start in range(0, windows * window, window):
        part = ids[start : start + window]
        expected = logits(graph, own, part)
        for name, model in opened.items():
            sums[name] += divergence(expected, logits(*model, part)).kl_mean / windows
    for name, value in sums.items():
        found[name][Path(text).name] = value
print(json.dumps(found))
"""
# GPTQ's files of mlx-lm hold 4 bits in groups of 64, the embedding in 6 bits: a recipe of the same size.
SAME = """name = "same-size"
words = "4-bit groups of 64, the embedding 6-bit"
activations = "fp16"
norms = "fp16"
scales = "fp16"
fallback = "fp16"
max_self_check_kl = 2

[[rule]]
roles = ["embedding", "lm_head"]
scheme = "int6-block64"

[[rule]]
scheme = "{scheme}"
"""
THEIRS = {"convert": CONVERT, "gptq": GPTQ, "dwq": DWQ}
OURS = {
    "ours-mse": ("int4-block64", "mse"),
    "ours-gptq": ("int4-block64", "gptq"),
    "ours-asym-mse": ("int4-asym-block64", "mse"),
    "ours-asym-gptq": ("int4-asym-block64", "gptq"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="held out from everything")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration")
    parser.add_argument("--window", type=int, default=256, help="tokens read at once, by all")
    parser.add_argument("--windows", type=int, default=16, help="of each text that KL divergence is measured on")
    parser.add_argument("--only", metavar="A,B", help=f"of {', '.join((*THEIRS, *OURS))}")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    chosen = (*THEIRS, *OURS) if given.only is None else given.only.split(",")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "source"
        parameters = int(_python(SAVE, given.model, str(source), str(given.tokens), str(given.window)).stdout.split()[-1])
        for name in chosen:
            print(name, file=sys.stderr, flush=True)
            out = folder / name
            if name in THEIRS:
                done = _python(THEIRS[name], str(source), str(out))
            else:
                scheme, method = OURS[name]
                recipe = folder / f"{name}.toml"
                recipe.write_text(SAME.format(scheme=scheme), encoding="utf-8")
                program = "import sys; from elmexport.cli.main import main; main()"
                options = ["--quant", str(recipe), "--method", method, "--out", str(out), "--no-verify"]
                if method == "gptq":
                    options += ["--tokens", str(given.tokens)]
                done = _python(program, "mlx", "--model", str(source), *options)
            size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
            rows.append(
                {
                    **{"program": name, "bits": 8 * size / parameters, "mib": size / 2**20},
                    **{"wall_s": done.wall_s, "peak_mib": done.peak_bytes / 2**20},
                }
            )
        folders = json.dumps({name: str(folder / name) for name in chosen})
        measured = _python(KL, str(source), str(given.windows), str(given.window), json.dumps(given.text), folders).stdout
    divergences = json.loads(measured.splitlines()[-1])
    names = [Path(text).name for text in given.text]
    for row in rows:
        row |= {f"kl_{number}": divergences[row["program"]][name] for number, name in enumerate(names)}
        row["texts"] = names
    report("mlx_compare", rows, COLUMNS | {f"KL {name}": f"{{kl_{i}:.5f}}" for i, name in enumerate(names)}, as_json=given.json)
    return 0


def _python(program: str, *arguments: str) -> Any:
    done = run(sys.executable, "-c", program, *arguments)
    if done.exit_code:
        sys.exit(f"a program ended with {done.exit_code}:\n{done.stderr[-3000:]}")
    return done


if __name__ == "__main__":
    raise SystemExit(main())
