"""From a command line to finished cells: overrides, checks, ids, the plan, the session, workers."""
