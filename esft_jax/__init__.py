"""Expert-Specialized Fine-Tuning (ESFT, arXiv 2407.01906) for mixture-of-experts models in JAX."""
