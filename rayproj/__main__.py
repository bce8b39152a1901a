"""`python -m rayproj`, which is the command `rayproj`."""

from rayproj.cli import main

raise SystemExit(main())
