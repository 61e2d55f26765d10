"""From documents to token files: tag, de-duplicate, decontaminate, mix. Never imports jax.

The formats (documents, attributes, mixer configuration) and attribute names are Dolma's.
"""
