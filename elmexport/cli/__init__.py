"""The command line: one file per command, which parses, calls one library function, and prints.

Nothing heavy is imported at module level here: `elmexport --help` is to answer at once.
"""
