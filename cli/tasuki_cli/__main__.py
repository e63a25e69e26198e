"""`python -m tasuki_cli` is the `tasuki` command."""

import sys

from tasuki_cli.main import main

sys.exit(main())
