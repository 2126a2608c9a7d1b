"""The model cards' templates, read at run time as resources of `transformers_aar.model_cards`."""
