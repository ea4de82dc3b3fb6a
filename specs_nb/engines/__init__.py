"What answers and trains: models, transformers, vLLM, servers, and what watches a training."
