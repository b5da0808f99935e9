"""`import swathe.auto` before a training script's own imports: models are patched as they are made.

The same as `import swathe; swathe.patch(all=True)`, which `python -m swathe run train.py` does too.
"""

import swathe

swathe.patch(all=True)
