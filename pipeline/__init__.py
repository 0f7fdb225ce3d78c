"""Train SqueezeNet with DDP and account for every byte: the commands on top, the rooms below."""
