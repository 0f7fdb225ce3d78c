"""Several models under the same conditions, one report: it starts commands and reads runs, and imports no training."""
