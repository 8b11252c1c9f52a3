"""``python -m warpdecode`` is the same as the ``warpdecode`` command."""

import sys

from .cli import main

sys.exit(main())
