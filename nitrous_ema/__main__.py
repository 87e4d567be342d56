"""Entry of ``python -m nitrous_ema``, which is the same as the command ``nitrous-ema``."""

from __future__ import annotations

import sys

from nitrous_ema.cli.program import main

sys.exit(main())
