"""`python -m harness.figures`."""

import sys

from harness.figures.draw import main

sys.exit(main())
