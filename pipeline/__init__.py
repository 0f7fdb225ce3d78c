"""squeezewire: SqueezeNet over DDP, every byte accounted for."""
