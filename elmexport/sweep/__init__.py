"""Sweeps: a plan's models x formats x quantizations x methods, each combination exported and evaluated by a process of its own."""
