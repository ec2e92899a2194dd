"""Weights of other people, in and out: Hugging Face folders, their tokenizers, export.

Needs optional packages (safetensors, tokenizers). The core loads it inside functions only.
"""
