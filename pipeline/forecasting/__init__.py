"""From a measured run to other clusters."""
