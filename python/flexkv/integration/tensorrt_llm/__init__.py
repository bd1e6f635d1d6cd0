"""TensorRT-LLM: the two classes that its `kv_connector_config` names. Needs TensorRT-LLM to be imported."""

from flexkv.integration.tensorrt_llm.trtllm_adapter import FlexKVSchedulerConnector, FlexKVWorkerConnector

__all__ = ["FlexKVSchedulerConnector", "FlexKVWorkerConnector"]
