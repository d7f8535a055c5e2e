"""Wall time and peak memory of `elmexport gguf` beside llama.cpp's converter and quantizer, on the same checkpoint of random weights.

python benchmarks/gguf_time.py                                   450M to Q4_0 and Q4_K_M
python benchmarks/gguf_time.py --model 3B --quants q4_k_m --ours     ours alone
python benchmarks/gguf_time.py --model DIR                           shapes of its config.json, with the tokenizer that lies beside it
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import Run, report, run

COLUMNS = {
    "program": "{program}",
    "quant": "{quant}",
    "wall s": "{wall_s:.1f}",
    "cpu s": "{cpu_s:.1f}",
    "peak MiB": "{peak_mib:.0f}",
    "written MiB": "{written_mib:.0f}",
    "same bytes": "{same}",
}
# Writes a checkpoint in Apple's layout, in a process of its own. The tokenizer is `tiny`'s, so that either program has one to write.
SAVE = """
import json, shutil, sys
from pathlib import Path
from elmexport.checkpoint import open_checkpoint
from elmexport.checkpoint.save import save_checkpoint
from elmexport.models.openelm.catalog import TINY_FOLDER
source, folder = open_checkpoint(sys.argv[1], random_weights=0), Path(sys.argv[2])
save_checkpoint(folder, source.config, {name: source.read(name) for name in source.specs})
given = Path(sys.argv[1])
if given.is_dir():
    for file in given.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    sys.exit()
shutil.copyfile(TINY_FOLDER / "tokenizer.model", folder / "tokenizer.model")
described = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
(folder / "tokenizer_config.json").write_text(json.dumps(described))
config = json.loads((folder / "config.json").read_text())
(folder / "config.json").write_text(json.dumps(config | {"unk_token_id": 0}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="450M")
    parser.add_argument("--quants", nargs="*", default=["q4_0", "q4_k_m"], metavar="QUANT")
    parser.add_argument("--ours", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the checkpoint and the files go for a while")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        model = folder / (Path(given.model).name if Path(given.model).is_dir() else f"OpenELM-{given.model}")
        _require(run(sys.executable, "-c", SAVE, given.model, str(model)))
        for quant in given.quants:
            print(f"{given.model} {quant}", file=sys.stderr, flush=True)
            out = folder / "ours"
            done = run(
                *(sys.executable, "-m", "elmexport", "gguf", "--model", str(model), "--quant", quant, "--out", str(out), "--no-verify")
            )
            (file,) = out.glob("*.gguf")
            rows.append(_row("elmexport", quant, [done], file.stat().st_size))
            if not given.ours:
                rows.append(_llama_cpp(folder, model, quant, file))
            shutil.rmtree(out)
    report("gguf_time", rows, COLUMNS, as_json=given.json)
    return 0


def _llama_cpp(folder: Path, model: Path, quant: str, ours: Path) -> dict[str, Any]:
    """llama.cpp's way: convert to BF16, the checkpoint's own type, then quantize with as many threads as we use."""
    from tests.clients.llama_cpp_tools import CONVERTER, llama_cpp_tools

    tools = llama_cpp_tools()
    whole, file = folder / "whole.gguf", folder / "theirs.gguf"
    convert = run(sys.executable, str(tools.source / CONVERTER), str(model), "--outfile", str(whole), "--outtype", "bf16")
    _require(convert)
    quantize = run(str(tools.programs / "llama-quantize"), str(whole), str(file), quant, str(os.cpu_count()))
    row = _row("llama.cpp", quant, [convert, quantize], whole.stat().st_size + file.stat().st_size)
    row["same"] = "yes" if file.read_bytes() == ours.read_bytes() else "no"
    whole.unlink()
    file.unlink()
    return row


def _row(program: str, quant: str, runs: list[Run], written: int) -> dict[str, Any]:
    for one in runs:
        _require(one)
    return {
        "program": program,
        "quant": quant,
        "wall_s": sum(one.wall_s for one in runs),
        "cpu_s": sum(one.cpu_s for one in runs),
        "peak_mib": max(one.peak_bytes for one in runs) / 2**20,
        "written_mib": written / 2**20,
        "same": "",
    }


def _require(done: Run) -> None:
    if done.exit_code:
        sys.exit(f"a command ended with {done.exit_code}:\n{done.stderr}")


if __name__ == "__main__":
    raise SystemExit(main())
