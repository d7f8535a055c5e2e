"""Names that an artifact's writer (`targets`) and its reader (`elmexport.runtimes`) share: one module for each format.

Nothing here imports a format's library.
"""
