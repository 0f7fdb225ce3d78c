"""Networks: our own SqueezeNet, the registry it shares with torchvision's, what each costs, and foreign weights."""
