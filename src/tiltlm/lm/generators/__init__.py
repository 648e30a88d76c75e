"""Programs that draw whole completions for a view: vLLM in this process, or a running `vllm serve`."""
