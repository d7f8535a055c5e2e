"""The tasks: lm-eval's own definitions over rows from the hub or a local folder, and the bundled `cloze`."""
