"""The demo behind `./scripts/demo`: one multi-turn workload through vLLM, without FlexKV and with it."""
