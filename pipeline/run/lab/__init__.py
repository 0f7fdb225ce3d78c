"""A cluster on one machine, of network namespaces."""
