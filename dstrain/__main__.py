"""`python -m dstrain`, the same as `dstrain`."""

import sys

from dstrain.cli import main

sys.exit(main())
