"""vLLM: `vllm_v1_adapter` serves the connector inside vLLM, `connector` is our own, with the full API."""
