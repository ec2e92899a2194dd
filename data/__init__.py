"""Text to tokens (tokenizer), tokens to training pairs (objectives), pairs on disk (loader), one module per set."""
