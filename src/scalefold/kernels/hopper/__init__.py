"""Programs in Gluon for Hopper, beside their Triton twins: what host and programs both know."""

PART = 64  # lines of scores per consumer: those of a warpgroup's product
CONSUMERS = 2  # groups of a program that compute
MULTIPROCESSORS = 132
HIDDEN_BLOCK = 64  # channels of a hidden layer that a transition takes at a time
