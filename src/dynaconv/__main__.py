"""`python -m dynaconv`: the command line where the script `dynaconv` is not on the path."""

import sys

from dynaconv.cli import main

sys.exit(main())
