"""`optimum-cli export openelm`: elmexport's ONNX export as a command of optimum.

optimum looks for commands in the namespace `optimum.commands.register`, to which any package may add a file: a wheel of elmexport holds this
one there. It is read whenever `optimum-cli` starts, so nothing heavy may be imported here.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import ClassVar

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

_PASSED_ON = ("quant", "ops", "context", "method", "tokenizer", "revision")


class OpenELMExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """`elmexport onnx` under the names that optimum's exporters give their options."""

    COMMAND: ClassVar[CommandInfo] = CommandInfo(name="openelm", help="Export OpenELM to ONNX, quantized and checked, with elmexport.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("-m", "--model", required=True, help="Hub id, checkpoint folder, or a name from `elmexport models`.")
        parser.add_argument("output", help="Folder to write.")
        parser.add_argument("--quant", help="int4 (default), int8, fp16, …: see `elmexport onnx --help`, as for all that follows.")
        parser.add_argument("--ops", help="fast (default) or standard.")
        parser.add_argument("--context", help="Tokens that the cache can hold; the model's maximum by default.")
        parser.add_argument("--method", help="How codes are found: mse (default), gptq, …")
        parser.add_argument("--tokenizer", help="tokenizer.model or tokenizer.json, a folder or hub id that has one, or none.")
        parser.add_argument("--revision", help="Branch, tag or commit of a model on the hub.")
        parser.add_argument("--force", action="store_true", help="Replace an artifact that is already there.")

    def run(self) -> None:
        """Ends the process, with elmexport's exit code."""
        from elmexport.cli.main import main

        arguments = ["onnx", "--model", self.args.model, "--out", self.args.output]
        for option in _PASSED_ON:
            value = getattr(self.args, option)
            if value is not None:
                arguments += [f"--{option}", value]
        main([*arguments, "--force"] if self.args.force else arguments)


REGISTER_COMMANDS = [(OpenELMExportCommand, ExportCommand)]
