"""python -m portable_amp."""

from portable_amp.cli import main

raise SystemExit(main())
