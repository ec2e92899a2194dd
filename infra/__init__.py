"""What any trainer needs. It imports only model.py, configurator.py and data/tokenizer.py."""
