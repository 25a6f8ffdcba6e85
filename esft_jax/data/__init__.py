"""From files of examples to packed batches: read, tokenize, pack, iterate."""
