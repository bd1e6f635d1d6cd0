"""FlexKV: a multi-level KV cache for LLM inference engines. Engines import `flexkv.integration.<engine>`."""
