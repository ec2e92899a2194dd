"""Optional parts: encoder-decoder, fast decoding, drafts, infilling, a sampler.

Each file may be deleted without touching the core. The core loads them inside functions only.
"""
