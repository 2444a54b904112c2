"""The torch-free run time: session, tokenizer with cache, batching, one head per task."""
