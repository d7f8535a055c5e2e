"""The MIL executor: runs Core ML packages (mlprogram) on any machine, Linux included.

`program` reads a package, `weights` and `constexpr` give its constants, `ops_*` hold the operations, `plan` prepares a function, `executor`
runs it. It is a numerical reference, not a model of a chip's numerics. `MilModel` is imported from `elmexport.mil.executor`.
"""
