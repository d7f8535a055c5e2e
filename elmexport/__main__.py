"""`python -m elmexport` is `elmexport`."""

import sys

from elmexport.cli.main import main

sys.exit(main())
