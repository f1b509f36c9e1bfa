"""The former name of `tierloom.testing`."""

from tierloom.testing import *  # noqa: F403
