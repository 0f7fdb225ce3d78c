"""What each command may be told: frozen dataclasses whose field names are the configuration's keys."""
