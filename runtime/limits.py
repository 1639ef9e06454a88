"""The largest numbers that a request or a manifest may hold.

They are far above what models use. They keep a typing error, or a bundle by somebody who means harm, from taking all
time and memory.
"""

from __future__ import annotations

# Flow models are trained with 1,000 timesteps.
MAX_STEPS = 10_000
# The names of the files are looked at before the drawing, which takes about a second per 10,000.
MAX_PICTURES = 100_000
# Samples in one run of the denoiser.
MAX_BATCH = 4096
# Tokens of one text.
MAX_TOKENS = 2**17
# Pixels on one side of a picture. A decoded picture with such sides takes 3 GB.
MAX_SIDE = 2**14
# Frames of a video, and how many of them are shown in a second.
MAX_FRAMES = 10_000
MAX_FPS = 1000
# Values of one tensor that is made without being asked for: the latents of the default size, and golden inputs. 1 GiB.
MAX_VALUES = 2**28
# Scales of guidance, and fractions of the steps.
LARGEST_NUMBER = 10_000
