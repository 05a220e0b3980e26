"""Who carries cells: one file an engine, one YAML of its name in conf/engine (see `harness.run.workers.Engine`)."""
