"""What each command may be told: frozen dataclasses whose field names are the configuration's keys.

Whoever imports a schema has Hydra know the models that `model=` may name.
"""

from pipeline.config.registry import register

register()
