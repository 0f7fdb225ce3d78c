"""What a shard is: the manifest, the index of its members, labels, and shards that others made."""
