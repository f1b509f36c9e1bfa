"""Sizes of the pools of these tests; known where SGLang is not."""

PAGE, SLOTS, LAYERS = 4, 64, 3
HEADS, DIM = 2, 8
LATENT, ROPE = 16, 4
