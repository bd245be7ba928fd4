"""From a run to something others load: adapter, merged model, GGUF files, a folder for vLLM. Each appears whole or not."""
