"""Optional parts: encoder-decoder, fast decoding, drafts, a sampler, other mask schedules.

Each file may be deleted without touching the core. The core loads them inside functions only.
"""
