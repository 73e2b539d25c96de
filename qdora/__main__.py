"""`python -m qdora`."""

import sys

from qdora.cli import main

sys.exit(main())
