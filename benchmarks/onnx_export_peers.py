"""Export of 450M to 4-bit ONNX from a stored checkpoint, beside the peers' exporters on a Llama of as many parameters.

python benchmarks/onnx_export_peers.py
python benchmarks/onnx_export_peers.py --optimum /path/to/python    with optimum too, in the environment of that Python (optimum-onnx)

The peers do not take OpenELM, whose layers differ. Theirs is a Llama with OpenELM-450M's width, depth, vocabulary and tied embedding, its
FFN as wide as makes the parameters equal; weights are random and stored in fp16. Each command runs in a fresh process:

- `elmexport onnx --quant int4`, without and with its checks (the peers check nothing);
- onnxruntime-genai's model builder, `-p int4 -e cpu`;
- optimum's exporter to fp32 ONNX, then onnxruntime's `MatMulNBitsQuantizer` (4 bits, blocks of 32) on what it wrote: peak of the larger process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf_time import SAVE
from measure import Run, finished, report, run, run_python

COLUMNS = {
    "exporter": "{exporter}",
    "wall s": "{wall_s:.1f}",
    "cpu s": "{cpu_s:.1f}",
    "peak MiB": "{peak_mib:.0f}",
    "artifact MiB": "{artifact_mib:.0f}",
    "cpu ratio": "{cpu_ratio:.2f}",
    "memory ratio": "{memory_ratio:.2f}",
}
# A Llama of the same size; argv: the model, the folder. Its FFN has three matrices of the width.
LLAMA = """
import sys
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from elmexport.checkpoint import open_checkpoint

config = open_checkpoint(sys.argv[1], random_weights=0).config
dims, vocab = config.dims, config.dims.vocab_size
width, depth = config.model_dim, len(dims.layers)
heads = width // 64
attention = 2 * width * width + 2 * width * 64 * (heads // 4)
ffn = round((config.parameter_count - vocab * width) / depth - attention) // (3 * width) // 64 * 64
torch.manual_seed(0)
made = LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=depth, num_attention_heads=heads,
                   num_key_value_heads=heads // 4, max_position_embeddings=2048, tie_word_embeddings=True, torch_dtype="float16")
model = LlamaForCausalLM(made).to(torch.float16)
model.save_pretrained(sys.argv[2])
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2").save_pretrained(sys.argv[2])
print(sum(p.numel() for p in model.parameters()))
"""
QUANTIZE = """
import sys
import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

quantizer = MatMulNBitsQuantizer(onnx.load(sys.argv[1]), bits=4, block_size=32, is_symmetric=True)
quantizer.process()
quantizer.model.save_model_to_file(sys.argv[2], use_external_data_format=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="450M")
    parser.add_argument("--optimum", metavar="PYTHON", help="a Python that has optimum-onnx; without it, optimum is left out")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where checkpoints and artifacts go for a while")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        own, llama, out = (folder / name for name in (f"OpenELM-{given.model}", "llama", "out"))
        finished(run_python("-c", SAVE, given.model, str(own)))
        print(
            f"the peers' model has {finished(run_python('-c', LLAMA, given.model, str(llama))).stdout.strip()} parameters", file=sys.stderr
        )
        ours = ("-m", "elmexport", "onnx", "--model", str(own), "--quant", "int4", "--out", str(out))
        exporters: dict[str, list[tuple[str, ...]]] = {
            "elmexport, export alone": [(sys.executable, *ours, "--no-verify", "--calibrate", "none")],
            "elmexport, as it comes": [(sys.executable, *ours)],
            "onnxruntime-genai builder": [
                (
                    *(sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(llama), "-o", str(out)),
                    *("-p", "int4", "-e", "cpu", "-c", str(folder / "cache")),
                )
            ],
        }
        if given.optimum:
            exported = folder / "exported"
            exporters["optimum, then MatMulNBitsQuantizer"] = [
                (
                    given.optimum,
                    "-m",
                    "optimum.commands.optimum_cli",
                    "export",
                    "onnx",
                    "--model",
                    str(llama),
                    "--task",
                    "text-generation",
                    str(exported),
                ),
                (given.optimum, "-c", QUANTIZE, str(exported / "model.onnx"), str(out / "model.onnx")),
            ]
        for exporter, commands in exporters.items():
            print(exporter, file=sys.stderr, flush=True)
            out.mkdir()
            if exporter.startswith("elmexport"):
                out.rmdir()
            done = [finished(run(*command)) for command in commands]
            rows.append(_row(exporter, done, out, rows))
            shutil.rmtree(out)
    report("onnx_export_peers", rows, COLUMNS, as_json=given.json)
    return 0


def _row(exporter: str, done: list[Run], out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    cpu, peak = sum(one.cpu_s for one in done), max(one.peak_bytes for one in done) / 2**20
    first = rows[0] if rows else {"cpu_s": cpu, "peak_mib": peak}
    return {
        "exporter": exporter,
        "wall_s": round(sum(one.wall_s for one in done), 2),
        "cpu_s": round(cpu, 2),
        "peak_mib": round(peak, 1),
        "artifact_mib": round(sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20, 1),
        "cpu_ratio": round(cpu / first["cpu_s"], 2),
        "memory_ratio": round(peak / first["peak_mib"], 2),
    }


if __name__ == "__main__":
    sys.exit(main())
