"""What a run writes as it goes: metrics.jsonl and its copy on W&B."""
