"""Task heads: pure functions from the raw outputs of one example to its answer, one file per task."""
