from elmexport.api import OpenArtifact, evaluate, export, open

__version__: str
__all__ = ["OpenArtifact", "__version__", "evaluate", "export", "open"]
