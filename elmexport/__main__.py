"""`python -m elmexport` is `elmexport`."""

from elmexport.cli.main import main

main()
