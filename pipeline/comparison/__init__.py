"""Several models under the same conditions, one report. It starts commands and reads runs; it never imports training."""
