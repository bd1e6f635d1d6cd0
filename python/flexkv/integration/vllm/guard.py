"""The guard of what vLLM calls."""

import logging

from flexkv.integration.common.guard import Guard

never_raises = Guard(logging.getLogger("flexkv.vllm")).never_raises
