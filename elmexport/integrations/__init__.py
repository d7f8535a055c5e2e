"""What lets other libraries take our artifacts. Each module imports the library it is for, and nothing of ours imports any of them."""
