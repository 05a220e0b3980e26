"""`python -m harness.claims`."""

from harness.claims.judge import main

raise SystemExit(main())
