"""From pictures to verified shards."""
