"""Adapters of our artifacts for other libraries. Each module imports the library it is for, and nothing of ours imports any of them."""
