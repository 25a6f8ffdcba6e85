"""Decoding: generated text, and likelihoods of given text."""
