"""The contract tests of all backends, on the emulated CUDA kernels, under every interleaving of --emu-seeds."""

from test_contract import *  # noqa: F403
from test_contract_gae import *  # noqa: F403
from test_contract_listwise import *  # noqa: F403
from test_contract_packed import *  # noqa: F403
