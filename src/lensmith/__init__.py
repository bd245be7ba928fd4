"""Fine-tune Qwen3-VL on the GPU you have."""
